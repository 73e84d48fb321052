"""Models that no description covers, with the engine alone: pruned, planned for, saved, loaded, exported."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from any_models import MODELS, ConvNet, Perceptron, VisionTransformer, batches, built, images, loss_of
from torch import nn
from torch.nn import functional

import lit_prune
from conftest import uneven_kept, zeroed
from lit_prune import (
    BudgetError,
    Limits,
    PlanError,
    PruningConfig,
    PruningError,
    PruningPlan,
    UnsupportedModelError,
    apply_plan,
    find_group_sets,
    find_model,
    get_plan,
    load_pruned,
    save_pruned,
    trace,
)
from lit_prune.surgery.apply import cut

# what stays whole is warned of, which tests of tracing look at
pytestmark = pytest.mark.filterwarnings("ignore:.*of the parameters of.*:UserWarning")
CONFIG = PruningConfig(pruning_ratio=0.3, repair=None, recalibrate_batch_norm=False)


def pruned(name: str, config: PruningConfig = CONFIG) -> tuple[nn.Module, nn.Module]:
    """A dense model, and the same one pruned."""
    dense = built(name)
    model = copy.deepcopy(dense)
    lit_prune.prune(model, batches(), loss_of(model), config)
    return dense, model


def equal_states(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(v, second[k]) for k, v in first.items())


def same_groups(a: nn.Module, b: nn.Module) -> bool:
    first, second = find_group_sets(a), find_group_sets(b)
    assert len(first) == len(second) > 0
    return all(
        (s.key, s.size, s.cost, s.attributes) == (t.key, t.size, t.cost, t.attributes)
        and [(p.parameter, p.dim, p.index.tolist()) for p in (*s.slices, *s.buffers)]
        == [(p.parameter, p.dim, p.index.tolist()) for p in (*t.slices, *t.buffers)]
        for s, t in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("name", MODELS)
def test_training_goes_on_as_in_the_dense_model_with_the_groups_at_zero(name, optimizer):
    kinds = {
        "sgd": lambda ps: torch.optim.SGD(ps, lr=0.02, momentum=0.9, weight_decay=0.01),
        # a bias before a batch norm has no gradient but rounding, which a small eps would blow up
        "adamw": lambda ps: torch.optim.AdamW(ps, lr=1e-3, eps=1e-3),
    }
    model = built(name).train()
    optimizers = kinds[optimizer](model.parameters())
    train(model, optimizers, 3)
    trace(model, batches(), loss_of(model))
    group_sets = find_group_sets(model)
    kept = uneven_kept(group_sets)
    masked = zeroed(model, kept).train()
    mirror = kinds[optimizer](masked.parameters())
    mirror.load_state_dict(copy.deepcopy(optimizers.state_dict()))
    own, sizes = dict(masked.named_parameters()), {n: p.shape for n, p in model.named_parameters()}
    parts = [(s, k, part) for s, k in zip(group_sets, kept, strict=True) for part in s.slices]
    for group_set, keep, part in parts:
        gone = part.index[group_set.kept_to_removed(keep)].flatten()
        for value in mirror.state[own[part.parameter]].values():
            if isinstance(value, torch.Tensor) and value.shape == sizes[part.parameter]:
                value.index_fill_(part.dim, gone, 0.0)
    apply_plan(model, PruningPlan.from_kept(group_sets, kept), [optimizers])
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in masked.parameters())
    losses = train(model, optimizers, 4), train(masked, mirror, 4)
    np.testing.assert_allclose(*losses, rtol=1e-5)
    expected = {n: p.detach().clone() for n, p in masked.named_parameters()}
    stays = {(n, d): torch.ones(p.shape[d], dtype=bool) for n, p in expected.items() for d in range(p.dim())}
    for group_set, keep, part in parts:
        stays[part.parameter, part.dim][part.index[group_set.kept_to_removed(keep)].flatten()] = False
    for parameter, value in model.named_parameters():
        wanted = expected[parameter]
        for dim in range(wanted.dim()):
            wanted = wanted.index_select(dim, stays[parameter, dim].nonzero().flatten())
        torch.testing.assert_close(value, wanted, atol=2e-5, rtol=1e-4)
        state = {k: v.shape for k, v in optimizers.state[value].items() if isinstance(v, torch.Tensor) and v.dim()}
        assert set(state.values()) == {value.shape}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for step in range(steps):
        loss = loss_of(model)(images(8, 50 + step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", MODELS)
def test_groups_follow_every_cut_and_a_plan_brings_them_to_a_dense_model(name, tmp_path):
    dense = built(name)
    model = copy.deepcopy(dense)
    options = {"pruning_ratio": 0.2, "repair": None, "recalibrate_batch_norm": False}
    lit_prune.prune(model, batches(), loss_of(model), PruningConfig(**options, iterations=2))
    # a copy and a pickle know them, too; the state dict does not hold them
    model = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert model.state_dict().keys() == dense.state_dict().keys()
    lit_prune.prune(model, batches(), loss_of(model), PruningConfig(**options))
    x = images(4, 99)[0]
    kept = {e.key: e.kept for e in get_plan(model).entries}
    traced = copy.deepcopy(dense)
    trace(traced, batches(), loss_of(traced))
    silent = zeroed(traced, [kept.get(s.key, range(s.size)) for s in find_group_sets(traced)])
    torch.testing.assert_close(model.eval()(x), silent.eval()(x), atol=1e-5, rtol=1e-4)
    # the file alone: no batch is run, and nothing is traced
    get_plan(model).save(tmp_path / "plan.json")
    fresh = copy.deepcopy(dense)
    apply_plan(fresh, PruningPlan.load(tmp_path / "plan.json"))
    assert equal_states(fresh, model)
    assert same_groups(fresh, model)
    assert get_plan(fresh).digest() == get_plan(model).digest()
    torch.testing.assert_close(fresh.eval()(x), model(x))


@pytest.mark.parametrize("name", MODELS)
def test_a_cut_is_undone_with_its_groups(name):
    model = built(name)
    before = copy.deepcopy(model)
    trace(before, batches(), loss_of(before))
    _, plan = lit_prune.make_plan(before, find_group_sets(before), None, PruningConfig("magnitude", 0.3, repair=None))
    undo = cut(model, plan)
    assert get_plan(model) is not None
    again = cut(model, lit_prune.make_plan(model, find_group_sets(model), None, PruningConfig("random", 0.2))[1])
    again()
    undo()
    assert equal_states(model, before)
    assert get_plan(model) is None
    with pytest.raises(UnsupportedModelError, match="find the groups by running it"):
        find_group_sets(model)
    for module, untouched in zip(model.modules(), before.modules(), strict=True):
        integers = {k: v for k, v in vars(module).items() if isinstance(v, int)}
        assert integers == {k: v for k, v in vars(untouched).items() if isinstance(v, int)}
    x = images(4, 99)[0]
    assert torch.equal(model.eval()(x), before.eval()(x))


def test_biases_that_a_plan_adds_follow_later_cuts():
    torch.manual_seed(0)
    sizes = [192, 24, 20, 16, 4]
    layers = [part for i, o in pairwise(sizes) for part in (nn.Linear(i, o, bias=False), nn.ReLU())]
    dense = nn.Sequential(nn.Flatten(), *layers[:-1])
    model = copy.deepcopy(dense)
    trace(model, batches(), loss_of(model))
    group_sets = find_group_sets(model)
    plan = PruningPlan.from_kept(group_sets, uneven_kept(group_sets))
    # as repair="bias" does: layers that read what is removed and give what later cuts remove
    apply_plan(model, replace(plan, biases=("3", "5")))
    lit_prune.prune(model, batches(), loss_of(model), CONFIG)
    assert [m.bias is not None and m.bias.shape == (m.out_features,) for m in model if isinstance(m, nn.Linear)] == [
        False,
        True,
        True,
        False,
    ]
    model(batches()[0][0])
    apply_plan(dense, get_plan(model))
    assert {n: p.shape for n, p in dense.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert same_groups(dense, model)


def test_the_groups_in_a_plan_are_compact_and_checked_before_anything_is_done(tmp_path):
    dense, model = pruned("vit")
    plan = get_plan(model)
    data = json.loads(json.dumps(plan.to_dict()))
    assert PruningPlan.from_dict(data) == plan
    assert PruningPlan.from_dict(data).digest() == plan.digest()
    # 16 numbers of every head, three times
    assert data["groups"]["sets"][0]["slices"][0]["width"] == 12
    assert len(json.dumps(data["groups"])) < 6000

    changed = json.loads(json.dumps(data))
    changed["groups"]["sets"][0]["slices"][0]["dim"] = 1
    with pytest.raises(PlanError, match="groups in the plan were changed after they were saved"):
        PruningPlan.from_dict(changed)
    with pytest.raises(PlanError, match=r"expected 'lit_prune\.groups' and 1"):
        PruningPlan.from_dict({**data, "groups": {**data["groups"], "version": 2}})

    wrong = {
        r"'layers.0.attn.qkv.weight' has shape \(60, 20\).*made for \(48, 16\)": VisionTransformer(width=20),
        r"'layers.0.attn.qkv.weight' of shape \(48, 16\), which this ConvNet lacks": ConvNet(),
        "which this ModuleDict lacks": nn.ModuleDict({"a": copy.deepcopy(dense), "b": nn.Linear(2, 2)}),
    }
    for message, other in wrong.items():
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(PlanError, match=message):
            apply_plan(other, plan)
        assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())
        assert get_plan(other) is None
    # classes are the module's own affair
    apply_plan(VisionTransformer(classes=9), plan)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"by_group": "0-999999999999", "width": 16}, "expected positions below"),
        ({"by_group": "0-11", "width": 12}, "expected 48 different positions"),
        ({"by_group": "0-23 0-23", "width": 12}, "found one twice"),
        ({"by_group": "0-47/0", "width": 12}, "expected positions below"),
        ({"by_group": "x", "width": 12}, "expected positions like"),
    ],
)
def test_malformed_positions_are_refused_without_being_expanded(part, message):
    from lit_prune.group_data import GroupData

    dense, model = pruned("vit")
    content = json.loads(get_plan(model).groups.text)
    entry = content["sets"][0]["slices"][0]
    content["sets"][0]["slices"][0] = {**{k: v for k, v in entry.items() if not k.startswith("by_")}, **part}
    plan = PruningPlan(get_plan(model).entries, groups=GroupData(json.dumps(content)))
    with pytest.raises(PlanError, match=message):
        apply_plan(copy.deepcopy(dense), plan)


def test_protected_modules_keep_everything_that_is_coupled_to_them():
    for pattern in ("head", r"^stem\.", "norm$"):
        dense = built("cnn")
        config = PruningConfig(pruning_ratio=0.1, repair=None, limits=Limits(protect=[pattern]))
        lit_prune.prune(dense, batches(), loss_of(dense), config)
        assert dense.stem[0].out_channels == 8
        assert dense.branch[0].out_channels < 12
    with pytest.raises(BudgetError, match=r"only 0 of .* may be removed under .* protections \['branch'\]"):
        limits = Limits(protect=["branch"])
        lit_prune.prune(dense, batches(), loss_of(dense), PruningConfig(pruning_ratio=0.3, limits=limits))
    model = built("cnn")
    found = trace(model, batches(), loss_of(model), protect=["stem.*"])
    assert [s.name for s in found.group_sets] == [s.name for s in find_group_sets(model)] == ["branch.0"]
    lit_prune.prune(model, batches(), loss_of(model), CONFIG)
    assert model.stem[0].out_channels == 8
    assert model.branch[0].out_channels < 12


def test_tracing_tells_what_it_finds_and_changes_nothing():
    model = built("vit")
    before, attributes = copy.deepcopy(model.state_dict()), copy.deepcopy(vars(model.layers[0].attn))
    with pytest.warns(UserWarning, match="of the parameters of VisionTransformer can be pruned"):
        found = trace(model, batches(), loss_of(model))
    assert 0.5 < found.prunable < 1
    assert {s.kind for s in found.group_sets} == {"attention", "mlp"}
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert vars(model.layers[0].attn)["num_heads"] == attributes["num_heads"]
    assert [s.key for s in find_group_sets(model)] == [s.key for s in found.group_sets]
    assert find_model(nn.ModuleDict({"inner": model})) == ("inner", model)


def test_a_model_that_changed_since_is_refused_and_found_anew():
    model = built("mlp")
    trace(model, batches(), loss_of(model))
    model.layers[3], model.layers[5] = nn.Linear(24, 30), nn.Linear(30, 4)
    with pytest.raises(
        UnsupportedModelError, match=r"'layers.3.weight' had 16 positions along dimension 0, and has 30 now"
    ):
        lit_prune.prune(model, batches(), loss_of(model), CONFIG)
    trace(model, batches(), loss_of(model))
    lit_prune.prune(model, batches(), loss_of(model), CONFIG)
    assert model.layers[3].out_features < 30


def test_a_description_stays_the_first_choice(tokens):
    from conftest import tiny

    model = tiny()
    described = [s.key for s in find_group_sets(model)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trace(model, [tokens], lambda ids: model(input_ids=ids, labels=ids).loss)
    assert [s.key for s in find_group_sets(model)] == described
    _, plan = lit_prune.make_plan(model, find_group_sets(model), None, PruningConfig("magnitude", 0.2))
    assert plan.groups is None
    assert "groups" not in plan.to_dict()


def quantised() -> nn.Module:
    model = Perceptron()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.detach().to(torch.int8), requires_grad=False)
    return model


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (quantised, {}, r"All weights of Perceptron are quantised \('layers.1.weight' is torch.int8\)"),
        (nn.ReLU, {}, "ReLU has no weights"),
        (lambda: nn.Sequential(nn.LazyLinear(4)), {}, "'0.weight' has no values yet"),
        (lambda: torch.jit.script(Perceptron()), {}, "compiled by torch.jit"),
        (lambda: Perceptron().to("meta"), {}, "no values in memory"),
        (Perceptron, {"limits": Limits(kinds=["block"])}, "no description that says what its blocks are"),
        (Perceptron, {"limits": Limits(kinds=["experts"])}, "no groups of kind 'experts'; its kinds are mlp"),
    ],
)
def test_what_cannot_be_pruned_is_refused_before_it_is_run(model, options, message):
    model = model()
    runs = []

    def loss(batch):
        runs.append(batch)
        return functional.cross_entropy(model(batch[0]), batch[1])

    with pytest.raises((UnsupportedModelError, ValueError), match=message):
        lit_prune.prune(model, batches(), loss, PruningConfig(pruning_ratio=0.3, repair=None, **options))
    assert not runs or "experts" in message


def test_there_must_be_a_batch():
    model = built("mlp")
    with pytest.raises(PruningError, match="found by running a batch, and there is none"):
        lit_prune.prune(model, [], loss_of(model), CONFIG)


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_loads_into_a_dense_one(name, tmp_path):
    dense, model = pruned(name)
    folder = save_pruned(model, tmp_path / "model", metrics={"dense": {"val_loss": 1.5}})
    assert {p.name for p in folder.iterdir()} == {
        "config.json",
        "plan.json",
        "model.safetensors",
        "lit_prune_files.json",
    }
    x = images(4, 99)[0]
    for given in (MODELS[name], MODELS[name]()):
        loaded = load_pruned(folder, model=given, verify=True)
        assert not loaded.training
        assert equal_states(loaded, model)
        assert same_groups(loaded, model)
        assert torch.equal(loaded(x), model.eval()(x))
    # only the weights are new, where the model is cut already; it can be pruned further
    loaded = load_pruned(folder, model=copy.deepcopy(dense).double(), dtype="bfloat16")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    loaded = load_pruned(folder, model=loaded)
    assert equal_states(loaded, model)
    lit_prune.prune(loaded, batches(), loss_of(loaded), CONFIG)
    assert equal_states(load_pruned(save_pruned(loaded, folder), model=dense), loaded)


class Tied(nn.Module):
    """An autoencoder whose two halves share a weight, with a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(192, 20), nn.Linear(20, 192)
        self.second.weight = nn.Parameter(self.second.weight.detach().clone())
        self.middle, self.again = nn.Linear(20, 20), nn.Linear(20, 20)
        self.again.weight = self.middle.weight
        self.register_buffer("scale", torch.ones(()), persistent=False)

    def forward(self, x):
        h = torch.relu(self.first(x.flatten(1))) * self.scale
        return self.second(torch.relu(self.again(torch.relu(self.middle(h)))))


