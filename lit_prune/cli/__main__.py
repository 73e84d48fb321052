"""``python -m lit_prune.cli``."""

from lit_prune.cli import main

main()
