"""Lightning comes in two packages with the same classes, ``lightning.pytorch`` and ``pytorch_lightning``; both work."""

from __future__ import annotations

from typing import TypeGuard, TypeVar

T = TypeVar("T")

_TWINS = {"pytorch_lightning": "lightning.pytorch", "lightning_fabric": "lightning.fabric"}


def is_a(value: object, kind: type[T]) -> TypeGuard[T]:
    """Whether something is an instance of a class of Lightning, whichever of its packages it was imported from.

    Args:
        value: Anything: a strategy, a logger, a callback.
        kind: The class, from ``lightning.pytorch``.
    """
    name = _full_name(kind)
    return isinstance(value, kind) or any(_full_name(base) == name for base in type(value).__mro__)


def is_overridden(name: str, module: object) -> bool:
    """Whether a LightningModule, of either package, has a method of its own in place of Lightning's.

    Args:
        name: Name of the method.
        module: The module.
    """
    method = getattr(type(module), name, None)
    return method is not None and method.__module__.partition(".")[0] not in ("lightning", "pytorch_lightning")


def _full_name(kind: type) -> str:
    package, _, rest = kind.__module__.partition(".")
    return f"{_TWINS.get(package, package)}.{rest}.{kind.__qualname__}"
