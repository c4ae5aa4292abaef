"""`python -m edgecnn`, and `torchrun -m edgecnn` for several processes: the command line."""

from __future__ import annotations

import sys

from edgecnn.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
