"""Repair: new weights for the layers that read what is removed."""

from lit_prune._moved import moved_names

__getattr__ = moved_names("lit_prune.repair")
