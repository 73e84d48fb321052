"""``push_to_hub`` of a pruned model: transformers pushes config and weights with a card that says nothing; ours follows."""

from __future__ import annotations

import importlib
from functools import wraps
from typing import Any

from huggingface_hub import HfApi
from transformers import PreTrainedModel

from lit_prune.io.model_card import card_of
from lit_prune.plan import get_plan
from lit_prune.surgery import saving


def install() -> None:
    """Let ``push_to_hub`` of a pruned model push a card that says what was cut, where the repository has none."""
    stock = PreTrainedModel.push_to_hub
    if getattr(stock, "knows_pruned_models", False):
        return

    @wraps(stock)
    def push_to_hub(self: PreTrainedModel, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        with saving.plan_of_inner_model(self):
            if get_plan(self) is None:
                return stock(self, repo_id, *args, **kwargs)
            if saving.to_pretrained is None:
                importlib.import_module("lit_prune.io.huggingface")
            assert saving.to_pretrained is not None
            described = saving.to_pretrained(self, self_contained=bool(getattr(self.config, "auto_map", None)))
        token = kwargs.get("token")
        api = HfApi(token=token)
        had_card = api.file_exists(repo_id, "README.md")
        result = stock(described, repo_id, *args, **kwargs)
        if not had_card and not kwargs.get("create_pr"):
            api.upload_file(
                path_or_fileobj=card_of(described).encode(),
                path_in_repo="README.md",
                repo_id=repo_id,
                revision=kwargs.get("revision"),
                commit_message="Say what was pruned",
            )
        return result

    push_to_hub.knows_pruned_models = True  # type: ignore[attr-defined]
    PreTrainedModel.push_to_hub = push_to_hub  # type: ignore[method-assign, assignment]
