"""Descriptions of model families, one file each; importing a file registers its descriptions."""
