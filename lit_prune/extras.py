"""Errors that name the extra to install when a feature needs a package that is not there."""

from __future__ import annotations

import importlib.util

from lit_prune.errors import PruningError


class MissingPackageError(PruningError, ImportError):
    """A feature needs a package that is not installed; the message names the extra that brings it."""


def missing(package: str, extra: str, feature: str) -> MissingPackageError:
    """The error to raise, from the ImportError, where a package cannot be imported.

    Args:
        package: Name of the package.
        extra: The extra of lit_prune that installs it.
        feature: What needs it, as the subject of the sentence.
    """
    return MissingPackageError(
        f"{feature} needs the package {package}, which cannot be imported. Install it by the extra {extra!r}: pip install"
        f" 'lit_prune[{extra}]'."
    )


def require(package: str, extra: str, feature: str) -> None:
    """Raise the error of :func:`missing` if a package is not installed; it is not imported.

    Args:
        package: Name of the package.
        extra: The extra of lit_prune that installs it.
        feature: What needs it, as the subject of the sentence.

    Raises:
        MissingPackageError: If the package is not installed.
    """
    if importlib.util.find_spec(package) is None:
        raise missing(package, extra, feature)
