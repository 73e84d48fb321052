"""Makes the config of pruned models known to transformers, without importing transformers before anybody else does."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

# also in lit_prune.modeling_pruned, which imports torch and transformers
MODEL_TYPE = "lit_prune"
_WATCHED = "transformers.models.auto.configuration_auto"


def register_config() -> None:
    """Let ``AutoConfig`` know the model type of pruned models, now or as soon as transformers is imported.

    What is registered is a stand-in, which imports ``lit_prune.io.loading`` when it is used; that registers the real class.
    """
    module = sys.modules.get(_WATCHED)
    if module is not None:
        _register(module)
    elif not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


def _register(module: ModuleType) -> None:
    known: Any = module.CONFIG_MAPPING
    if MODEL_TYPE in known:
        return

    class PrunedConfigOnDemand(module.PreTrainedConfig):  # type: ignore[name-defined]
        """Stands for :class:`lit_prune.modeling_pruned.PrunedConfig` until it is imported."""

        model_type = MODEL_TYPE

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
            """Import the real class, and call its method of this name."""
            importlib.import_module("lit_prune.io.loading")
            return known[MODEL_TYPE].from_dict(config_dict, **kwargs)

        @classmethod
        def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
            """Import the real class, and call its method of this name."""
            importlib.import_module("lit_prune.io.loading")
            return known[MODEL_TYPE].from_pretrained(*args, **kwargs)

    module.AutoConfig.register(MODEL_TYPE, PrunedConfigOnDemand)
    stock = module.AutoConfig.__dict__["from_pretrained"].__func__

    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        """Import what knows folders whose layers differ, which wraps this method, and begin again."""
        if getattr(module.AutoConfig.from_pretrained, "knows_pruned_layers", False):
            return stock(cls, *args, **kwargs)
        importlib.import_module("lit_prune.io.loading")
        return module.AutoConfig.from_pretrained(*args, **kwargs)

    module.AutoConfig.from_pretrained = classmethod(from_pretrained)


class _Watcher(importlib.abc.MetaPathFinder):
    """Notices the import of one module of transformers, and takes itself away."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _WATCHED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader)
        return spec


class _Registering(importlib.abc.Loader):
    """Loads a module as its own loader does, and registers the config at the end.

    Args:
        loader: The module's own loader.
    """

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _register(module)
