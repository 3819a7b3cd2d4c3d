"""Files are examined in worker processes, whatever they do to the decoder."""

import os
import signal

import decoders
import pytest
import torch

from lavis_uniadapter.tools.prepare import workers
from lavis_uniadapter.tools.prepare.workers import examine_isolated

SECONDS = 3  # for files that take none; those that hang cost a test as much


def examined(examine, files, workers=1, seconds=SECONDS):
    return dict(examine_isolated(examine, files, workers, seconds))


@pytest.mark.usefixtures("leaves_no_workers")
def test_a_decoder_that_hangs_or_dies_does_not_stop_the_check():
    assert examined(decoders.harmful, [*decoders.HARMS, "whole"], workers=2) == {
        "hangs": f"it took longer than {SECONDS} s to decode",
        "crashes": "its decoder was killed by SIGSEGV",
        "killed": "its decoder was killed by SIGKILL, perhaps for lack of memory",
        "exits": "it ended the decoder (exit status 3)",
        "raises": 'KeyError: "a decoder\'s own error"',
        "whole": None,
    }


def test_a_file_is_not_blamed_for_what_an_earlier_one_did_to_the_process():
    files = ["a", "b", "c"]
    assert examined(decoders.harmed_by_an_earlier_file, files) == dict.fromkeys(files)


@pytest.mark.usefixtures("leaves_no_workers")
def test_workers_work_side_by_side_and_take_any_name(tmp_path):
    names = [os.fsdecode(b"caf\xe9"), "new\nline"]
    paths = [str(tmp_path / name) for name in names]
    assert examined(decoders.meet, paths, 2, 60) == dict(zip(paths, names, strict=True))


def test_workers_share_the_cores():
    child = os.fork()
    if child == 0:
        torch.set_num_threads(2)
        workers._prepare_worker()
        os._exit(torch.get_num_threads())
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


def test_no_files_need_no_workers():
    assert examined(decoders.harmful, []) == {}


def test_a_worker_that_hangs_ends_without_the_main_process():
    child = os.fork()
    if child == 0:
        workers._examine(decoders.hang, 1, "a.mp4")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM
