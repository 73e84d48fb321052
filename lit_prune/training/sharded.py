"""Models larger than a device: sharded over processes by FSDP2 before any weight is read, then read shard by shard."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from lit_prune._files import replacing
from lit_prune.architectures import find_group_sets
from lit_prune.callbacks.lightning_internals import METADATA_FILENAME
from lit_prune.distributed.shards import local_range
from lit_prune.errors import UnsupportedModelError
from lit_prune.torch_internals import move_buffers


def empty_model(source: str, *, dtype: torch.dtype, trust_remote_code: bool = False, **config: Any) -> nn.Module:
    """Build a causal language model whose parameters take no memory (``meta`` device); its buffers are real.

    Args:
        source: A directory in Hugging Face format, or a ``config.json``.
        dtype: Data type of the weights.
        trust_remote_code: Whether code that lies beside the weights may run.
        config: Fields of the model's config to change.
    """
    if source.endswith(".json"):
        loaded = AutoConfig.for_model(**json.loads(Path(source).read_text(encoding="utf-8")))
    else:
        loaded = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    for key, value in config.items():
        setattr(loaded, key, value)
    with no_init_weights(), _parameters_on_meta():
        model = AutoModelForCausalLM.from_config(loaded, dtype=dtype, trust_remote_code=trust_remote_code)
    # tied before they were moved: tie what is left of them
    model.tie_weights()
    return model


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    # not torch.device("meta"): rotary frequencies and the like are computed when they are built, and are in no file
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, None if param is None else nn.Parameter(param.to("meta"), param.requires_grad))

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def shard_model(model: nn.Module, mesh: DeviceMesh, device: torch.device) -> None:
    """Shard a model over a mesh of one dimension, each block that has groups as a unit of its own, and allocate the shards.

    Args:
        model: A model from :func:`empty_model`; changed in place.
        mesh: The mesh, such as ``LightningModule.device_mesh["data_parallel"]``.
        device: The process's device.
    """
    for name in dict.fromkeys(s.block for s in find_group_sets(model)):
        fully_shard(model.get_submodule(name), mesh=mesh)
    fully_shard(model, mesh=mesh)
    buffers = [(m, dict(m.named_buffers(recurse=False, remove_duplicate=False))) for m in model.modules()]
    model.to_empty(device=device)
    for module, held in buffers:
        move_buffers(module, {name: buffer.to(device) for name, buffer in held.items()})


@torch.no_grad()
def read_shards(model: nn.Module, directory: str) -> None:
    """Fill a sharded model from safetensors files; every process reads its own part of each tensor and no more.

    Args:
        model: A model from :func:`shard_model`.
        directory: A directory in Hugging Face format with ``model.safetensors``, or with several files and their index.

    Raises:
        FileNotFoundError: If there are no safetensors files.
        UnsupportedModelError: If a tensor is missing from the files, or has another shape.
    """
    files = _files(Path(directory))
    done: set[int] = set()
    missing = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in done or name not in files:
            missing.append((name, parameter))
            continue
        done.add(id(parameter))
        with safe_open(files[name], framework="pt") as file:
            saved = file.get_slice(name)
            if list(saved.get_shape()) != list(parameter.shape):
                raise UnsupportedModelError(
                    f"{name!r} has shape {list(saved.get_shape())} in {files[name]}; the model's config says"
                    f" {list(parameter.shape)}. A pruned model has to be loaded whole (shard=False)."
                )
            if isinstance(parameter, DTensor):
                dim, start, stop = local_range(parameter)
                part = (slice(None),) * dim + (slice(start, stop),)
                parameter.to_local().copy_(saved[part])
            else:
                parameter.copy_(saved[:])
    lacking = [name for name, parameter in missing if id(parameter) not in done]
    if lacking:
        raise UnsupportedModelError(
            f"{lacking[:3]} ({len(lacking)} tensors) are not in the safetensors files of {directory}, which have tensors"
            f" like {sorted(files)[:3]}. Save the model once with save_pretrained of this version of transformers."
        )


def _files(directory: Path) -> dict[str, Path]:
    """The file of every tensor."""
    index = directory / "model.safetensors.index.json"
    if index.exists():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: directory / file for name, file in names.items()}
    single = directory / "model.safetensors"
    if not single.exists():
        raise FileNotFoundError(
            f"No model.safetensors and no model.safetensors.index.json in {str(directory)!r}; expected a directory in"
            " Hugging Face format that is on this machine."
        )
    with safe_open(single, framework="pt") as file:
        return dict.fromkeys(file.keys(), single)


def consolidate(checkpoint: str | os.PathLike[str], file: str | os.PathLike[str]) -> None:
    """Make one Lightning checkpoint, of weights without optimizer state, out of a distributed one, in one process.

    ``load_from_checkpoint(file, shard=False)`` then gives a plain, pruned model. All weights have to fit in CPU memory.

    Args:
        checkpoint: The folder that ``ModelParallelStrategy`` wrote.
        file: Where to write.

    Raises:
        FileNotFoundError: If the folder is not a distributed checkpoint.
    """
    folder = Path(checkpoint)
    if not (folder / ".metadata").exists() or not (folder / METADATA_FILENAME).exists():
        raise FileNotFoundError(
            f"No distributed checkpoint at {str(folder)!r}; expected a folder of ModelParallelStrategy."
        )
    reader = FileSystemReader(folder)
    saved = {
        name: torch.empty(found.size, dtype=found.properties.dtype)
        for name, found in reader.read_metadata().state_dict_metadata.items()
        if name.startswith("state_dict.") and isinstance(found, TensorStorageMetadata)
    }
    load(saved, storage_reader=reader, no_dist=True)
    contents = torch.load(folder / METADATA_FILENAME, map_location="cpu", weights_only=True)
    weights = {name.removeprefix("state_dict."): value for name, value in saved.items()}
    with replacing(file) as temporary:
        torch.save({**contents, "state_dict": weights}, temporary)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m lit_prune.training.sharded CHECKPOINT_FOLDER FILE")
    consolidate(*sys.argv[1:])
