"""What the doctor tries in a process of its own; see ``doctor.run_probes``.

A probe returns what it found, and and the fix, if one is needed. An error of any kind ends the
process, and the doctor reports it.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

MARK = "[doctor] "


def probe_torch() -> tuple[str, str]:
    """PyTorch computes, on each GPU if there are any, and its processes can communicate."""
    import torch
    import torch.distributed as dist

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(count):
        torch.ones(2, device=f"cuda:{index}").sum().item()
    names = ", ".join(torch.cuda.get_device_name(index) for index in range(count))
    found = f"{torch.__version__}, {names or f'CPU, {torch.get_num_threads()} threads'}"
    backend = "nccl" if count else "gloo"
    if not (dist.is_available() and getattr(dist, f"is_{backend}_available")()):
        raise RuntimeError(f"{found}, built without {backend}, which every run needs")
    if not count and os.path.exists("/proc/driver/nvidia/version"):
        fix = "install a PyTorch built for the CUDA version that nvidia-smi shows"
        return f"{found}; there is an NVIDIA driver that this PyTorch cannot use", fix
    return found, ""


def probe_lavis() -> tuple[str, str]:
    """LAVIS imports, and all that it imports."""
    import lavis
    import lavis.models  # noqa: F401

    return f"imports from {Path(lavis.__file__).parent}", ""


def probe_lavis_uniadapter() -> tuple[str, str]:
    """This package imports and registers its models."""
    from lavis.common.registry import registry

    import lavis_uniadapter.registration  # noqa: F401

    models = [name for name in registry.list_models() if name.startswith("blip_uniadapter_")]
    found = f"{lavis_uniadapter.__version__} registers {', '.join(sorted(models))}"
    return f"{found}, from {Path(lavis_uniadapter.__file__).parent}", ""


def probe_video() -> tuple[str, str]:
    """A video that OpenCV writes can be decoded."""
    import cv2
    import decord
    import numpy as np

    from lavis_uniadapter.processors.decoding import decode_frames

    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "clip.mp4")
        writer = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*"mp4v"), 8, (64, 64))
        for _ in range(8):
            writer.write(np.zeros((64, 64, 3), np.uint8))
        writer.release()
        if not Path(path).is_file():
            fix = "python -m pip install --force-reinstall --no-deps opencv-python-headless"
            return f"OpenCV {cv2.__version__} writes no mp4, so decoding was not tried", fix
        decode_frames(path, lambda number: [0, number - 1], 32)
    return f"decord {decord.__version__} decodes", ""


def probe_tokenizer() -> tuple[str, str]:
    """BERT's tokenizer is in the local cache."""
    from transformers import BertTokenizer

    name = "bert-base-uncased"
    try:
        BertTokenizer.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError, TypeError, ImportError):  # depends on the version
        get = f"BertTokenizer.from_pretrained('{name}')"
        fix = f'python -c "from transformers import BertTokenizer; {get}", or set model.tokenizer'
        return f"{name} is not in the local cache; the first model downloads it", fix
    return f"{name} is in the local cache", ""


def main() -> None:
    """Run the probes one after another; print each one's name, then what it returns."""
    for name, probe in (
        ("torch", probe_torch),
        ("LAVIS", probe_lavis),
        ("lavis_uniadapter", probe_lavis_uniadapter),
        ("video", probe_video),
        ("tokenizer", probe_tokenizer),
    ):
        print(f"\n{MARK}{name}", flush=True)
        found, fix = probe()
        print(f"\n{MARK}{found}\t{fix}", flush=True)


if __name__ == "__main__":
    main()
