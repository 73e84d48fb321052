"""Which classes a description is for: by the class itself, by its qualified name, or by a bare name that others may have."""

from __future__ import annotations

import sys

from torch import nn

ClassRef = str | type


def qualified_name(reference: ClassRef) -> str:
    """The name of a class with its module in front; a name stays as it is."""
    return reference if isinstance(reference, str) else f"{reference.__module__}.{reference.__qualname__}"


def is_bare(reference: ClassRef) -> bool:
    """Whether a class is referred to by a name without a module, which unrelated classes may share."""
    return isinstance(reference, str) and "." not in reference


def refers_to(reference: ClassRef, cls: type) -> bool:
    """Whether a reference means this very class.

    Args:
        reference: The class, its bare name, or a dotted name: of the module that defines it, or of one that exports it.
        cls: The class.
    """
    if not isinstance(reference, str):
        return reference is cls
    if is_bare(reference):
        return cls.__name__ == reference
    if qualified_name(cls) == reference:
        return True
    module, _, name = reference.rpartition(".")
    # only of modules that are imported already: one that is not cannot have made the class
    return cls.__name__ == name and getattr(sys.modules.get(module), name, None) is cls


def matching_class(references: tuple[ClassRef, ...], module: nn.Module) -> type | None:
    """The module's class, or the nearest of its bases, that one of the references means."""
    return next((c for c in type(module).__mro__ if any(refers_to(r, c) for r in references)), None)


def refers_to_any(references: tuple[ClassRef, ...], module: nn.Module, *, bare: bool = True) -> bool:
    """Whether one of the references means the module's class or one of its bases.

    Args:
        references: Classes or names of classes.
        module: The module.
        bare: Whether bare names count.
    """
    return any(refers_to(r, c) for r in references if bare or not is_bare(r) for c in type(module).__mro__)


def namesakes(references: tuple[ClassRef, ...], module: nn.Module) -> list[str]:
    """The qualified references whose class only shares its bare name with the module's class or one of its bases."""
    names = {c.__name__ for c in type(module).__mro__}
    qualified = [qualified_name(r) for r in references if not is_bare(r)]
    return [n for n in qualified if n.rpartition(".")[2] in names and not refers_to_any(references, module)]
