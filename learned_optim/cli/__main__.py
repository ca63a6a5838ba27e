"""``python -m learned_optim.cli``: the command line."""

import sys

from learned_optim.cli import main

if __name__ == "__main__":
    sys.exit(main())
