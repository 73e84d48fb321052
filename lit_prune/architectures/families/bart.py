"""BART and its relatives, Whisper among them: encoder and decoder with separate projections."""

from lit_prune.architectures.components import MLP, Attention
from lit_prune.architectures.registry import Architecture, register_architecture

register_architecture(
    Architecture(
        name="bart",
        models=(
            "transformers.BartPreTrainedModel",
            "transformers.MBartPreTrainedModel",
            "transformers.PegasusPreTrainedModel",
            "transformers.MarianPreTrainedModel",
            "transformers.M2M100PreTrainedModel",
            "transformers.WhisperPreTrainedModel",
        ),
        components=(
            Attention(path="layers.*.self_attn", output="out_proj"),
            Attention(path="layers.*.encoder_attn", output="out_proj", kind="cross_attention", optional=True),
            MLP(path="layers.*", inputs=("fc1",), output="fc2"),
        ),
    )
)