def test_shared_weights_are_written_once_and_stay_shared(tmp_path):
    model = Tied()
    loss = lambda batch: functional.mse_loss(model(batch[0]), batch[0].flatten(1))  # noqa: E731
    lit_prune.prune(model, batches(), loss, CONFIG)
    folder = save_pruned(model, tmp_path / "model", max_shard_size=6000)
    assert json.loads((folder / "config.json").read_text())["ties"] == {"again.weight": "middle.weight"}
    assert len(list(folder.glob("*.safetensors"))) > 1
    loaded = load_pruned(folder, model=Tied, verify=True)
    assert loaded.again.weight is loaded.middle.weight
    assert equal_states(loaded, model)


def test_what_does_not_fit_is_refused_and_nothing_is_changed(tmp_path):
    _, model = pruned("mlp")
    folder = save_pruned(model, tmp_path / "model")
    cases = [
        (None, ValueError, "your code and no transformers model. Give load_pruned"),
        (lambda: 3, TypeError, "found int"),
        (lambda: Perceptron(width=20), PlanError, r"'layers.1.weight' has shape \(20, 192\).*made for \(24, 192\)"),
        (lambda: Perceptron(classes=7), PlanError, r"'layers.5.bias' has shape .* in the files, and \(7,\)"),
        (lambda: nn.Sequential(Perceptron()), PlanError, "which this Sequential lacks"),
        (lambda: Perceptron().to("meta"), UnsupportedModelError, "no values in memory"),
    ]
    for given, error, message in cases:
        with pytest.raises(error, match=message):
            load_pruned(folder, model=given)
    instance = Perceptron(classes=7)
    before = copy.deepcopy(instance.state_dict())
    with pytest.raises(PlanError):
        load_pruned(folder, model=instance)
    assert get_plan(instance) is None
    assert all(torch.equal(v, before[k]) for k, v in instance.state_dict().items())
    with pytest.raises(ValueError, match="takes no 'device_map'"):
        load_pruned(folder, model=Perceptron, device_map="cpu")
    with pytest.raises(ValueError, match="self_contained"):
        save_pruned(model, tmp_path / "other", self_contained=True)
    with pytest.raises(PruningError, match="was not pruned, nor was a module in it"):
        save_pruned(Perceptron(), tmp_path / "other")
    model.__class__ = Extra
    with pytest.raises(UnsupportedModelError, match=r"'_extra_state' .* is no plain tensor"):
        save_pruned(model, tmp_path / "other")
    assert not (tmp_path / "other").exists()


