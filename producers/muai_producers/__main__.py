"""`python -m muai_producers`: the command `muai`, where no script of that name is on the path."""

from muai_producers.cli.main import main

main()
