"""Surgery: smaller parameters, sliced optimizer state, consistent attributes; undone if it fails."""

from lit_prune._moved import moved_names

__getattr__ = moved_names("lit_prune.surgery")
