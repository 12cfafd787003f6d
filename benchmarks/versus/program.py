"""How the programs of this folder that run in sparsify's own environment begin and end."""

import sys
from collections.abc import Callable

from sparsify.errors import SparsifyError


def call(main: Callable[[str], None]) -> None:
    """Run `main` on the job that the command line names. An error of ours is one line of the log, as `sparsify` writes it."""
    try:
        main(sys.argv[1])
    except SparsifyError as error:
        sys.exit(f"error: {error}")
