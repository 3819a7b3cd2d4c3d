"""What every benchmark needs: interleaved timing, the machine's own limit, results on file."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch

RESULTS = Path(__file__).resolve().parent / "results"


def parser(description: str) -> argparse.ArgumentParser:
    """Options that every benchmark has."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--repeats", type=int, default=3, help="runs of each peer, interleaved")
    options.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON file")
    return options


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(work: Callable[[], object], device: str) -> float:
    """Wall-clock time of one call."""
    synchronise(device)
    started = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - started


def interleaved(
    peers: Mapping[str, Callable[[], float]], repeats: int
) -> dict[str, dict[str, float | list[float]]]:
    """Run each peer in turn, `repeats` times, so that a slow minute hits all of them alike.

    Args:
        peers: by name, work that returns the seconds it took.

    Returns:
        By name the seconds of every run and their median.
    """
    runs: dict[str, list[float]] = {name: [] for name in peers}
    for _ in range(repeats):
        for name, work in peers.items():
            runs[name].append(work())
    return {n: {"runs": taken, "median": statistics.median(taken)} for n, taken in runs.items()}


def autocast(bf16: bool, device: str) -> AbstractContextManager:
    """Inside, compute in bf16 as a run with ``amp: bf16`` does, or in float32."""
    return torch.autocast(device, dtype=torch.bfloat16, enabled=bf16)


def matmul_rate(device: str, dtype: torch.dtype = torch.float32) -> float:
    """GFLOP/s of large matrix products on this machine now."""
    size = 2048 if device == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    a @ b
    taken = [seconds(lambda: a @ b, device) for _ in range(9)]
    return 2 * size**3 / statistics.median(taken) / 1e9


class Limits:
    """Measures the machine's matrix-product rates, before and after what is done inside.

    No model can exceed them. ``rates``: GFLOP/s in float32 and, if asked for, in bf16.
    """

    def __init__(self, device: str, bf16: bool = False):
        self.device = device
        self.rates = {"matmul_gflop_per_s": 0.0}
        if bf16:
            self.rates["bf16_matmul_gflop_per_s"] = 0.0

    def __enter__(self):
        self._measure()
        return self

    def __exit__(self, *error):
        self._measure()

    def _measure(self) -> None:
        for name in self.rates:
            dtype = torch.bfloat16 if name.startswith("bf16") else torch.float32
            self.rates[name] += matmul_rate(self.device, dtype) / 2

    def share(self, peer: str, gflop: float, seconds: float) -> float:
        """The part of its limit that a peer reaches; one called "..., bf16" has its own."""
        limit = "bf16_matmul_gflop_per_s" if peer.endswith("bf16") else "matmul_gflop_per_s"
        return gflop / seconds / self.rates[limit]


def machine(device: str) -> dict[str, object]:
    """What the figures were measured on."""
    about: dict[str, object] = {
        "device": device,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "processor": _processor(),
    }
    if device == "cuda":
        about["gpu"] = torch.cuda.get_device_name()
    return about


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def save(name: str, result: Mapping, folder: Path) -> Path:
    """Write a result as JSON, named by benchmark and device."""
    folder.mkdir(parents=True, exist_ok=True)
    path = _path(name, result["machine"]["device"], folder)
    path.write_text(json.dumps(result, indent=2) + "\n")
    return path


def save_case(name: str, case: Mapping, key: str, device: str, folder: Path) -> Path:
    """Add a case to a benchmark's file, in place of an earlier one with the same ``case[key]``.

    Cases that take long need not be measured in one go, and a later one may run out of memory.
    """
    path = _path(name, device, folder)
    earlier = json.loads(path.read_text())["cases"] if path.is_file() else []
    cases = [other for other in earlier if other[key] != case[key]]
    cases.append({**case, "machine": machine(device)})
    cases.sort(key=lambda other: str(other[key]))
    return save(name, {"machine": machine(device), "cases": cases}, folder)


def _path(name: str, device: str, folder: Path) -> Path:
    return folder / f"{name}_{device}.json"


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table in columns as wide as they need to be."""
    cells = [list(header), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    for row in cells:
        first, *rest = (f"{cell:>{w}}" for cell, w in zip(row, widths, strict=True))
        print(f"{row[0]:<{widths[0]}}", *rest, sep="  ")


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float) and value < 1000:
        return f"{value:.3g}"
    return f"{value:,.0f}" if isinstance(value, int | float) else str(value)
