"""``uniadapter doctor``: whether this environment works, one line a check.

Exits with 1 if something would fail. It imports the standard library alone and tries everything
else in another process, so that it works in environments in which something does not import.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from uniadapter_cli.probes import MARK

OK, WARNING, PROBLEM = "ok", "warning", "problem"
TIMEOUT = 600  # seconds; the first import after an installation, on a slow disk
GB = 2**30

PIP = "python -m pip install"
LAVIS_ALONE = f"{PIP} --no-deps salesforce-lavis==1.0.2"
LAVIS_SET = f"{PIP} -e . -c constraints/lavis.txt"
MODERN_SET = f"{PIP} -r constraints/modern.txt && {PIP} --no-deps -e . salesforce-lavis==1.0.2"
EITHER_SET = f"in a fresh environment, {LAVIS_SET} or {MODERN_SET}"
# Modules that a distribution of another name brings.
OPENCVS = ("opencv-python-headless", "opencv-python", "opencv-contrib-python-headless")
DISTRIBUTIONS = {
    "cv2": "opencv-python-headless",
    "skimage": "scikit-image",
    "PIL": "pillow",
    "yaml": "PyYAML",
}
SHOWN = ("torch", "torchvision", "transformers", "timm", "numpy", "opencv-python-headless")
# The first releases that were built for NumPy 2.
BUILT_FOR_NUMPY_2 = {"transformers": (4, 41), "opencv-python-headless": (4, 10), "torch": (2, 3)}


@dataclass(frozen=True)
class Finding:
    """What one check found; a problem or a warning has a fix."""

    level: str
    check: str
    found: str
    fix: str = ""

    def __str__(self) -> str:
        line = f"{self.level:8} {self.check:17} {self.found}"
        return f"{line}\n{'':8} -> {self.fix}" if self.fix else line


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version: ``2.14.1+cpu`` is (2, 14, 1)."""
    return tuple(map(int, re.findall(r"\d+", version.split("+", maxsplit=1)[0])[:3]))


def normalise(name: str) -> str:
    """A distribution's name in the one spelling that stands for all."""
    return re.sub(r"[-_.]+", "-", name).lower()


def check_sets(python: tuple[int, int], versions: Mapping[str, str]) -> Iterator[Finding]:
    """Which of the tested sets of dependencies this is, and what no requirement declares.

    Args:
        python: this Python's version.
        versions: by distribution.
    """
    name = ".".join(map(str, python))
    transformers = release(versions.get("transformers", ""))
    lavis_set = (4, 25) <= transformers < (4, 27)
    if not (3, 10) <= python < (3, 14):
        yield Finding(PROBLEM, "Python", name, "use Python 3.10 to 3.13")
    elif lavis_set and python >= (3, 12):
        yield Finding(PROBLEM, "Python", f"{name}, too new for LAVIS's own pins", MODERN_SET)
    else:
        yield Finding(OK, "Python", name)
    shown = ", ".join(f"{name} {versions[name]}" for name in SHOWN if name in versions)
    if lavis_set or (4, 50) <= transformers < (4, 57):
        which = "lavis" if lavis_set else "modern"
        yield Finding(OK, "dependencies", f"the set '{which}': {shown}")
    else:
        yield Finding(WARNING, "dependencies", f"neither of the tested sets: {shown}", EITHER_SET)
    old = [
        f"{name} {versions[name]}"
        for name, least in BUILT_FOR_NUMPY_2.items()
        if name in versions and release(versions[name]) < least
    ]
    if release(versions.get("numpy", "")) >= (2,) and old:
        found = f"{versions['numpy']}, and built for NumPy 1: {', '.join(old)}"
        yield Finding(PROBLEM, "numpy", found, f"{PIP} 'numpy<2'")


def check_requirements(
    requirements: Mapping[str, Sequence[str]], versions: Mapping[str, str]
) -> Iterator[Finding]:
    """Installed versions against the requirements that distributions declare."""
    try:
        from packaging.requirements import Requirement
    except ModuleNotFoundError:
        yield Finding(PROBLEM, "packaging", "not installed", f"{PIP} packaging")
        return
    for name, texts in requirements.items():
        for requirement in map(Requirement, texts):
            applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            # the modern set has NumPy 2 on any Python
            if not applies or requirement.name == "numpy":
                continue
            names = OPENCVS if requirement.name in OPENCVS else (requirement.name,)
            version = next(filter(None, (versions.get(normalise(n)) for n in names)), None)
            if version is None or not requirement.specifier.contains(version, prereleases=True):
                found = f"{version or 'missing'}, and {name} needs {requirement}"
                fix = f"{PIP} '{requirement.name}{requirement.specifier}'"
                if requirement.name == "salesforce-lavis":
                    fix = LAVIS_ALONE
                yield Finding(PROBLEM, requirement.name, found, fix)


