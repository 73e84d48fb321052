"""What libraries do not document is still there and does what we use it for: the first tests to look at after an update.

Each asks one function of an ``..._internals`` module for its effect, by public means where there are any.
"""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import inspect
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import transformers
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import prune
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from conftest import tiny
from lit_prune import cli, modeling_pruned, torch_internals, transformers_internals
from lit_prune.callbacks import lightning_internals

pytestmark = pytest.mark.core
LIBRARIES = {
    "torch": torch_internals,
    "transformers": transformers_internals,
    "lightning": lightning_internals,
}


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_installed_version_was_checked(library):
    module, found = LIBRARIES[library], importlib.metadata.version(library).partition("+")[0]
    assert found in module.CHECKED, (
        f"{library} {found} is installed, and {module.__name__} was checked with {', '.join(module.CHECKED)}. Run this file; if"
        f" all else in it passes, add {found!r} to CHECKED. What fails is what the new version moved."
    )


@pytest.mark.parametrize("library", LIBRARIES)
def test_both_ends_of_the_range_were_checked(library):
    folder = Path(__file__).parent.parent
    for name in ("constraints.txt", "constraints-oldest.txt"):
        lines = (folder / name).read_text(encoding="utf-8").splitlines()
        (pinned,) = (line.partition(";")[0].strip() for line in lines if line.startswith(f"{library}=="))
        assert pinned.partition("==")[2] in LIBRARIES[library].CHECKED, f"{name} has {pinned}"


# torch


def test_versions_of_tensors():
    weight = nn.Parameter(torch.ones(3))
    loss = (weight.exp() * weight).sum()
    before = torch_internals.version_of(weight)
    with torch.no_grad():
        weight.add_(1)
        assert torch_internals.version_of(weight) == before + 1
        weight.sub_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward(retain_graph=True)
    torch_internals.set_version(weight, before)
    loss.backward()
    with torch.inference_mode():
        assert torch_internals.version_of(torch.ones(1)) == 0


def test_bases_of_views():
    whole = torch.zeros(4)
    assert torch_internals.base_of(whole[1:]) is whole
    assert torch_internals.base_of(whole) is None


def test_hooks_of_tensors_and_modules():
    weight = nn.Parameter(torch.ones(2))
    called = []
    assert not list(torch_internals.hook_tables(weight)) and not torch_internals.has_gradient_hooks(weight)
    weight.register_hook(lambda _: called.append("gradient"))
    weight.register_post_accumulate_grad_hook(lambda _: called.append("accumulated"))
    assert torch_internals.has_gradient_hooks(weight)
    tables = list(torch_internals.hook_tables(weight))
    for table in tables:
        for hook in table.values():
            hook(None)
    assert called == ["gradient", "accumulated"]
    for table in tables:
        table.clear()
    weight.sum().backward()
    assert called == ["gradient", "accumulated"], "a hook ran that was taken out of its table"
    layer = nn.Linear(2, 2)
    prune.l1_unstructured(layer, "weight", 1)
    hooked = nn.Linear(1, 1)
    hooked.register_forward_hook(print)
    assert torch_internals.forward_hooks(hooked) == [print] and torch_internals.forward_hooks(layer) == []
    (hook,) = torch_internals.forward_pre_hooks(layer)
    assert torch_internals.pruned_name(hook) == "weight"


def test_written_arguments():
    seen = []

    class Watch(torch_internals.DispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(torch_internals.written_arguments(func))
            return func(*args, **(kwargs or {}))

    values = torch.ones(2)
    with Watch():
        values.add_(1)
        torch.add(values, 1)
        torch.add(values, 1, out=values)
    assert seen == [[(0, "self")], [], [(3, "out")]]


def test_new_iterators_of_persistent_workers():
    loader = DataLoader(range(4), num_workers=1, persistent_workers=True)
    first = iter(loader)
    assert torch_internals.new_iterator(loader) is not first
    assert iter(loader) is first


def test_operations_that_overloads_are_of():
    assert torch_internals.packet_of(torch.ops.aten.mm.default) is torch.ops.aten.mm
    rows, matrices = torch.randn(16, 16), torch.randn(2, 16, 8)
    offsets = torch.tensor([4, 16], dtype=torch.int32)
    try:
        products = torch_internals.GROUPED_PRODUCTS(rows.bfloat16(), matrices.bfloat16(), offsets)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"no grouped products on this processor: {error}")
    assert products.shape == (16, 8)
    expected = torch.cat([rows[:4] @ matrices[0], rows[4:] @ matrices[1]])
    assert torch.allclose(products.float(), expected, atol=0.2, rtol=0.05)


