"""`python -m sppo_kernels` is the command `sppo`."""

import sys

from sppo_kernels.cli import main

if __name__ == "__main__":
    sys.exit(main())
