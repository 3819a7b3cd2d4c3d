"""``python -m lavis_uniadapter.doctor``: whether this environment will do, a line a check.

It exits with 1 if something would fail. Here the standard library alone is imported, and everything
else in processes of their own: the doctor is for environments in which something does not import.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata, util
from pathlib import Path
from typing import Any

OK, WARNING, PROBLEM = "ok", "warning", "problem"
ARROW = "->"
SECONDS = 600  # the first import after an installation, on a slow disk
GB = 2**30
LEAST_DISK, LEAST_SHARED_MEMORY = 5 * GB, GB

PIP = "python -m pip install"
LAVIS_ALONE = f"{PIP} --no-deps salesforce-lavis==1.0.2"
LAVIS_SET = f'{PIP} -e ".[test]" -c constraints/lavis.txt'
MODERN_SET = f"{PIP} -r constraints/modern.txt && {PIP} --no-deps -e . salesforce-lavis==1.0.2"
EITHER_SET = f"in a fresh environment, {LAVIS_SET} or {MODERN_SET}"

# What LAVIS 1.0.2 and this package import: distributions by the modules they bring.
DISTRIBUTIONS = {
    "lavis": "salesforce-lavis",
    "torch": "torch",
    "torchvision": "torchvision",
    "transformers": "transformers",
    "huggingface_hub": "huggingface_hub",
    "timm": "timm",
    "fairscale": "fairscale",
    "numpy": "numpy",
    "cv2": "opencv-python-headless",
    "decord": "decord",
    "safetensors": "safetensors",
    "omegaconf": "omegaconf",
    "torchmetrics": "torchmetrics",
    "einops": "einops",
    "iopath": "iopath",
    "webdataset": "webdataset",
    "pycocoevalcap": "pycocoevalcap",
    "pycocotools": "pycocotools",
    "spacy": "spacy",
    "ftfy": "ftfy",
    "regex": "regex",
    "scipy": "scipy",
    "skimage": "scikit-image",
    "pandas": "pandas",
    "matplotlib": "matplotlib",
    "PIL": "pillow",
    "yaml": "PyYAML",
    "requests": "requests",
    "tqdm": "tqdm",
}
OPENCVS = ("opencv-python-headless", "opencv-python", "opencv-contrib-python-headless")
SHOWN = ("torch", "torchvision", "transformers", "huggingface_hub", "timm", "numpy", "cv2")


@dataclasses.dataclass(frozen=True)
class Finding:
    """What one check found; a problem or warning says what mends it."""

    level: str
    check: str
    found: str
    mend: str = ""

    def __str__(self) -> str:
        line = f"{self.level:8} {self.check:17} {self.found}"
        return f"{line}\n{'':8} {ARROW} {self.mend}" if self.mend else line


# --- versions -----------------------------------------------------------------------------------


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version: ``2.14.1+cpu`` is (2, 14, 1)."""
    return tuple(map(int, re.findall(r"\d+", version.split("+")[0])[:3]))


def dependency_set(versions: Mapping[str, str | None]) -> str | None:
    """Which of the two tested sets an environment is of, by its transformers."""
    transformers = release(versions.get("transformers") or "")
    if (4, 25) <= transformers < (4, 27):
        return "lavis"
    return "modern" if (4, 50) <= transformers < (4, 57) else None