def installed() -> tuple[dict[str, list[str]], dict[str, str]]:
    """Declared requirements of what fits together least, and all installed versions."""
    versions = {normalise(d.name): d.version for d in metadata.distributions() if d.name}
    names = ("lavis-uniadapter", "transformers", "torchvision")
    return {name: metadata.requires(name) or [] for name in names if name in versions}, versions


def install_command(module: str) -> str:
    """The command that installs a missing module."""
    return LAVIS_ALONE if module == "lavis" else f"{PIP} {DISTRIBUTIONS.get(module, module)}"


def run_probes() -> Iterator[Finding]:
    """Run `probes.main` in another process; the probe in which that ends is a problem."""
    command = [sys.executable, "-W", "ignore", "-m", "uniadapter_cli.probes"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        yield Finding(PROBLEM, "imports", f"no answer in {TIMEOUT} seconds", EITHER_SET)
        return
    lines = [line.removeprefix(MARK) for line in done.stdout.splitlines() if line.startswith(MARK)]
    for check, answer in zip(lines[::2], lines[1::2], strict=False):
        found, fix = answer.split("\t")
        yield Finding(WARNING if fix else OK, check, found, fix)
    if done.returncode:
        check = lines[-1] if len(lines) % 2 else "imports"
        yield Finding(PROBLEM, check, *explain(done.returncode, done.stderr))


def explain(status: int, stderr: str) -> tuple[str, str]:
    """What ended a process, by its traceback, and the fix."""
    said = stderr.strip().splitlines()[-1:] or ["no message"]
    files = re.findall(r'^  File "([^<"]+)"', stderr, re.MULTILINE)
    if status < 0 or not files:
        how = signal.Signals(-status).name if status < 0 else f"code {status}"
        return f"Python ended with {how}: {said[0]}", EITHER_SET
    found = f"{said[0]} ({files[-1]})"
    if missing := re.match(r"ModuleNotFoundError: No module named '(\w+)", said[0]):
        return found, install_command(missing[1])
    if installed := re.search(r"(?:site|dist)-packages/(\w+)", files[-1].replace(os.sep, "/")):
        module = installed[1]
        reinstall = f"{install_command(module)} --force-reinstall --no-deps"
        return found, EITHER_SET if module == "transformers" else reinstall
    path = Path(files[-1])
    module = path.parent.name if path.stem == "__init__" else path.stem
    if module in metadata.packages_distributions():
        return found, f"{path} hides the installed {module}: rename it or change PYTHONPATH"
    return found, EITHER_SET


def check_machine() -> Iterator[Finding]:
    """Optional programs, disk space and shared memory."""
    for label, names, effect, package in (
        ("Java", ["java"], "captions are scored without METEOR", "default-jre-headless"),
        ("C++ compiler", ["g++", "clang++", "c++"], "leave run.compile False on a CPU", "g++"),
    ):
        if program := next(filter(None, map(shutil.which, names)), None):
            yield Finding(OK, label, program)
        else:
            yield Finding(WARNING, label, f"not found: {effect}", f"apt-get install {package}")
    weights = Path(os.environ.get("TORCH_HOME") or "~/.cache/torch").expanduser()
    for label, folder, least, fix in (
        ("disk, data", Path("cache"), 5 * GB, "set run.cache_root to another folder"),
        ("disk, weights", weights, 5 * GB, "set TORCH_HOME to another folder"),
        ("shared memory", Path("/dev/shm"), GB, "docker run --shm-size=8g, or run.num_workers=0"),
    ):
        place = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
        free = shutil.disk_usage(place).free
        enough = free >= least or (label == "shared memory" and place != folder)
        found = f"{free / GB:.1f} GB free ({place})"
        yield Finding(OK if enough else WARNING, label, found, "" if enough else fix)


def examine() -> Iterator[Finding]:
    """All findings, one after another."""
    requirements, versions = installed()
    yield from check_sets(sys.version_info[:2], versions)
    yield from check_requirements(requirements, versions)
    yield from run_probes()
    yield from check_machine()


def main(argv: Sequence[str] | None = None) -> int:
    """Print all findings; 1 if one of them is a problem."""
    argparse.ArgumentParser(prog="uniadapter doctor", description=__doc__).parse_args(argv)
    levels = []
    for finding in examine():
        levels.append(finding.level)
        print(finding, flush=True)
    print(f"\n{levels.count(PROBLEM)} problem(s), {levels.count(WARNING)} warning(s)")
    return 1 if PROBLEM in levels else 0


if __name__ == "__main__":
    sys.exit(main())