class Extra(Perceptron):
    """A model with a state that is no tensor."""

    def get_extra_state(self):
        return {"a": 1}

    def set_extra_state(self, state):
        pass


def test_damaged_folders_are_refused(tmp_path):
    dense, model = pruned("mlp")
    folder = save_pruned(model, tmp_path / "model")
    kept = {p.name: p.read_bytes() for p in folder.iterdir()}

    def damaged(name: str, content: bytes | None, error: type[Exception], message: str, **options: bool) -> None:
        for file, whole in kept.items():
            (folder / file).write_bytes(whole)
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)
        instance = copy.deepcopy(dense)
        with pytest.raises(error, match=message):
            load_pruned(folder, model=instance, **options)
        assert equal_states(instance, dense)

    plan = json.loads(kept["plan.json"])
    plan["group_sets"][0]["kept"] = "0-5"
    damaged("plan.json", json.dumps(plan).encode(), PlanError, "plan.json was changed after it was saved")
    damaged("plan.json", None, FileNotFoundError, "plan.json")
    damaged("model.safetensors", None, FileNotFoundError, "has no weights")
    damaged("model.safetensors", kept["model.safetensors"][:-40], PruningError, "are damaged")
    damaged("config.json", b'{"format": "lit_prune.module", "version": 3}', PruningError, "or of another version")
    weights = bytearray(kept["model.safetensors"])
    weights[-4:] = b"\0\0\xc0\x7f"
    damaged("model.safetensors", bytes(weights), PruningError, "values that are not finite")
    weights[-4:] = b"\0\0\0\0"
    damaged("model.safetensors", bytes(weights), PruningError, "not the file that was saved", verify=True)


