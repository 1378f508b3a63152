"""``python -m clmerge`` is the console script ``clmerge``."""

import sys

from clmerge.cli import main

if __name__ == "__main__":
    sys.exit(main())
