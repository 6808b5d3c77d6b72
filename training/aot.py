"""`python -m training.aot`: compile the backward kernels for every GPU generation, with no GPU."""

import sys

from sana_cli.kernels.aot import main

if __name__ == "__main__":
    sys.exit(main("training"))
