"""What every tuned BLIP has in common: how it is built and loaded, and what of it trains."""

from __future__ import annotations

import copy
import inspect
import logging
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import BatchEncoding, BertTokenizer

from lavis_uniadapter.adapters.bank import AdapterBank, AdapterSet
from lavis_uniadapter.adapters.methods import TUNING_METHODS
from lavis_uniadapter.backbone.attach import attach_adapters, attach_deltas, geometry_of
from lavis_uniadapter.backbone.build import build_visual_encoder
from lavis_uniadapter.checkpoints import blip_files
from lavis_uniadapter.common import paths
from lavis_uniadapter.common.errors import CheckpointError, ConfigError, nearest
from lavis_uniadapter.common.schema import ModelSection
from lavis_uniadapter.common.schema.methods import MethodConfig
from lavis_uniadapter.models.adapter_verbs import DEFAULT_SET, AdapterVerbs

logger = logging.getLogger(__name__)


class TunedBlip(AdapterVerbs):
    """Mixin for LAVIS's BLIP models.

    A subclass takes its encoders and a tokenizer, as parameters of its constructor, and its options
    by keyword. It keeps encoders and heads under LAVIS's names. Class attributes that it sets:

    ``CONFIG``: the schema of its ``model:`` section.
    ``HEADS``: names of the modules that are trained whole.
    ``TEXT_MODE``: whether it ever encodes text alone.
    ``SETTINGS``: attributes, beside the configuration of its method, that decide what an adapter
    computes; adapter folders note them.
    """

    CONFIG: type[ModelSection]
    HEADS: tuple[str, ...] = ()
    TEXT_MODE = False
    SETTINGS: tuple[str, ...] = ("max_txt_len",)
    _frozen: frozenset[str] = frozenset()  # parameters that training leaves as they were built

    # --- building -------------------------------------------------------------------------------

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any]) -> TunedBlip:
        """Build from the ``model:`` section of a configuration.

        Raises:
            ConfigError: unknown key or impossible value, by name.
            CheckpointError: weights that do not fit, by name.
        """
        section = cls.CONFIG.read(cfg, "model")
        sizes = section.vit and section.vit.model_dump()
        visual_encoder = build_visual_encoder(
            section.vit_type, section.image_size, sizes, section.drop_path_rate
        )
        med_config = str(paths.find(section.med_config_path) or section.med_config_path)
        text_models = cls.build_text_models(med_config, visual_encoder.vision_width)
        vocab_size = next(iter(text_models.values())).config.vocab_size
        tokenizer = cls.build_tokenizer(section.tokenizer, vocab_size)
        parameters = inspect.signature(cls).parameters.values()
        options = {p.name: getattr(section, p.name) for p in parameters if p.kind is p.KEYWORD_ONLY}
        model = cls(visual_encoder, **text_models, tokenizer=tokenizer, **options)
        model.load_base(section.pretrained)
        model.attach_tuning(
            section.tuning,
            section.method_config,
            visual_checkpointing_layers=section.vit_ckpt_layer if section.vit_grad_ckpt else 0,
            textual_checkpointing_layers=section.text_ckpt_layer,
        )
        if section.load_finetuned:
            model.load_checkpoint(section.finetuned)
        if section.adapter_ckpt is not None:
            model.load_adapter(section.adapter_ckpt)
        return model

    @classmethod
    def build_text_models(cls, med_config: str, visual_width: int) -> dict[str, nn.Module]:
        """The constructor's ``text_encoder`` or ``text_decoder``, or both.

        Args:
            med_config: BERT configuration, a JSON file.
            visual_width: width of the visual tokens.
        """
        raise NotImplementedError

    @staticmethod
    def build_tokenizer(name_or_folder: str, vocab_size: int) -> BertTokenizer:
        """BERT's tokenizer with BLIP's ``[DEC]`` and ``[ENC]``.

        Args:
            name_or_folder: a folder with ``vocab.txt``, or a name on the hub.
            vocab_size: tokens that the text encoder or decoder knows.

        Raises:
            ConfigError: if it is neither, or it has more tokens.
        """
        folder = paths.find(name_or_folder)
        try:
            tokenizer = BertTokenizer.from_pretrained(
                str(folder) if folder else name_or_folder, local_files_only=folder is not None
            )
        # For a missing vocab.txt, later releases of transformers raise TypeError, or ImportError
        # because there is no protobuf to read another format with.
        except (OSError, ValueError, TypeError, ImportError) as error:
            reason = f" ({error})" if isinstance(error, OSError | ValueError) else ""
            raise ConfigError(
                f"model.tokenizer: no tokenizer at '{name_or_folder}'. Give a folder that holds "
                f"BERT's vocab.txt, or a hub name while online.{reason}"
            ) from error
        tokenizer.add_special_tokens({"bos_token": "[DEC]"})
        tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
        tokenizer.enc_token_id = tokenizer.additional_special_tokens_ids[0]
        if len(tokenizer) > vocab_size:
            raise ConfigError(
                f"The tokenizer has {len(tokenizer)} tokens and the text model's vocab_size is "
                f"{vocab_size}. Check model.tokenizer and model.med_config_path."
            )
        return tokenizer

    def load_base(self, source: str | None) -> None:
        """Load BLIP's weights (path or URL); None leaves them random.

        Raises:
            CheckpointError: unless every tensor of the backbone is there and fits.
        """
        self.base_changed("random weights" if source is None else os.path.basename(str(source)))
        self.randomly_initialised = ["everything"] if source is None else []
        if source is None:
            return
        state = blip_files.read_state_dict(source)
        self.comment_on_base(state)
        self.randomly_initialised = blip_files.load_base_state_dict(
            self,
            state,
            str(source),
            may_be_missing=(*(f"{head}." for head in self.HEADS), "temp"),
        )
        if self.randomly_initialised:
            logger.warning(
                "'%s' has no %s: they start at random values. A BLIP checkpoint of pre-training "
                "or retrieval has them.",
                self.base_name,
                ", ".join(self.randomly_initialised),
            )

    def comment_on_base(self, state: Mapping[str, torch.Tensor]) -> None:
        """Warn of a base checkpoint that fits in shape and was trained for something else."""

    def attach_tuning(
        self,
        tuning: str,
        method_config: MethodConfig,
        *,
        visual_checkpointing_layers: int = 0,
        textual_checkpointing_layers: int = 0,
    ) -> None:
        """Make the encoders adapter-aware, create what trains and freeze the rest.

        Args:
            tuning: a key of ``adapters.methods.TUNING_METHODS``.
            method_config: of the class that ``common.schema.methods.METHODS`` has for it.

        Raises:
            ConfigError: for an unknown method.
        """
        if tuning not in TUNING_METHODS:
            raise ConfigError(
                f"model.tuning is {tuning!r}.{nearest(tuning, TUNING_METHODS)} "
                f"Known: {', '.join(TUNING_METHODS)}."
            )
        set_cls = TUNING_METHODS[tuning]
        self.tuning = tuning
        self.method_config = method_config
        self.adapters = AdapterBank()
        attach_adapters(self, visual_checkpointing_layers, textual_checkpointing_layers)
        if set_cls is None:
            self.requires_grad_(True)
        else:
            adapter_set = self.new_adapter_set()
            self.adapters.add(DEFAULT_SET, adapter_set)
            attach_deltas(self, adapter_set)
            self.requires_grad_(False)
            adapter_set.requires_grad_(True)
        parameters = self.named_parameters(remove_duplicate=False)
        self._frozen = frozenset(name for name, p in parameters if not p.requires_grad)

    def text_encoders(self) -> dict[str, nn.Module]:
        """The BERT encoders that have adapters, by the names of their key/value adapters."""
        encoders = {}
        if hasattr(self, "text_encoder"):
            encoders["text_encoder"] = self.text_encoder
        if hasattr(self, "text_decoder"):
            encoders["text_decoder"] = self.text_decoder.bert
        return encoders

    def new_adapter_set(self) -> AdapterSet:
        """A fresh set of the model's tuning method, with copies of BLIP's heads."""
        heads = {name: copy.deepcopy(getattr(self, name)) for name in self.HEADS}
        set_cls = TUNING_METHODS[self.tuning]
        return set_cls(heads, self.method_config, geometry_of(self)).to(self.device)

    # --- computing ------------------------------------------------------------------------------

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that training changes, by name; each once."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def apply_head(self, name: str, states: torch.Tensor) -> torch.Tensor:
        """Apply the active adapter's own head, or BLIP's, to (..., width) states.

        In the head's own precision also under autocast: its output is compared and ranked, and
        bfloat16 would make many of the numbers equal.
        """
        active = self.adapters.active_set
        head = getattr(self, name) if active is None else active.heads[name]
        with torch.autocast(states.device.type, enabled=False):
            return head(states.to(head.weight.dtype))

    def on_device(self, tokens: BatchEncoding) -> BatchEncoding:
        """Tokens on the model's device. ``BatchEncoding.to`` would wait until it is idle."""
        tokens.data = {k: v.to(self.device, non_blocking=True) for k, v in tokens.items()}
        return tokens

    # --- checkpoints ----------------------------------------------------------------------------

    def load_checkpoint(self, url_or_filename):
        """Load what a runner saved, strictly (``lavis.models.BaseModel.load_checkpoint``).

        The frozen backbone may be absent; averages and queues too, or queues of another length.

        Raises:
            CheckpointError: naming what is missing, unexpected or misshapen.
        """
        blip_files.load_trained(self, str(url_or_filename))

    def load_state_dict(self, state_dict, strict=True, assign=False):
        """Load tensors by name (``torch.nn.Module``).

        With ``strict``, parameters that ``attach_tuning`` froze may be absent, and nothing else:
        LAVIS's runners do not save them, and load what they saved with this method.

        Raises:
            CheckpointError: with ``strict``, naming what is missing, unexpected or misshapen.
        """
        if strict:
            own = {
                name: value
                for name, value in self.state_dict().items()
                if name in state_dict or name not in self._frozen
            }
            if problems := blip_files.describe_mismatch(own, state_dict):
                raise CheckpointError(
                    f"These are not weights of this {type(self).__name__}: {problems}."
                )
        self._fingerprint = None
        return super().load_state_dict(state_dict, strict=False, assign=assign)
