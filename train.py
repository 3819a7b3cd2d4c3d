"""Train a model: ``python train.py --cfg-path FILE``, as ``uniadapter train FILE``."""

import sys

from uniadapter_cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
