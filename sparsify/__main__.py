"""`python -m sparsify` is the command `sparsify`."""

import sys

from sparsify.cli import main

sys.exit(main())
