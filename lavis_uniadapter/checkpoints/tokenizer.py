"""BERT's tokenizer, from a folder, the local cache or the hub."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from ssl import SSLError
from urllib.error import HTTPError
from urllib.request import Request

from huggingface_hub import constants
from transformers import BertTokenizer

from lavis_uniadapter.checkpoints.download import open_url
from lavis_uniadapter.common import paths
from lavis_uniadapter.common.errors import ConfigError

HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
NEEDED = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
# For a missing vocab.txt, later releases of transformers raise TypeError or ImportError.
NOT_FOUND = (OSError, ValueError, TypeError, ImportError)


def build_tokenizer(name_or_folder: str, vocab_size: int) -> BertTokenizer:
    """BERT's tokenizer with BLIP's ``[DEC]`` and ``[ENC]``.

    Raises:
        ConfigError: if there is none, or its vocabulary does not fit.
    """
    folder = paths.find(name_or_folder)
    if folder is None and not HUB_NAME.fullmatch(name_or_folder):
        raise ConfigError(f"model.tokenizer: no tokenizer at '{name_or_folder}': no such folder.")
    tokenizer = _from_hub(name_or_folder) if folder is None else _from_folder(folder)
    if missing := [token for token in NEEDED if token not in tokenizer.vocab]:
        raise ConfigError(
            f"model.tokenizer: the vocabulary of '{name_or_folder}' has {len(tokenizer.vocab)} "
            f"tokens and lacks {', '.join(missing)}. Give a folder with a whole vocab.txt of BERT."
        )
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    tokenizer.enc_token_id = tokenizer.additional_special_tokens_ids[0]
    if len(tokenizer) > vocab_size:
        raise ConfigError(
            f"The tokenizer has {len(tokenizer)} tokens and the text model's vocab_size is "
            f"{vocab_size}. Check model.tokenizer and model.med_config_path."
        )
    return tokenizer


def _from_folder(folder: Path) -> BertTokenizer:
    try:
        return BertTokenizer.from_pretrained(str(folder), local_files_only=True)
    except NOT_FOUND as error:
        raise ConfigError(
            f"model.tokenizer: '{folder}' holds no tokenizer. Give a folder that holds BERT's "
            f"vocab.txt. ({_first_line(error)})"
        ) from error


def _from_hub(name: str) -> BertTokenizer:
    """From the local cache if it is there; the hub is asked only if it answers at all."""
    try:
        return BertTokenizer.from_pretrained(name, local_files_only=True)
    except NOT_FOUND as error:
        reason = f"HF_HUB_OFFLINE is set: {_first_line(error)}"
    if not constants.HF_HUB_OFFLINE:
        try:
            _reach(constants.ENDPOINT)
            return BertTokenizer.from_pretrained(name)
        except NOT_FOUND as error:
            reason = f"{constants.ENDPOINT}: {_first_line(error)}"
    raise ConfigError(
        f"model.tokenizer: '{name}' is not a folder, is not in the hub's local cache, and cannot "
        f"be downloaded ({reason}). Give the path of a folder that holds BERT's vocab.txt, or run "
        "once while online and without HF_HUB_OFFLINE=1."
    )


def _reach(endpoint: str) -> None:
    """Raise OSError if a server does not answer; the hub's client would try for minutes."""
    # Errors of HTTP are answers, too. The hub's client has certificates of its own.
    with contextlib.suppress(HTTPError, SSLError):
        open_url(Request(endpoint, method="HEAD")).close()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
