"""``train.py`` whose last rank cannot read anything in the second epoch; for torchrun."""

import os
import sys

from lavis_uniadapter.datasets import reading
from lavis_uniadapter.datasets.reading import TrainingItems
from uniadapter_cli.main import main

read = TrainingItems.read
reading.RETRY_AFTER = 0.0


def fail_in_the_second_epoch(items, index):
    last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
    if last and items.epoch == 1:
        raise OSError(f"the disk of rank {os.environ['RANK']} is gone")
    return read(items, index)


TrainingItems.read = fail_in_the_second_epoch
sys.exit(main(["train", *sys.argv[1:]]))