@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_a_cut_model_is_exported(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    _, model = pruned(name)
    model.eval()
    x = images(3, 99)[0]
    expected = model(x)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected, atol=1e-4, rtol=1e-4)
    file = tmp_path / "model.onnx"
    torch.onnx.export(model, (x,), file, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    [found] = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(found, expected.detach().numpy(), atol=1e-4, rtol=1e-4)


def test_a_model_of_transformers_without_a_description_is_saved_as_a_module(tmp_path):
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(
        hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, num_channels=3, image_size=16, patch_size=2, num_labels=4
    )
    torch.manual_seed(0)
    model = ConvNextForImageClassification(config)
    data = [{"pixel_values": torch.randn(4, 3, 16, 16), "labels": torch.tensor([0, 1, 2, 3])} for _ in range(2)]
    lit_prune.prune(model, data, lambda batch: model(**batch).loss, PruningConfig(pruning_ratio=0.2, repair=None))
    folder = save_pruned(model, tmp_path / "model")
    loaded = load_pruned(folder, model=lambda: ConvNextForImageClassification(config))
    assert torch.equal(loaded(**data[0]).logits, model.eval()(**data[0]).logits)
    with pytest.raises(UnsupportedModelError, match=r"no description, .* Save it with lit_prune.save_pruned"):
        model.save_pretrained(tmp_path / "own")