def check_versions(
    python: tuple[int, int], versions: Mapping[str, str | None], torch_of_torchvision: str | None
) -> list[Finding]:
    """What versions alone tell.

    Args:
        python: This Python's.
        versions: Of each module in ``DISTRIBUTIONS``; None where it is missing, and an empty text
            where it is there and does not tell its version.
        torch_of_torchvision: The version of torch that torchvision was built for.
    """
    findings = []

    def add(level: str, check: str, found: str, mend: str = "") -> None:
        findings.append(Finding(level, check, found, mend))

    def between(module: str, least: tuple[int, ...], below: tuple[int, ...] = (1 << 30,)) -> bool:
        version = versions.get(module)
        return bool(version) and least <= release(version) < below

    kind = dependency_set(versions)
    name = ".".join(map(str, python))
    if not (3, 10) <= python < (3, 14):
        add(PROBLEM, "Python", name, "make a virtual environment with a Python from 3.10 to 3.13")
    elif kind == "lavis" and python >= (3, 12):
        add(PROBLEM, "Python", f"{name}, too new for LAVIS's own pins", MODERN_SET)
    else:
        add(OK, "Python", name)

    for module, version in versions.items():
        if version is None:
            add(PROBLEM, module, "not installed", install_command(module))

    shown = ", ".join(f"{m} {versions[m]}" for m in SHOWN if versions.get(m))
    if kind is not None:
        add(OK, "dependencies", f"the set '{kind}': {shown}")
    elif versions.get("transformers"):
        add(WARNING, "dependencies", f"neither of the tested sets: {shown}", EITHER_SET)

    transformers, numpy = versions.get("transformers"), versions.get("numpy")
    if between("transformers", (4, 57)):
        what = f"{transformers} lacks what LAVIS imports from it"
        add(PROBLEM, "transformers", what, f"{PIP} 'transformers==4.55.4' 'huggingface_hub<1'")
    elif between("huggingface_hub", (1,)):
        what = f"{versions['huggingface_hub']}, which transformers {transformers} cannot use"
        add(PROBLEM, "huggingface_hub", what, f"{PIP} 'huggingface_hub<1'")
    if between("numpy", (2,)):
        old = [
            f"{label} {versions[module]}"
            for label, module, below in (
                ("transformers", "transformers", (4, 41)),
                ("OpenCV", "cv2", (4, 10)),
                ("torch", "torch", (2, 3)),
            )
            if between(module, (0,), below)
        ]
        if old:
            what = f"{numpy}, and built for NumPy 1: {', '.join(old)}"
            add(PROBLEM, "numpy", what, f"{PIP} 'numpy<2'")
    wanted, torch = torch_of_torchvision, versions.get("torch")
    if wanted and torch and release(wanted) != release(torch):
        what = f"{versions.get('torchvision')} was built for torch {wanted}, and torch is {torch}"
        add(PROBLEM, "torchvision", what, f"{PIP} torch=={wanted}")
    if versions.get("lavis") and not between("lavis", (1, 0, 2), (1, 0, 3)):
        what = f"{versions['lavis']}, and this package is made for 1.0.2"
        add(WARNING, "LAVIS", what, LAVIS_ALONE)
    return findings


def install_command(module: str) -> str:
    """The command that brings a missing module."""
    if module == "lavis":
        return LAVIS_ALONE
    return f"{PIP} {DISTRIBUTIONS.get(module, module)}"


def installed_versions() -> dict[str, str | None]:
    """Versions of this environment, for ``check_versions``."""
    versions: dict[str, str | None] = {}
    for module, distribution in DISTRIBUTIONS.items():
        for name in OPENCVS if module == "cv2" else (distribution,):
            try:
                versions[module] = metadata.version(name)
                break
            except metadata.PackageNotFoundError:
                versions[module] = "" if util.find_spec(module) else None
    return versions


def torch_of_torchvision() -> str | None:
    """What torchvision's own metadata ask for."""
    try:
        wanted = metadata.requires("torchvision") or []
    except metadata.PackageNotFoundError:
        return None
    found = (re.match(r"torch\s*\(?==\s*([\w.+]+)", text) for text in wanted)
    return next((match[1] for match in found if match), None)


# --- what is tried in processes of their own ----------------------------------------------------
#
# A probe's source is run by another Python. It yields the name of each check that begins, and then
# what the check found: (level, found) or (level, found, mend).


def probe_torch() -> Iterator[str | tuple]:
    """PyTorch, what it computes on, and how its processes talk."""
    yield "torch"
    import os

    import torch
    import torch.distributed as dist

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(count):
        torch.ones(2, device=f"cuda:{index}").sum().item()
        properties = torch.cuda.get_device_properties(index)
        with torch.cuda.device(index):
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            bf16 = "bf16" if bf16 else "no bf16: take run.amp=fp16"
        memory = f"{properties.total_memory / 2**30:.0f} GB"
        yield "ok", f"{torch.__version__}, cuda:{index} {properties.name}, {memory}, {bf16}"
    if not count:
        found = f"{torch.__version__}, CPU, {torch.get_num_threads()} threads"
        if os.path.exists("/proc/driver/nvidia/version"):
            yield (
                *("warning", f"{found}; there is an NVIDIA driver, and PyTorch has no use for it"),
                "nvidia-smi shows the CUDA version of the driver; install a PyTorch built for it, "
                "or a newer driver",
            )
        else:
            yield "ok", found
    yield "distributed"
    backends = [
        name
        for name in ("gloo", "nccl")
        if dist.is_available() and getattr(dist, f"is_{name}_available")()
    ]
    if ("nccl" if count else "gloo") in backends:
        yield "ok", ", ".join(backends)
    else:
        yield (
            *("problem", f"this PyTorch has {', '.join(backends) or 'no backend'}"),
            "python -m pip install --force-reinstall torch torchvision",
        )


