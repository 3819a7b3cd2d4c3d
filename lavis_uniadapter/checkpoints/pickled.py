"""Reading what ``torch.save`` wrote, with an error that says what is wrong with a file."""

from __future__ import annotations

import os
import re
import zipfile
from typing import Any

import torch

from lavis_uniadapter.common.errors import CheckpointError, ConfigError


def load(path: str | os.PathLike, again: str = "Copy or download it again.") -> Any:
    """Read tensors and plain containers to the CPU; nothing else is unpickled.

    Args:
        again: how to get an undamaged file.

    Raises:
        CheckpointError: if the file is damaged, or holds anything else.
        ConfigError: if there is no permission to read it, or too little memory.
    """
    if os.path.getsize(path) == 0:
        raise CheckpointError(f"'{path}' is empty (0 bytes). {again}")
    try:
        if zipfile.is_zipfile(path):  # torch does not compare checksums
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise ValueError(f"'{damaged}' in it is damaged")
        return torch.load(path, map_location="cpu", weights_only=True)
    except (PermissionError, MemoryError) as error:  # which say nothing about its content
        reason = str(error) or "out of memory"
        raise ConfigError(f"'{path}' cannot be read: {reason}.") from error
    except Exception as error:
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            raise CheckpointError(
                f"'{path}' is refused: besides tensors it holds '{found[1]}', which could run any "
                "code. Ask its author for the tensors alone: torch.save(model.state_dict(), FILE)."
            ) from error
        raise CheckpointError(
            f"'{path}' is not a PyTorch checkpoint, or is damaged. {again}"
        ) from error
