"""`python -m sana_cli`."""

from sana_cli.app import main

main()
