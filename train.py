"""Train a model: ``python train.py --cfg-path projects/uniadapter/train/<name>.yaml``."""

import sys

from lavis_uniadapter.runners.launch import main

if __name__ == "__main__":
    sys.exit(main())
