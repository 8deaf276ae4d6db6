"""`python -m pluribus`."""

from pluribus.cli import main

main()
