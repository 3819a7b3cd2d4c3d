"""``python -m lavis_uniadapter.prepare``, the same as ``uniadapter prepare``."""

import sys

from uniadapter_cli.main import main

if __name__ == "__main__":
    sys.exit(main(["prepare", *sys.argv[1:]]))
