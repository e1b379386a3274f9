"""`python -m d2v`: the same as the `d2v` command."""

import sys

from d2v.cli import main

if __name__ == "__main__":
    sys.exit(main())
