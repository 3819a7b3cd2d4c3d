"""Commands in two processes each, for tests/predict/test_predict.py.

python tests/predict_over_ranks.py FOLDER '[["predict", ...], ...]'
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from forked_ranks import in_ranks

import lavis_uniadapter.tools.predict  # noqa: F401  (before the ranks are forked)
from uniadapter_cli.main import main as uniadapter

if __name__ == "__main__":
    torch.set_num_threads(1)
    for arguments in json.loads(sys.argv[2]):
        in_ranks(2, lambda: uniadapter(arguments), Path(sys.argv[1]))  # noqa: B023
