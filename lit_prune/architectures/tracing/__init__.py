"""Group sets found by running a model."""