def probe_package() -> Iterator[str | tuple]:
    """LAVIS, this package, and what it decodes and tokenises with."""
    yield "LAVIS"
    import contextlib
    import io
    import tempfile
    from pathlib import Path

    import lavis
    import lavis.models  # noqa: F401

    yield "ok", f"imports from {Path(lavis.__file__).parent}"

    yield "lavis_uniadapter"
    from lavis.common.registry import registry

    import lavis_uniadapter

    models = [name for name in registry.list_models() if name.startswith("blip_uniadapter_")]
    expected = [f"blip_uniadapter_{kind}" for kind in ("caption", "retrieval", "vqa")]
    if sorted(models) == expected:
        folder = Path(lavis_uniadapter.__file__).parent
        yield "ok", f"{lavis_uniadapter.__version__} in {folder} registers {', '.join(expected)}"
    else:
        yield "problem", f"registers {models or 'no model'}", "python -m pip install -e ."

    with tempfile.TemporaryDirectory() as folder:
        yield "video"
        import cv2
        import decord
        import numpy as np

        path = str(Path(folder) / "clip.mp4")
        writer = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*"mp4v"), 8, (64, 64))
        for _ in range(8):
            writer.write(np.full((64, 64, 3), (30, 60, 220), np.uint8))  # OpenCV's order: BGR
        writer.release()
        if not Path(path).is_file() or not Path(path).stat().st_size:
            # the package itself writes videos for its examples alone
            yield (
                *("warning", f"OpenCV {cv2.__version__} writes no mp4, so decoding was not tried"),
                "python -m pip install --force-reinstall --no-deps opencv-python-headless",
            )
        else:
            from lavis_uniadapter.processors.decoding import decode_frames

            frames = decode_frames(path, lambda number: [0, number - 1], 32)
            colour = frames.float().mean(dim=(0, 1, 2)).round().int().tolist()
            error = max(abs(a - b) for a, b in zip(colour, (220, 60, 30), strict=True))
            if tuple(frames.shape) == (2, 32, 32, 3) and error < 20:
                yield "ok", f"decord {decord.__version__} decodes"
            else:
                yield (
                    *("problem", f"decord {decord.__version__} decodes another colour: {colour}"),
                    "python -m pip install --force-reinstall --no-deps decord==0.6.0",
                )

    yield "image"
    import PIL
    from PIL import Image

    for kind in ("JPEG", "PNG"):
        file = io.BytesIO()
        Image.new("RGB", (32, 32), (220, 60, 30)).save(file, kind)
        Image.open(file).convert("RGB").load()
    yield "ok", f"pillow {PIL.__version__} decodes JPEG and PNG"

    yield "tokenizer"
    from transformers import BertTokenizer

    name = "bert-base-uncased"
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            BertTokenizer.from_pretrained(name, local_files_only=True)
        yield "ok", f"{name} is in the local cache"
    except (OSError, ValueError, TypeError, ImportError):  # as later releases say it
        yield (
            *("warning", f"{name} is not in the local cache; the first model will fetch it"),
            'python -c "from transformers import BertTokenizer; '
            f"BertTokenizer.from_pretrained('{name}')\", or set model.tokenizer to a folder that "
            "has its vocab.txt",
        )


def _report(probe: Callable[[], Iterator[str | tuple]]) -> None:
    """Run a probe and print what it yields, and whatever error ends it, as JSON lines."""
    import json
    import sys
    import traceback

    def tell(kind, content):
        print("\n[doctor] " + json.dumps({kind: content}), flush=True)

    try:
        for step in probe():
            tell("begins" if isinstance(step, str) else "found", step)
        tell("done", True)
    except Exception as error:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        where = next(
            (f for f in reversed(frames) if not f.f_code.co_filename.startswith("<")), frames[0]
        )
        culprit = getattr(error, "name", None) if isinstance(error, ImportError) else None
        tell(
            "failed",
            {
                "error": traceback.format_exception_only(error)[-1].strip(),
                "missing": isinstance(error, ModuleNotFoundError),
                "module": (culprit or where.f_globals.get("__name__", "")).split(".")[0],
                "file": where.f_code.co_filename,
            },
        )
        sys.exit(1)


def run_probe(probe: Callable[[], Iterator[str | tuple]]) -> Iterator[Finding]:
    """The findings of a probe, in whatever way its process ends."""
    source = f"{inspect.getsource(_report)}\n{inspect.getsource(probe)}"
    source = f"from __future__ import annotations\n{source}\n_report({probe.__name__})\n"
    check = probe.__name__.removeprefix("probe_")
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", source],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        mend = f"see where it hangs: python -X faulthandler -c 'import {check}'"
        yield Finding(PROBLEM, check, f"no answer in {SECONDS} seconds", mend)
        return
    steps = [
        json.loads(line.removeprefix("[doctor] "))
        for line in done.stdout.splitlines()
        if line.startswith("[doctor] ")
    ]
    for step in steps:
        if "begins" in step:
            check = step["begins"]
        elif "found" in step:
            level, found, *mend = step["found"]
            yield Finding(level, check, found, *mend)
        elif "failed" in step:
            failure = step["failed"]
            found = failure["error"].splitlines()[0]
            yield Finding(PROBLEM, check, f"{found} ({failure['file']})", mend_of(failure))
    if not steps or not {"done", "failed"} & steps[-1].keys():
        how = f"code {done.returncode}"
        if done.returncode < 0:
            how = signal.Signals(-done.returncode).name
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        yield Finding(PROBLEM, check, f"Python ended with {how}: {last[0]}", EITHER_SET)


