"""Finds the groups of any module by running it."""

from lit_prune.architectures.tracing.find import TracedGroups, trace_groups
from lit_prune.architectures.tracing.report import Untraceable

__all__ = ["TracedGroups", "Untraceable", "trace_groups"]
