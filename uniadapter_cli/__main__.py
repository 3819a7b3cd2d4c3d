"""``python -m uniadapter_cli``, and with torchrun ``torchrun -m uniadapter_cli train ...``."""

import sys

from uniadapter_cli.main import main

if __name__ == "__main__":
    sys.exit(main())
