"""``python -m vit_fast`` is ``vit-fast``."""

import sys

from vit_fast.cli import main

if __name__ == "__main__":  # not where a tool merely imports every module
    sys.exit(main())
