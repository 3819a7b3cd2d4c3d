"""``python -m lavis_uniadapter.demo``, the same as ``uniadapter demo``."""

import sys

from uniadapter_cli.main import main

if __name__ == "__main__":
    sys.exit(main(["demo", *sys.argv[1:]]))
