"""``python -m linop_hess`` is the command ``linop-hess``."""

import sys

from linop_hess.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
