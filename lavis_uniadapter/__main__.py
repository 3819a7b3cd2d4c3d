"""``python -m lavis_uniadapter``, the same as ``uniadapter``."""

import sys

from uniadapter_cli.main import main

if __name__ == "__main__":
    sys.exit(main())
