"""``uniadapter doctor``: whether this environment works, one line a check.

Exits with 1 if something would fail. What may not import is tried in another process.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import NamedTuple

OK, WARNING, PROBLEM = "ok", "warning", "problem"
PIP = "python -m pip install"
LAVIS_ALONE = "--no-deps salesforce-lavis==1.0.2"
LAVIS_SET = f"{PIP} -e . -c constraints/lavis.txt"
MODERN_SET = f"{PIP} -r constraints/modern.txt && {PIP} -e . {LAVIS_ALONE}"
EITHER_SET = f"in a fresh environment, {LAVIS_SET} or {MODERN_SET}"
# Wheels of OpenCV overwrite each other's files, and those for screens need libGL.
ONE_OPENCV = f"uninstall all opencv-* packages, then {PIP} opencv-python-headless"
TIMEOUT = 600  # seconds; the first import may take minutes
# What to install for a module of another name.
DISTRIBUTIONS = {"cv2": "opencv-python-headless", "lavis": LAVIS_ALONE, "PIL": "pillow"}
SHOWN = ("torch", "torchvision", "transformers", "timm", "numpy", "opencv-python-headless")
OWNERS = ("lavis-uniadapter", "torchvision", "transformers")  # whose requirements matter here
DRIVER_FIX = "install NVIDIA's latest driver (Docker: --gpus all), or PyTorch for an older CUDA"
BERT = "bert-base-uncased"


class Finding(NamedTuple):
    """What one check found; a problem or a warning has a fix."""

    level: str
    check: str
    found: str
    fix: str = ""

    def __str__(self) -> str:
        line = f"{self.level:8} {self.check:17} {self.found}"
        return f"{line}\n{'':8} -> {self.fix}" if self.fix else line


def check_versions(versions: Mapping[str, str]) -> Finding:
    """Which of the tested sets of dependencies this is, by its transformers."""
    shown = ", ".join(f"{name} {versions[name]}" for name in SHOWN if name in versions)
    major_minor = re.findall(r"\d+", versions.get("transformers", ""))[:2]
    for name, least, below in (("lavis", [4, 25], [4, 27]), ("modern", [4, 50], [4, 57])):
        if least <= [int(number) for number in major_minor] < below:
            return Finding(OK, "dependencies", f"the set '{name}': {shown}")
    return Finding(WARNING, "dependencies", f"neither of the tested sets: {shown}", EITHER_SET)


def check_requirements(said: str) -> Iterator[Finding]:
    """Unmet requirements, from what ``pip check`` prints."""
    if "No module named pip" in said:
        yield Finding(WARNING, "pip", "not installed: nothing to check with", "python -m ensurepip")
    pattern = r"^(\S+) (\S+) (?:requires|has requirement) (.+?)(?:;.*)?, (?:which|but) (.+)"
    for owner, version, requirement, found in re.findall(pattern, said, re.MULTILINE):
        # the probes try NumPy, whose version depends on the set, and OpenCV, which has other names
        if owner in OWNERS and not requirement.startswith(("numpy", "opencv")):
            alone = requirement.startswith("salesforce-lavis")
            fix = f"{PIP} {LAVIS_ALONE if alone else repr(requirement)}"
            yield Finding(PROBLEM, owner, f"{version} needs {requirement}: {found}", fix)


def probe_torch() -> tuple[str, str]:
    """PyTorch computes with NumPy and on each GPU, and its processes can communicate."""
    import torch
    import torch.distributed as dist

    torch.zeros(1).numpy()
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    for index in gpus:
        torch.ones(2, device=f"cuda:{index}").sum().item()
    backend = "nccl" if gpus else "gloo"
    if not (dist.is_available() and getattr(dist, f"is_{backend}_available")()):
        raise RuntimeError(f"PyTorch was built without {backend}, which every run needs")
    if torch.version.cuda and not gpus and (problem := driver_problem()):
        return f"{torch.__version__} for CUDA {torch.version.cuda}, and {problem}", DRIVER_FIX
    return ", ".join([torch.__version__, *map(torch.cuda.get_device_name, gpus or [])]), ""


def driver_problem(root: str = "/") -> str:
    """Why PyTorch for CUDA cannot use this machine's NVIDIA GPU; empty if there is none."""
    if os.path.exists(f"{root}proc/driver/nvidia/version"):
        return "the NVIDIA driver is too old for it"
    vendors = Path(root, "sys/bus/pci/devices").glob("*/vendor")
    found = any(file.read_text().strip() == "0x10de" for file in vendors)
    return "the NVIDIA driver is missing" if found else ""


def probe_lavis() -> tuple[str, str]:
    """LAVIS imports, and this package registers its models with it."""
    import lavis

    from lavis_uniadapter.registration import model_zoo

    models = [name for name in model_zoo.model_zoo if name.startswith("blip_uniadapter_")]
    return f"{', '.join(models)}, with LAVIS from {Path(lavis.__file__).parent}", ""