def test_operations_by_overload_and_in_simpler_ones():
    aten = torch.ops.aten
    assert torch_internals.overload_name(aten.view.dtype) == "dtype"
    assert torch_internals.overload_name(aten.view.default) == "default"
    values, given, bias = torch.randn(3, 4), torch.randn(2, 4), torch.randn(3)
    # one that is made of others in C++, one that has a decomposition in Python, one that has neither
    linear = torch_internals.decompose(aten.linear.default, (given, values, bias), {})
    torch.testing.assert_close(linear, nn.functional.linear(given, values, bias))
    smooth = torch_internals.decompose(aten.smooth_l1_loss.default, (given, values[:2]), {"beta": 0.5})
    torch.testing.assert_close(smooth, nn.functional.smooth_l1_loss(given, values[:2], beta=0.5))
    assert torch_internals.decompose(aten.mm.default, (given, values.T), {}) is NotImplemented


def test_trees():
    tree = {"a": [torch.ones(1), 2], "b": (None, "c")}
    assert torch_internals.tree_leaves(tree) == [torch.ones(1), 2, None, "c"]
    assert torch_internals.tree_map(lambda leaf: leaf if leaf is None else leaf * 2, tree) == {
        "a": [torch.full((1,), 2.0), 4],
        "b": (None, "cc"),
    }


def test_layers_of_one_sort():
    def of(kind):
        return {name for name, found in vars(nn).items() if isinstance(found, type) and issubclass(found, kind)}

    plain, transposed = {f"Conv{n}d" for n in (1, 2, 3)}, {f"ConvTranspose{n}d" for n in (1, 2, 3)}
    lazy = {f"Lazy{name}" for name in plain | transposed}
    assert of(torch_internals.AnyConvolution) == plain | transposed | lazy
    assert of(torch_internals.AnyTransposedConvolution) == {n for n in plain | transposed | lazy if "Transpose" in n}
    norms = {f"{lazy}BatchNorm{n}d" for n in (1, 2, 3) for lazy in ("", "Lazy")} | {"SyncBatchNorm"}
    assert of(torch_internals.AnyBatchNorm) == norms
    instance = {f"{lazy}InstanceNorm{n}d" for n in (1, 2, 3) for lazy in ("", "Lazy")}
    assert of(torch_internals.AnyRunningNorm) == norms | instance


def test_what_compile_makes_of_a_module():
    layer = nn.Linear(1, 1)
    assert getattr(torch.compile(layer), torch_internals.COMPILED_FROM) is layer
    assert not hasattr(layer, torch_internals.COMPILED_FROM)


def test_modules_that_are_compiled_by_themselves():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), torch.compile(nn.Linear(2, 2), backend="eager"))
    model[1].compile(backend="eager")
    found = list(torch_internals.compiled_modules(model))
    assert [(n, type(m)) for n, m in found] == [("1", nn.Linear), ("2", nn.Linear)]
    assert found[0][1] is model[1] and found[1][1] is model[2]._orig_mod
    with torch._dynamo.config.patch(recompile_limit=3):
        assert torch_internals.recompile_limit() == 3


def test_reset_plateau():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    scheduler = ReduceLROnPlateau(optimizer, patience=5)
    for loss in (1.0, 2.0):
        scheduler.step(loss)
    assert (scheduler.best, scheduler.num_bad_epochs) == (1.0, 1)
    torch_internals.reset_plateau(scheduler)
    assert (scheduler.best, scheduler.num_bad_epochs) == (float("inf"), 0)


@pytest.mark.parametrize("marked", [False, True])
def test_mark_as_stepped(marked):
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer)
    if marked:
        torch_internals.mark_as_stepped(optimizer)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        scheduler.step()
    assert any("before `optimizer.step()`" in str(w.message) for w in found) != marked


def test_dynamo_is_loaded_by_what_compiles(monkeypatch):

    assert torch_internals.is_dynamo_loaded()
    monkeypatch.delitem(sys.modules, "torch._dynamo")
    assert not torch_internals.is_dynamo_loaded()


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_convolve(kind):
    class Other(kind):
        def forward(self, x):
            raise AssertionError

    layer = Other(2, 4, 3, padding=1, padding_mode="circular", groups=2)
    x = torch.randn(1, 2, *(5,) * (kind(1, 1, 1).weight.dim() - 2))
    assert torch.equal(torch_internals.convolve(kind, layer, x), kind.forward(layer, x))


