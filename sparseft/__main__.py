"""``python -m sparseft``: the command line, installed or from a checkout (PYTHONPATH=.:kernels)."""

import sys

from sparseft.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
