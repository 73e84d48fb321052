"""What ATen operators do to fields, one file for each family of operators; importing this registers all rules."""

from lit_prune.architectures.tracing.operators import (  # noqa: F401
    contraction,
    factories,
    lookup,
    movement,
    normalization,
    recurrent,
    reduction,
)
