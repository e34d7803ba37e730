"""``python -m spherify``, the same as ``spherify``."""

from spherify.cli import main

main()