def mend_of(failure: Mapping[str, Any]) -> str:
    """The command that mends an import that failed."""
    module, file = failure["module"], failure["file"]
    installed = {"site-packages", "dist-packages"} & set(Path(file).parts)
    if failure["missing"]:
        return install_command(module)
    if module in DISTRIBUTIONS and not installed and Path(file).stem in (module, "__init__"):
        return (
            f"{file} stands before the installed {module}: rename it, or take its folder off "
            "PYTHONPATH"
        )
    if module == "transformers":
        return EITHER_SET
    if module == "lavis":
        return f"{LAVIS_ALONE} --force-reinstall"
    if module in DISTRIBUTIONS:
        return f"{PIP} --force-reinstall --no-deps {DISTRIBUTIONS[module]}"
    return EITHER_SET


# --- the machine --------------------------------------------------------------------------------


def check_programs() -> Iterator[Finding]:
    """Java, for METEOR and COCO's tokenizer, and a C++ compiler, for ``run.compile``."""
    java = shutil.which("java")
    # a stub may be all there is: macOS has one that asks to install Java
    if java and not subprocess.run([java, "-version"], capture_output=True).returncode:
        yield Finding(OK, "Java", java)
    else:
        what = "not found: caption scores without METEOR, words split by this package's rules"
        yield Finding(WARNING, "Java", what, "apt-get install default-jre-headless")
    names = (os.environ.get("CXX"), "g++", "clang++", "c++")
    compiler = next(filter(None, (shutil.which(name) for name in names if name)), None)
    if compiler:
        yield Finding(OK, "C++ compiler", compiler)
    else:
        what = "not found: leave run.compile False on a CPU"
        yield Finding(WARNING, "C++ compiler", what, "apt-get install g++")


def check_space(folders: Mapping[str, Path], least: int = LEAST_DISK) -> Iterator[Finding]:
    """Free space for data, weights and temporary files, once a disk."""
    seen = set()
    for label, folder in folders.items():
        folder = folder.expanduser().absolute()
        while not folder.exists():
            folder = folder.parent
        if (device := folder.stat().st_dev) in seen:
            continue
        seen.add(device)
        free = shutil.disk_usage(folder).free
        found = f"{free / GB:.1f} GB free for {label} ({folder})"
        mend = f"make room, or move it: {MOVES[label]}"
        yield Finding(OK, "disk", found) if free >= least else Finding(WARNING, "disk", found, mend)


MOVES = {
    "data": "run.cache_root=/another/folder",
    "weights": "export TORCH_HOME=/another/folder",
    "temporary files": "export TMPDIR=/another/folder",
}


def check_shared_memory(
    folder: Path = Path("/dev/shm"), least: int = LEAST_SHARED_MEMORY
) -> Iterator[Finding]:
    """Shared memory, through which the DataLoader's workers hand over batches."""
    if not folder.is_dir():
        return
    total = shutil.disk_usage(folder).total
    found = f"{total / GB:.1f} GB ({folder})"
    if total >= least:
        yield Finding(OK, "shared memory", found)
    else:
        mend = "start the container with --shm-size=8g, or set run.num_workers=0"
        yield Finding(WARNING, "shared memory", found, mend)


def examine() -> Iterator[Finding]:
    """All findings, one after the other."""
    yield from check_versions(sys.version_info[:2], installed_versions(), torch_of_torchvision())
    yield from run_probe(probe_torch)
    yield from run_probe(probe_package)
    yield from check_programs()
    torch_home = os.environ.get("TORCH_HOME") or "~/.cache/torch"
    yield from check_space(
        {
            "data": Path("cache"),
            "weights": Path(torch_home),
            "temporary files": Path(tempfile.gettempdir()),
        }
    )
    yield from check_shared_memory()


def main() -> int:
    """Print all findings; 1 if one of them is a problem."""
    counts = dict.fromkeys((OK, WARNING, PROBLEM), 0)
    for finding in examine():
        counts[finding.level] += 1
        print(finding, flush=True)
    print(f"\n{counts[PROBLEM]} problem(s), {counts[WARNING]} warning(s)")
    return 1 if counts[PROBLEM] else 0


if __name__ == "__main__":
    sys.exit(main())
