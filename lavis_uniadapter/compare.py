"""``python -m lavis_uniadapter.compare``, the same as ``uniadapter compare``."""

import sys

from uniadapter_cli.main import main

if __name__ == "__main__":
    sys.exit(main(["compare", *sys.argv[1:]]))
