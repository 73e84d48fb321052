"""The README of a saved model: what was cut, how, what was measured, and how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from lit_prune import modeling_pruned
from lit_prune._files import write_text
from lit_prune.groups import HIDDEN, count_parameters
from lit_prune.plan import get_plan
from lit_prune.reporting.metrics import format_metric, label
from lit_prune.text_escape import for_markdown


def write_card(model: PreTrainedModel, folder: Path) -> None:
    """Write the README of a model that was saved by its own ``save_pretrained``.

    Args:
        model: The model; its config has a plan.
        folder: Where its files are.
    """
    write_text(folder / "README.md", card_of(model))


def card_of(model: PreTrainedModel) -> str:
    """The README of a model whose config has a plan, without metrics."""
    return model_card(model, {}, self_contained=bool(getattr(model.config, "auto_map", None)))


def model_card(
    model: PreTrainedModel, metrics: Mapping[str, Mapping[str, float]], *, self_contained: bool = False
) -> str:
    """The README of a saved model: what was removed, how, the metrics, and how to load it.

    Args:
        model: The model, as :func:`to_pretrained` gives it.
        metrics: Metrics by stage and name.
        self_contained: Whether the modelling code lies beside the weights.
    """
    plan = get_plan(model)
    assert plan is not None
    config: Any = model.config
    auto_class = "AutoModelForCausalLM" if model.can_generate() else "AutoModel"
    stock = not modeling_pruned.is_pruned_config(config)
    before, after = plan.info.get("parameters_before"), count_parameters(model)
    lines = ["---", "library_name: transformers", "tags: [pruned, structured-pruning, lit_prune]"]
    if model.can_generate():
        lines.append("pipeline_tag: text-generation")
    lines += ["---", "", f"# A pruned {for_markdown(config.base_model_type)} model", ""]
    removed = f", {1 - after / before:.1%} fewer than before" if before else ""
    channels = [e for e in plan.entries if e.kind == HIDDEN]
    what = ["attention heads and MLP channels"] * (len(plan.group_entries) > len(channels))
    what += ["hidden channels"] * bool(channels) + ["whole blocks"] * bool(plan.blocks)
    lines.append(f"{after:,} parameters{removed}: {' and '.join(what)} were cut out for good with lit_prune.")
    lines += ["", "| group set | of | kept |", "|---|---|---|"]
    lines += [f"| blocks | {e.size} | {len(e.kept)} |" for e in plan.blocks]
    lines += [f"| hidden channels | {e.size} | {len(e.kept)} |" for e in channels]
    for kind in dict.fromkeys(e.kind for e in plan.group_entries if e.kind != HIDDEN):
        entries = [e for e in plan.entries if e.kind == kind]
        kept = [len(e.kept) for e in entries]
        lines.append(
            f"| {for_markdown(kind)}, {len(entries)} layers cut | {max(e.size for e in entries)} | {min(kept)} to"
            f" {max(kept)}, mean {sum(kept) / len(kept):.1f} |"
        )
    for key in ("importance", "pruning_ratio", "ratio_of", "repair", "calibration_batches"):
        if key in plan.info:
            lines += [""] * (key == "importance") + [f"- {key.replace('_', ' ')}: {for_markdown(plan.info[key])}"]
    names = list(dict.fromkeys(name for values in metrics.values() for name in values))
    if names:
        lines += ["", "| | " + " | ".join(map(for_markdown, metrics)) + " |", "|---" * (1 + len(metrics)) + "|"]
        for name in names:
            cells = [format_metric(name, values.get(name)) for values in metrics.values()]
            lines.append(f"| {for_markdown(label(name))} | " + " | ".join(cells) + " |")
    lines += ["", "```python"] + ([] if stock or self_contained else ["import lit_prune  # makes the model known"])
    trusted = ", trust_remote_code=True" if self_contained and not stock else ""
    lines += [
        f"from transformers import {auto_class}",
        "",
        f'model = {auto_class}.from_pretrained("this folder"{trusted})',
        "```",
        "",
    ]
    return "\n".join(lines)
