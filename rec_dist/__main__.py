"""`python -m rec_dist` is `rec-dist`."""

import sys

from rec_dist.cli import main

if __name__ == "__main__":
    sys.exit(main())