def test_code_of_a_derived_class_is_known_from_that_of_torch():
    class Named(nn.Conv2d):
        pass

    class Inner(nn.Conv2d):
        def _conv_forward(self, x, weight, bias):
            return super()._conv_forward(x, 2 * weight, bias)

    class Outer(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    own = {kind: torch_internals.has_own_code(kind(2, 2, 1), nn.Conv2d) for kind in (nn.Conv2d, Named, Inner)}
    assert own == {nn.Conv2d: False, Named: False, Inner: True}
    assert torch_internals.has_own_code(Outer(2, 2), nn.Linear)
    # what forward calls is what counts
    layer, x = Inner(2, 2, 1), torch.randn(1, 2, 3, 3)
    assert not torch.allclose(layer(x), nn.functional.conv2d(x, layer.weight, layer.bias))


@pytest.mark.parametrize("options", [{"padding": "same"}, {"padding": (1, 2), "padding_mode": "reflect"}])
def test_padding_of_convolutions(options):
    layer = nn.Conv2d(2, 3, (2, 5), dilation=(3, 1), **options)
    x = torch.randn(1, 2, 6, 7)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = nn.functional.pad(x, torch_internals.padding_of(layer), mode=mode)
    plain = nn.functional.conv2d(padded, layer.weight, layer.bias, dilation=layer.dilation)
    torch.testing.assert_close(plain, layer(x))


def test_the_fused_path_is_left():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    seen = []
    layer.self_attn.forward = lambda query, *_, **__: (seen.append(1), (query, None))[1]
    with torch.no_grad():
        layer(torch.ones(1, 3, 8))
        assert not seen
        undo = torch_internals.keep_from_fused_path(layer.self_attn)
        layer(torch.ones(1, 3, 8))
        assert seen == [1]
        undo()
        layer(torch.ones(1, 3, 8))
    assert seen == [1]


def test_lbfgs_counts_its_parameters_anew():
    weight = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.LBFGS([weight], max_iter=1)

    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    undo = torch_internals.forget_size(optimizer)
    optimizer.state.clear()
    weight.data, weight.grad = torch.ones(2), None
    optimizer.step(closure)
    assert weight.shape == (2,) and bool((weight < 1).all())
    undo()
    assert optimizer._numel_cache == 4


def test_leaves_of_graphs():
    weight = nn.Parameter(torch.ones(1))
    node = (2 * weight).grad_fn
    assert torch_internals.leaf_of(node) is None
    (leaf,) = (torch_internals.leaf_of(n) for n, _ in node.next_functions if n is not None)
    assert leaf is weight


def test_tables_of_modules():
    module = nn.Sequential(nn.BatchNorm1d(2))
    norm = module[0]
    norm.register_parameter("none", None)
    parameters, buffers, modules = torch_internals.tables(norm)
    assert (*parameters, *buffers, *modules) == (
        *("weight", "bias", "none"),
        *("running_mean", "running_var", "num_batches_tracked"),
    )
    assert torch_internals.tables(module)[2] == {"0": norm}
    assert set(torch_internals.TABLES) <= set(vars(norm))
    torch_internals.move_buffers(norm, {"running_mean": torch.ones(2)})
    assert torch.equal(norm.state_dict()["running_mean"], torch.ones(2))
    norm.register_forward_hook(lambda *_: 1 / 0)
    copied = torch_internals.copy_without_hooks(norm)
    assert copied.weight is norm.weight and type(copied) is nn.BatchNorm1d
    copied(torch.ones(2, 2))
    torch_internals.tables(copied)[0]["weight"] = None
    assert norm.weight is not None


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_fsdp_manages_another_parameter(one_process):
    """What FSDP2 manages after a change of size trains as the same model without FSDP2 does."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    plain = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model = copy.deepcopy(plain)
    mesh = init_device_mesh("cpu", (1,))
    for module in (*model, model):
        fully_shard(module, mesh=mesh)
    assert torch_internals.is_fsdp_unit(model[0]) and not torch_internals.is_fsdp_unit(plain[0])
    model(torch.ones(1, 3)).sum().backward()
    units = [list(torch_internals.fsdp_parameters(m)) for m in model]
    assert [len(records) for records in units] == [2, 2] and not list(torch_internals.fsdp_parameters(plain[0]))
    cut = {0: {"weight": plain[0].weight[:3], "bias": plain[0].bias[:3]}, 1: {"weight": plain[1].weight[:, :3]}}
    for number, values in cut.items():
        for name, value in values.items():
            old = getattr(model[number], name)
            record = next(r for r in units[number] if r.sharded_param is old)
            new = torch_internals.manage_anew(record, old, nn.Parameter(value.detach().clone()))
            assert getattr(model[number], name) is new and isinstance(new, DTensor)
            setattr(plain[number], name, nn.Parameter(value.detach().clone()))
    model.zero_grad()
    x = torch.randn(2, 3)
    outputs = [m(x) for m in (model, plain)]
    torch.testing.assert_close(*outputs)
    for output in outputs:
        output.square().sum().backward()
    for sharded, whole in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(sharded.grad.full_tensor(), whole.grad)
    assert type(torch_internals.copy_without_hooks(model[0])) is nn.Linear


def test_fsdp_says_what_it_keeps_in_cpu_memory(one_process):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    mesh = init_device_mesh("cpu", (1,))
    fully_shard(model[0], mesh=mesh, offload_policy=CPUOffloadPolicy(pin_memory=False))
    fully_shard(model[1], mesh=mesh)
    kept = [{torch_internals.is_offloaded(r) for r in torch_internals.fsdp_parameters(m)} for m in model]
    assert kept == [{True}, {False}]


def test_fsdp_forgets_a_unit(one_process):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    for module in (*model, model):
        fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
    model(torch.ones(1, 2)).sum().backward()
    states = model._get_fsdp_state()._state_ctx.all_states
    before = list(states)
    undo = torch_internals.forget_fsdp_unit(model[1])
    assert [s for s in before if s not in states] == [model[1]._get_fsdp_state()]
    undo()
    assert states == before
    torch_internals.forget_fsdp_unit(nn.Linear(2, 2))()


# transformers


def test_build_takes_dtype_and_attention_of_the_config():
    config = CONFIG_MAPPING["llama"](
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=8
    )
    config.dtype, config._attn_implementation = torch.bfloat16, "eager"
    model = transformers_internals.build(transformers.LlamaForCausalLM, config)
    assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "eager"


def test_experts_ask_their_config_how_to_run():
    model = tiny("mixtral", num_local_experts=2, num_experts_per_tok=1)
    found = [m for m in model.modules() if type(m).__name__ == "MixtralExperts"]
    assert found and all(transformers_internals.has_choice_of_experts(m) for m in found), (
        f"MixtralExperts has no config.{transformers_internals.EXPERTS_FIELD}: how does a module of experts choose its kernel?"
    )
    assert not transformers_internals.has_choice_of_experts(nn.Linear(1, 1))
    source = inspect.getsource(importlib.import_module("transformers.integrations.moe"))
    assert transformers_internals.EXPERTS_FIELD in source


def test_implementations_are_named_by_the_configs():
    model = tiny("mixtral", "eager", num_local_experts=2, num_experts_per_tok=1)
    assert "eager" in transformers_internals.implementations_of(model)
    model.set_attn_implementation("sdpa")
    model.set_experts_implementation("batched_mm")
    assert transformers_internals.implementations_of(model) == ["batched_mm", "sdpa"]
    assert transformers_internals.implementations_of(nn.Linear(1, 1)) == []


def test_a_config_that_asks_itself_what_its_layers_differ_in_does_so_in_silence(caplog):
    fields = {"intermediate_size": 7, "allow_global_per_layer_attribute_access": True}
    config = transformers.LlamaConfig(num_hidden_layers=2, per_layer_config={0: {"intermediate_size": 5}}, **fields)
    logger = importlib.import_module("logging").getLogger("transformers.integrations.heterogeneity.configuration_utils")
    logger.addHandler(caplog.handler)
    try:
        importlib.import_module("transformers.utils.logging").warning_once.cache_clear()
        # the config class asks itself, too, when it is made
        caplog.clear()
        with transformers_internals.without_layer_warnings():
            assert config.intermediate_size == 7
        assert not caplog.messages
        importlib.import_module("transformers.utils.logging").warning_once.cache_clear()
        assert config.intermediate_size == 7
        assert any("per-layer attribute `intermediate_size`" in message for message in caplog.messages)
    finally:
        logger.removeHandler(caplog.handler)


def test_frames_of_speech():
    config = CONFIG_MAPPING["wav2vec2"](
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        vocab_size=8,
        num_conv_pos_embedding_groups=2,
    )
    model = transformers.Wav2Vec2Model(config)
    frames = transformers_internals.frames_of(model)
    with torch.no_grad():
        found = model.feature_extractor(torch.zeros(1, 800)).shape[-1]
    assert int(frames(torch.tensor([800]))[0]) == found
    assert transformers_internals.frames_of(nn.Linear(1, 1)) is None


def test_the_length_of_a_cache_is_that_of_a_layer_with_attention():
    config = transformers.Lfm2Config(num_hidden_layers=3, layer_types=["conv", "full_attention", "conv"])
    assert transformers_internals.layers_that_count_tokens(config) == [False, True, False]
    assert transformers.DynamicCache(config=config).get_seq_length() == 0
    config = transformers.Lfm2Config(num_hidden_layers=2, layer_types=["conv", "conv"])
    with pytest.raises(ValueError, match="get_seq_length"):
        transformers.DynamicCache(config=config).get_seq_length()
    for other in (config, transformers.LlamaConfig(), None):
        assert transformers_internals.layers_that_count_tokens(other) == []


def test_marked_tensors_are_not_filled():
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        for tensor in layer.parameters():
            tensor.fill_(3)
    transformers_internals.mark_initialized(layer.weight)
    initialization = importlib.import_module("transformers.initialization")
    for tensor in layer.parameters():
        initialization.zeros_(tensor)
    assert bool((layer.weight == 3).all()) and not layer.bias.any()


def test_accelerate_marks_what_it_offloads():
    accelerate = pytest.importorskip("accelerate")
    layer = nn.Linear(2, 2)
    assert transformers_internals.accelerate_hook(layer) is None
    accelerate.cpu_offload(layer, execution_device=torch.device("cpu"))
    assert transformers_internals.accelerate_hook(layer) is not None and layer.weight.is_meta


def test_the_auto_classes_have_their_mappings():
    """Used by ``modeling_pruned``, which imports nothing of this package."""
    for name in modeling_pruned.AUTO_CLASSES:
        mapping = getattr(transformers, name)._model_mapping
        config = next(iter(mapping.keys()))
        assert issubclass(config, transformers.PreTrainedConfig) and mapping[config]


# lightning


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.seen = {}

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return batch + 1

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch).sum()
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.layer(batch).sum())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Ask(pl.Callback):
    """Runs a function in the middle of a fit."""

    def __init__(self, ask):
        self.ask, self.found = ask, None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 1:
            self.found = self.ask(trainer, pl_module)


def in_a_fit(tmp_path, ask, module=None, callbacks=(), **options):
    asking = Ask(ask)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=3,
        limit_val_batches=2,
        callbacks=[*callbacks, asking],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **options,
    )
    data = [torch.full((1, 2), float(n)) for n in range(4)]
    trainer.fit(module or Module(), DataLoader(data, batch_size=None), DataLoader(data, batch_size=None))
    return asking.found


def test_hooks_batches_and_arguments(tmp_path):
    calls = []

    class Hooked(Module):
        def on_train_epoch_start(self):
            calls.append(self._current_fx_name)

    def ask(trainer, module):
        lightning_internals.call_module_hook(trainer, "on_train_epoch_start")
        arguments = lightning_internals.step_arguments(trainer, "batch", 7)
        return lightning_internals.transferred(trainer, torch.zeros(1)), dict(arguments)

    batch, arguments = in_a_fit(tmp_path, ask, Hooked())
    assert calls == ["on_train_epoch_start"] * 2
    assert torch.equal(batch, torch.ones(1))
    assert arguments == {"batch": "batch", "batch_idx": 7}


def test_dataloaders_of_the_fit(tmp_path):
    def ask(trainer, module):
        source = lightning_internals.train_data_source(trainer)
        assert source.is_defined()
        loader = source.dataloader()
        return loader, lightning_internals.prepared_train_dataloader(trainer, loader)

    loader, prepared = in_a_fit(tmp_path, ask)
    assert isinstance(loader, DataLoader) and isinstance(prepared, DataLoader)


def test_the_datamodule_is_set_up(tmp_path):
    class Data(pl.LightningDataModule):
        stages = ()

        def setup(self, stage):
            self.stages = (*self.stages, stage)

        def train_dataloader(self):
            return DataLoader([torch.ones(1, 2)] * 3, batch_size=None)

    class During(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            lightning_internals.set_up_datamodule(trainer)

    data = Data()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[During()],
        default_root_dir=tmp_path,
    )
    trainer.fit(Module(), datamodule=data)
    assert data.stages == ("fit", "fit")


def test_wrapped_optimizers(tmp_path):
    def ask(trainer, module):
        return lightning_internals.wrapped_optimizers(trainer)[0] is module.optimizers()

    assert in_a_fit(tmp_path, ask)


def test_metrics_are_kept_and_validation_leaves_no_trace(tmp_path):
    def ask(trainer, module):
        before = dict(trainer.callback_metrics), dict(trainer.logged_metrics), trainer.state.stage
        with (
            lightning_internals.metrics_kept(trainer),
            lightning_internals.validation_from_the_start(trainer) as loop,
        ):
            lightning_internals.forget_metrics(trainer)
            trainer.validating = True
            with torch.no_grad():
                loop.run()
            measured = dict(trainer.callback_metrics)
        after = dict(trainer.callback_metrics), dict(trainer.logged_metrics), trainer.state.stage
        return before, after, measured

    before, after, measured = in_a_fit(tmp_path, ask)
    assert before == after and "train_loss" in before[0]
    assert set(measured) == {"val_loss"}


def test_the_average_of_a_callback(tmp_path):
    averaging = WeightAveraging()
    assert lightning_internals.averaged_model(averaging) is None
    found = in_a_fit(
        tmp_path, lambda trainer, module: lightning_internals.averaged_model(averaging), callbacks=[averaging]
    )
    assert isinstance(found.module, Module) and int(found.n_averaged) >= 1


def test_start_methods():
    assert lightning_internals.start_method(DDPStrategy()) is None
    trainer = pl.Trainer(accelerator="cpu", devices=2, strategy="ddp_spawn", logger=False, enable_checkpointing=False)
    assert lightning_internals.start_method(trainer.strategy) == "spawn"


def test_a_step_with_an_iterator(tmp_path):
    fetcher = lightning_internals.IteratorFetcher()
    loader = CombinedLoader(DataLoader(range(3)), "max_size_cycle")
    fetcher.setup(loader)
    iter(fetcher)
    iterator = next(fetcher)
    batch, number, _ = next(iterator if not isinstance(iterator, tuple) else iterator[0])
    assert lightning_internals.last_fetched(fetcher) == (batch, number) and number == 0 and not fetcher.done


def test_where_a_sharded_checkpoint_keeps_the_rest():
    from lightning.pytorch.strategies import ModelParallelStrategy

    source = inspect.getsource(importlib.import_module("lightning.fabric.strategies.model_parallel"))
    assert lightning_internals.METADATA_FILENAME == "meta.pt"
    assert "_METADATA_FILENAME" in source and hasattr(ModelParallelStrategy, "load_checkpoint")


# jsonargparse


def test_help_texts_can_be_changed(capsys):
    """``lit-prune`` takes the markup of docstrings out of the options' help."""
    with pytest.raises(SystemExit):
        cli.main(["plan", "--help"])
    shown = capsys.readouterr().out
    assert "--calibration.text" in shown and ":func:" not in shown and "``" not in shown


def test_a_compiled_module_gives_the_module_that_it_was_made_of():
    inner = torch.nn.Linear(2, 2)
    assert torch_internals.uncompiled(torch.compile(inner, backend="eager")) is inner
    assert torch_internals.uncompiled(inner) is inner


def test_embedding_scale():
    """Gemma's embedding multiplies by the square root of the hidden size, which its module keeps as a number."""
    config = transformers.GemmaConfig(
        vocab_size=8, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, head_dim=4
    )
    embedding = transformers_internals.build(transformers.GemmaForCausalLM, config).get_input_embeddings()
    assert transformers_internals.embedding_scale(embedding) == 4.0
    ids = torch.tensor([1, 2])
    torch.testing.assert_close(embedding(ids), embedding.weight[ids] * 4.0)
    assert transformers_internals.embedding_scale(nn.Embedding(2, 2)) is None