def probe_video() -> tuple[str, str]:
    """A video that OpenCV writes can be decoded."""
    import cv2
    import decord
    import numpy as np

    from lavis_uniadapter.processors.decoding import decode_frames

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "clip.mp4")
        writer = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*"mp4v"), 8, (64, 64))
        for _ in range(8):
            writer.write(np.zeros((64, 64, 3), np.uint8))
        writer.release()
        decode_frames(path, lambda number: [0, number - 1], 32)
    return f"decord {decord.__version__} decodes what OpenCV {cv2.__version__} writes", ""


def probe_tokenizer() -> tuple[str, str]:
    """BERT's tokenizer is in the local cache."""
    from transformers import BertTokenizer

    try:
        BertTokenizer.from_pretrained(BERT, local_files_only=True)
    except (OSError, ValueError, TypeError, ImportError):  # depends on the version
        code = f"from transformers import BertTokenizer; BertTokenizer.from_pretrained('{BERT}')"
        return f"{BERT} is not in the local cache", f'python -c "{code}", or set model.tokenizer'
    return f"{BERT} is in the local cache", ""


PROBES = dict(torch=probe_torch, LAVIS=probe_lavis, video=probe_video, tokenizer=probe_tokenizer)


def check_imports() -> Iterator[Finding]:
    """Run the probes in another process; if it ends early, the probe that it was at failed."""
    code = f"import faulthandler; faulthandler.dump_traceback_later({TIMEOUT}, exit=True)"
    code += "; from uniadapter_cli import doctor; doctor.run_probes()"
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, check=False, capture_output=True, text=True, errors="replace")
    answers = [line.split("\t")[1:] for line in done.stdout.splitlines() if line.startswith("\t")]
    for name, found, fix in answers:
        yield Finding(WARNING if fix else OK, name, found, fix)
    if done.returncode:
        name = [*PROBES, "exit"][len(answers)]
        yield Finding(PROBLEM, name, *explain(done.returncode, done.stderr))


def run_probes() -> None:
    """Print what each probe finds, and the fix, if one is needed; an error ends the process."""
    for name, probe in PROBES.items():
        print("", name, *probe(), sep="\t", flush=True)


def explain(status: int, stderr: str) -> tuple[str, str]:
    """What ended a process, and the fix."""
    said = (stderr.strip().splitlines() or ["no message"])[-1]
    if late := re.search(r"^Timeout \(.+\)", stderr, re.MULTILINE):
        return f"no answer: {late[0]}", EITHER_SET
    if status < 0:
        return f"Python ended with {signal.Signals(-status).name}: {said}", EITHER_SET
    file = re.findall(r'^  File "([^<"]+)"', stderr, re.MULTILINE)[-1:]
    found = f"{said} ({file[0]})" if file else said
    if missing := re.match(r"ModuleNotFoundError: No module named '(\w+)", said):
        return found, f"{PIP} {DISTRIBUTIONS.get(missing[1], missing[1])}"
    if re.search(r"libGL|libgthread|\bcv2\b", found):
        return found, ONE_OPENCV
    return found, f"rename that file if it is your own and hides a package; else {EITHER_SET}"


def check_machine() -> Iterator[Finding]:
    """Java, disk space and shared memory."""
    java, fix = shutil.which("java"), "apt-get install default-jre-headless"
    missing = Finding(WARNING, "Java", "not found: captions are scored without METEOR", fix)
    yield Finding(OK, "Java", java) if java else missing
    weights = Path(os.environ.get("TORCH_HOME") or "~/.cache/torch").expanduser()
    places = [
        ("disk, data", Path("cache"), 5, "set run.cache_root to another folder"),
        ("disk, weights", weights, 5, "set TORCH_HOME to another folder"),
        ("shared memory", Path("/dev/shm"), 1, "docker run --shm-size=8g, or run.num_workers=0"),
    ]
    for check, folder, least, fix in places:
        place = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
        free = shutil.disk_usage(place).free / 1e9
        enough = free >= least or (check == "shared memory" and place != folder)
        found = f"{free:.1f} GB free ({place})"
        yield Finding(OK if enough else WARNING, check, found, "" if enough else fix)


def main(argv: Sequence[str] | None = None) -> int:
    """Print all findings; 1 if one of them is a problem."""
    argparse.ArgumentParser(prog="uniadapter doctor", description=__doc__).parse_args(argv)
    versions = {d.name.lower(): d.version for d in metadata.distributions() if d.name}
    pip = subprocess.getoutput(f'"{sys.executable}" -m pip check')
    known = [check_versions(versions), *check_requirements(pip)]
    levels = []
    for finding in chain(known, check_imports(), check_machine()):
        levels.append(finding.level)
        print(finding, flush=True)
    print(f"\n{levels.count(PROBLEM)} problem(s), {levels.count(WARNING)} warning(s)")
    return 1 if PROBLEM in levels else 0
