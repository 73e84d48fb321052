"""The processes of a run: what they agree on, and parameters that FSDP2 shards."""

from lit_prune._moved import moved_names

__getattr__ = moved_names("lit_prune.distributed")
