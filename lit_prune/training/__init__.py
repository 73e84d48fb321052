"""A LightningModule and a LightningDataModule for causal language models: what ``train.py`` and the recipes run on."""

from lit_prune.training.data import TextDataModule
from lit_prune.training.modules import CausalLMModule

__all__ = ["CausalLMModule", "TextDataModule"]
