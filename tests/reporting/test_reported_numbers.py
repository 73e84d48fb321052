"""Every number that a person reads of a run is that of the tensors."""

from __future__ import annotations

import csv
import json
import re
import warnings

import pytest
import torch
from architecture_cases import CASES
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file
from test_pruning import fit, pruning

from conftest import tiny
from lit_prune import GroupTable, PruningConfig, PruningPlan, apply_plan, find_group_sets, get_plan, load_pruned, prune
from lit_prune.callbacks import PruningReport, Stage
from lit_prune.io.huggingface import save_pruned
from lit_prune.plan import AFTER, BEFORE


def numel(model):
    return sum(p.numel() for p in model.parameters())


def width(model, kind):
    """How many groups every layer has left."""
    layers = model.model.layers
    if kind == "mlp":
        return [layer.mlp.up_proj.weight.shape[0] for layer in layers]
    return [layer.self_attn.k_proj.weight.shape[0] // layer.self_attn.head_dim for layer in layers]


STAGES = {"schedule": [Stage(0.1, epoch=1), Stage(0.2, epoch=2)]}


@pytest.mark.parametrize(
    ("options", "repair"),
    [({"iterations": 2, "epoch": 1}, None), (STAGES, None), ({**STAGES, "iterations": 2}, "bias")],
    ids=["iterations", "stages", "bias"],
)
def test_every_number_of_a_run_is_that_of_the_tensors(tmp_path, options, repair, capsys, caplog):
    out = tmp_path / "out"
    report, logger = PruningReport(out), CSVLogger(tmp_path)
    callback = pruning(repair=repair, compensation=False, **options)
    with caplog.at_level("INFO"):
        _, module = fit(tmp_path, callback, report, logger=logger)
    model, dense = module.inner["lm"], tiny("llama")
    before, after = numel(dense), numel(model)
    share = 1 - after / before
    assert 0.18 < share <= 0.2

    # the plan, wherever it is
    config = json.loads((out / "model" / "config.json").read_text())
    written = PruningPlan.load(out / "plan.json")
    for info in (callback.plan.info, get_plan(model).info, written.info, config["pruning"]["info"]):
        assert (info[BEFORE], info[AFTER]) == (before, after)
    apply_plan(dense, written)
    assert numel(dense) == after

    # the model and its card
    assert numel(load_pruned(out / "model", verify=True)) == after
    card = (out / "model" / "README.md").read_text()
    assert f"{after:,} parameters, {share:.1%} fewer than before" in card
    for kind, whole in (("attention", 4), ("mlp", 24)):
        if kept := [n for n in width(model, kind) if n < whole]:
            said = f"{min(kept)} to {max(kept)}, mean {sum(kept) / len(kept):.1f}"
            assert f"| {kind}, {len(kept)} layers cut | {whole} | {said} |" in card

    # the report: JSON, page, console
    metrics = json.loads((out / "report.json").read_text())
    assert {stage: values["parameters"] for stage, values in metrics.items()} == {
        "dense": before,
        "pruned": after,
        "recovered": after,
    }
    stored = sum(t.numel() * t.element_size() for t in load_file(out / "model" / "model.safetensors").values())
    assert metrics["recovered"]["megabytes"] == stored / 1e6
    page, printed = (out / "report.html").read_text(), capsys.readouterr().out
    cells = [re.sub(r"<[^>]+>", " ", row).split() for row in page.split("</tr>")]
    assert ["parameters", f"{before:,}", f"{after:,}", f"{after:,}", f"{after / before:.3f}"] in cells
    assert [BEFORE, str(before)] in cells and [AFTER, str(after)] in cells
    assert re.search(rf"parameters\W+{before:,}\W+{after:,}\W+{after:,}\W+{after / before:.3f}", printed)
    said = [re.search(r"Removed ([\d,]+) of ([\d,]+) parameters", m) for m in caplog.messages]
    removed, of = zip(*([int(n.replace(",", "")) for n in m.groups()] for m in said if m), strict=True)
    assert (len(removed), of[0], sum(removed)) == (len(callback.stages), before, before - after)

    # the logger
    with open(f"{logger.log_dir}/metrics.csv") as file:
        logged = {k: float(v) for row in csv.DictReader(file) for k, v in row.items() if v and k.startswith("pruning/")}
    assert logged["pruning/dense/parameters"] == before
    assert logged["pruning/pruned/parameters"] == logged["pruning/recovered/parameters"] == after
    assert logged["pruning/ratio"] == pytest.approx(share)
    biases = sum(model.get_submodule(name).bias.numel() for name in callback.plan.biases)
    lost = sum(logged[f"pruning/removed_parameters/{kind}"] for kind in ("attention", "mlp"))
    assert lost == before - after + biases
    assert bool(biases) == (repair == "bias")
    for kind, whole in (("attention", 12), ("mlp", 72)):
        assert logged[f"pruning/removed_groups/{kind}"] == pytest.approx(1 - sum(width(model, kind)) / whole)
    if len(callback.stages) == 1:
        assert GroupTable.read(out / "group_table.csv").removed_cost == before - after


def test_a_plan_that_was_edited_by_hand_is_counted_anew(tmp_path):
    model = tiny()
    sets = find_group_sets(model)
    plan = PruningPlan.from_kept(sets, [range(2) for _ in sets], {BEFORE: 5, AFTER: 4})
    apply_plan(model, plan)
    assert (get_plan(model).info[BEFORE], get_plan(model).info[AFTER]) == (numel(tiny()), numel(model))
    card = (save_pruned(model, tmp_path / "model") / "README.md").read_text()
    assert f"{numel(model):,} parameters, {1 - numel(model) / numel(tiny()):.1%} fewer" in card


def test_pruning_twice_counts_from_the_first_model(tmp_path, batches, loss_of):
    model, before = tiny(), numel(tiny())
    for ratio in (0.1, 0.3):
        prune(model, batches, loss_of(model), PruningConfig("magnitude", pruning_ratio=ratio, repair=None))
    for given in (model, load_pruned(save_pruned(model, tmp_path / "model"))):
        assert get_plan(given).info[BEFORE] == before
        assert get_plan(given).info[AFTER] == numel(model) == numel(given)


TIED = (
    "Llama, tied embeddings",
    "GPT-2",
    "BERT, masked language model",
    "Gemma 3 with images",
    "BART",
    "T5",
    "Whisper",
    "Mamba",
    "LFM2-MoE",
)


@pytest.mark.parametrize("name", TIED)
def test_what_is_tied_is_counted_once_in_a_loaded_model(tmp_path, name):
    (case,) = (c for c in CASES if c.name == name)
    model = case.build()
    before = numel(model)
    assert len(list(model.named_parameters(remove_duplicate=False))) > len(list(model.parameters()))
    sets = find_group_sets(model)
    apply_plan(model, PruningPlan.from_kept(sets, [range(max(s.minimum, s.size - 1)) for s in sets], {"ratio": 0.5}))
    loaded = load_pruned(save_pruned(model, tmp_path / "model"))
    assert (get_plan(loaded).info[BEFORE], get_plan(loaded).info[AFTER]) == (before, numel(loaded))
    assert get_plan(loaded).info == get_plan(model).info
    card = (save_pruned(loaded, tmp_path / "again") / "README.md").read_text()
    assert f"{numel(model):,} parameters, {1 - numel(model) / before:.1%} fewer" in card


def test_composing_takes_before_from_the_first_and_after_from_the_last():
    first = PruningPlan((), info={BEFORE: 100, AFTER: 90, "importance": "a"})
    later = PruningPlan((), info={BEFORE: 90, AFTER: 80, "importance": "b"})
    assert first.compose(later).info == {BEFORE: 100, AFTER: 80, "importance": "b"}
    assert PruningPlan(()).compose(later).info == {AFTER: 80, "importance": "b"}
    assert first.compose(PruningPlan(())).info == {BEFORE: 100, "importance": "a"}


@pytest.mark.parametrize("place", ["file", "file/deeper", "foreign"])
def test_an_output_that_cannot_be_written_is_found_before_the_run(tmp_path, place):
    (tmp_path / "file").write_text("x")
    (tmp_path / "foreign" / "model").mkdir(parents=True)
    (tmp_path / "foreign" / "model" / "notes.txt").write_text("precious")
    callback = pruning(epoch=1)
    with pytest.raises(Exception, match="PruningReport could not write its files at the end of the run"):
        fit(tmp_path, callback, PruningReport(tmp_path / place))
    assert callback.plan is None
    assert (tmp_path / "foreign" / "model" / "notes.txt").read_text() == "precious"


def test_a_report_that_fails_at_the_end_warns_and_the_run_is_whole(tmp_path):
    class Blocking(PruningReport):
        def on_train_end(self, trainer, pl_module):
            (tmp_path / "out").write_text("in the way")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer, module = fit(tmp_path, pruning(epoch=1), Blocking(tmp_path / "out"))
    said = " ".join(str(w.message) for w in caught)
    assert "The report was not written to" in said and "The pruned model was not written to" in said
    assert trainer.state.finished and trainer.current_epoch == 3
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]
    assert numel(module.inner["lm"]) < numel(tiny())


def test_a_tokenizer_that_is_gone_does_not_keep_the_model_from_being_saved(tmp_path):
    with pytest.warns(UserWarning, match="The tokenizer was not saved with the model"):
        fit(tmp_path, pruning(epoch=1), PruningReport(tmp_path / "out", tokenizer=str(tmp_path / "absent.gguf")))
    assert numel(load_pruned(tmp_path / "out" / "model")) < numel(tiny())
