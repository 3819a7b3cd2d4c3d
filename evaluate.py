"""Evaluate a model: ``python evaluate.py --cfg-path FILE``, as ``uniadapter evaluate FILE``."""

import sys

from uniadapter_cli.main import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
