"""The main process works alone for longer than ranks wait for each other; for torchrun.

Argument: an empty folder.
"""

import datetime
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from lavis_uniadapter.common import distributed

SHORT = 3

# Imports may take longer than that, so both begin together.
folder = Path(sys.argv[1])
(folder / os.environ["RANK"]).touch()
while len(list(folder.iterdir())) < 2:
    time.sleep(0.05)

distributed.TIMEOUT = datetime.timedelta(seconds=SHORT)
distributed.init_process_group("cpu")


def work() -> str:
    time.sleep(2 * SHORT)
    return "the work is done"


found = distributed.on_main_process(work, errors=())
total = torch.ones(())
dist.all_reduce(total)  # the default group still works
print(f"{found}, {int(total)} ranks\n", end="", flush=True)
distributed.destroy_process_group()
