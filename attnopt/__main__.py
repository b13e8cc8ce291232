"""`python -m attnopt`: the same as the command `attnopt`."""

import sys

from attnopt.cli import main

if __name__ == "__main__":
    sys.exit(main())
