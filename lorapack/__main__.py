"""`python -m lorapack`."""

from lorapack.cli import main

main()
