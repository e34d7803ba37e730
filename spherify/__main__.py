"""``python -m spherify``, the same as ``spherify``."""

from spherify.cli.app import main

main()
