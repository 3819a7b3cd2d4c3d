"""Evaluate a model: ``python evaluate.py --cfg-path projects/uniadapter/eval/<name>.yaml``."""

import sys

from lavis_uniadapter.runners.launch import main

if __name__ == "__main__":
    sys.exit(main(evaluate=True))
