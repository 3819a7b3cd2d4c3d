"""What every tuned BLIP has in common: adapters, what trains, and the verbs to handle them."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
from collections.abc import Iterator, Mapping

import torch
from lavis.models.base_model import BaseModel
from torch import nn
from transformers import BatchEncoding, BertTokenizer

from lavis_uniadapter.adapters import AdapterBank, AdapterSet, MethodConfig
from lavis_uniadapter.adapters.methods import TUNING_METHODS, freeze_all_but, tuning_method
from lavis_uniadapter.backbone import (
    attach_adapters,
    attach_deltas,
    build_text_encoder,
    build_visual_encoder,
    geometry_of,
)
from lavis_uniadapter.checkpoints import adapter_files, blip_files
from lavis_uniadapter.common import lavis_versions, paths
from lavis_uniadapter.common.errors import CheckpointError, ConfigError
from lavis_uniadapter.common.schema import ModelSection

logger = logging.getLogger(__name__)
DEFAULT_SET = "default"


class TunedBlip(BaseModel):
    """Mixin for LAVIS's BLIP models.

    A subclass builds its encoders and heads under LAVIS's names, loads the base checkpoint and
    then calls ``attach_tuning``. Attributes it sets:

    ``CONFIG``: the schema of its ``model:`` section.
    ``HEADS``: names of the modules that are trained whole.
    ``TEXT_MODE``: whether it ever encodes text alone.
    ``SETTINGS``: attributes, beside the configuration of its method, that decide what an adapter
    computes; adapter folders note them.
    ``OUTPUT_LAYERS``: of a model that answers in words, the modules before its vocabulary.
    """

    CONFIG: type[ModelSection]
    HEADS: tuple[str, ...] = ()
    TEXT_MODE = False
    SETTINGS: tuple[str, ...] = ("max_txt_len",)
    OUTPUT_LAYERS: tuple[str, ...] = ()
    _frozen: frozenset[str] = frozenset()  # parameters that training leaves as they were built

    # --- building -------------------------------------------------------------------------------

    @staticmethod
    def build_visual_encoder(section: ModelSection) -> nn.Module:
        """LAVIS's visual encoder of a configuration."""
        sizes = section.vit and section.vit.model_dump()
        return build_visual_encoder(
            section.vit_type, section.image_size, sizes, section.drop_path_rate
        )

    @classmethod
    def build_encoders(cls, section: ModelSection) -> tuple[nn.Module, nn.Module, BertTokenizer]:
        """LAVIS's visual encoder and text encoder, and the tokenizer, of a configuration.

        Raises:
            ConfigError: naming what cannot be built.
        """
        visual_encoder = cls.build_visual_encoder(section)
        text_encoder = build_text_encoder(cls.med_config(section), visual_encoder.vision_width)
        tokenizer = cls.build_tokenizer(section.tokenizer, text_encoder.config.vocab_size)
        return visual_encoder, text_encoder, tokenizer

    @staticmethod
    def med_config(section: ModelSection) -> str:
        """Path of the BERT configuration that a model configuration names."""
        return str(paths.find(section.med_config_path) or section.med_config_path)

    def finish_building(self, section: ModelSection) -> None:
        """Load the base checkpoint, attach what trains, load what was trained.

        Raises:
            CheckpointError: weights that do not fit, by name.
        """
        self.load_base(section.pretrained)
        self.attach_tuning(
            section.tuning,
            section.method_config,
            visual_checkpointing_layers=section.vit_ckpt_layer if section.vit_grad_ckpt else 0,
            textual_checkpointing_layers=section.text_ckpt_layer,
        )
        if section.load_finetuned:
            self.load_checkpoint(section.finetuned)
        if section.adapter_ckpt is not None:
            self.load_adapter(section.adapter_ckpt)

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
        # Of a missing vocab.txt, later releases of transformers say TypeError, or that there is no
        # protobuf to read another format with.
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
        self.base_name = "random weights" if source is None else os.path.basename(str(source))
        self.randomly_initialised = [] if source is not None else ["everything"]
        if source is not None:
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
                    "'%s' has no %s: they start at random values. A BLIP checkpoint of "
                    "pre-training or retrieval has them.",
                    *(self.base_name, ", ".join(self.randomly_initialised)),
                )
        self._fingerprint = None

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

        Raises:
            ConfigError: for an unknown method.
        """
        method = tuning_method(tuning)
        self.tuning = tuning
        self.method_config = method_config
        self.adapters = AdapterBank()
        attach_adapters(
            self.adapters,
            self.visual_encoder,
            self._text_encoders(),
            visual_checkpointing_layers=visual_checkpointing_layers,
            textual_checkpointing_layers=textual_checkpointing_layers,
        )
        if method.set_cls is None:
            freeze_all_but(self, self)
        else:
            adapter_set = self._build_set()
            self.adapters.add(DEFAULT_SET, adapter_set)
            attach_deltas(self.adapters, self, adapter_set)
            freeze_all_but(self, adapter_set)
        parameters = self.named_parameters(remove_duplicate=False)
        self._frozen = frozenset(name for name, p in parameters if not p.requires_grad)

    def _text_encoders(self) -> dict[str, nn.Module]:
        """The BERT encoders that have adapters, by the names of their key/value adapters."""
        return {"text_encoder": self.text_encoder}

    def _build_set(self) -> AdapterSet:
        heads = {name: copy.deepcopy(getattr(self, name)) for name in self.HEADS}
        geometry = geometry_of(
            self,
            self.visual_encoder,
            self._text_encoders(),
            text_mode=self.TEXT_MODE,
            output_layers=self.OUTPUT_LAYERS,
        )
        set_cls = TUNING_METHODS[self.tuning].set_cls
        return set_cls(heads, self.method_config, geometry).to(self.device)

    # --- what trains ----------------------------------------------------------------------------

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that training changes, by name; each once."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def apply_head(self, name: str, states: torch.Tensor) -> torch.Tensor:
        """What a head makes of (..., width) states: the active adapter's own head, or BLIP's.

        In the head's own precision also under autocast. What it gives is compared and ranked, and
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

    def _trains(self, name: str) -> bool:
        """Whether a named adapter set is the one that training changes."""
        return any(p.requires_grad for p in self.adapters.get(name).parameters())

    def parameter_counts(self) -> dict[str, int]:
        """Numbers of parameters.

        ``adapters`` is the paper's count (bottlenecks alone), ``trainable`` all that is trained,
        ``backbone`` BLIP's encoders without heads, ``total`` everything.
        """
        active = self.adapters.active_set
        encoders = [self.visual_encoder, *self._text_encoders().values()]
        return {
            "adapters": sum(p.numel() for p in active.layer_parameters()) if active else 0,
            "trainable": sum(p.numel() for p in self.trainable_parameters().values()),
            "backbone": sum(p.numel() for p in nn.ModuleList(encoders).parameters()),
            "total": sum(p.numel() for p in self.parameters()),
        }

    def adapter_summary(self) -> str:
        """A table of what is loaded, what is active and what trains; its rows add up."""
        counts = self.parameter_counts()
        rows = [("backbone (frozen)" if self.tuning != "full" else "backbone", counts["backbone"])]
        other = counts["total"] - counts["backbone"]
        for name in self.adapters.names():
            adapter_set = self.adapters.get(name)
            mark = "active" if name == self.adapters.active else "loaded"
            parts = {
                adapter_set.KIND: list(adapter_set.layer_parameters()),
                "key/value adapters": list(adapter_set.key_value.parameters()),
                "heads": list(adapter_set.heads.parameters()),
            }
            for part, parameters in parts.items():
                number = sum(p.numel() for p in parameters)
                other -= number
                if number:
                    rows.append((f"{name} ({mark}): {part}", number))
        rows.append(("BLIP's heads" + (" (frozen)" if self.tuning != "full" else ""), other))
        rows.append(("total", counts["total"]))
        rows.append(("trained", counts["trainable"]))
        width = max(len(label) for label, _ in rows)
        lines = [f"{'':{width}}  {'parameters':>12}  share"]
        lines += [
            f"{label:{width}}  {number:>12,}  {100 * number / counts['total']:5.2f}%"
            for label, number in rows
        ]
        if counts["adapters"]:
            share = 100 * counts["adapters"] / counts["backbone"]
            lines.append(f"the paper's count: adapters over backbone {share:.2f}%")
        return "\n".join(lines)

    # --- adapters as things of their own --------------------------------------------------------

    @property
    def base_fingerprint(self) -> str:
        """Hash of the frozen BLIP under the adapters, computed once."""
        if self._fingerprint is None:
            self._fingerprint = blip_files.fingerprint(self, self.randomly_initialised)
        return self._fingerprint

    def base_changed(self, name: str) -> None:
        """Tell the model that its BLIP weights have been replaced."""
        self.base_name = name
        self._fingerprint = None

    def save_adapter(
        self, folder: str | os.PathLike, metrics: Mapping[str, float] | None = None
    ) -> None:
        """Write the active adapter: its tensors, what they are, and a model card.

        ``adapter.safetensors``, ``adapter_config.json`` and ``README.md``; see ``adapter_files``.

        Raises:
            ConfigError: with ``tuning: full``, which has no adapter.
        """
        adapter_files.save(self, folder, metrics or {})

    def load_adapter(
        self, folder: str | os.PathLike, name: str = DEFAULT_SET, force: bool = False
    ) -> None:
        """Read an adapter folder into the set ``name`` (made if need be) and activate it.

        Args:
            force: load although it was trained on another base checkpoint.

        Raises:
            CheckpointError: if anything about it does not fit this model.
        """
        adapter_files.load(self, folder, name, force)
        self.set_adapter(name)

    def set_adapter(self, name: str) -> None:
        """Make a loaded adapter the one that the model computes with, for all threads.

        Raises:
            KeyError: if no adapter has that name.
        """
        self.adapters.activate(name)

    def delete_adapter(self, name: str) -> None:
        """Forget a loaded adapter and free its memory.

        Raises:
            KeyError: if no adapter has that name.
            ValueError: for the active one, and for the one that training changes.
        """
        if self._trains(name):
            raise ValueError(
                f"'{name}' is the adapter that this model trains, so it stays. Load what is to be "
                "deleted later under another name."
            )
        self.adapters.remove(name)

    def merge_adapter(self) -> None:
        """Fold the active adapter into BLIP itself, heads included, and keep no adapter at all.

        The model computes what it computed, at a plain BLIP's cost; its state dict is one that
        LAVIS's own models load.

        Raises:
            ConfigError: for a method whose adapters stand beside BLIP's layers.
        """
        active = self.adapters.active_set
        if active is None:
            raise ConfigError("There is no active adapter to merge.")
        beside = {id(p) for p in (*active.layer_parameters(), *active.key_value.parameters())}
        if active.frame_aware or beside - {id(p) for p in active.deltas.parameters()}:
            raise ConfigError(
                f"Adapters of tuning '{self.tuning}' stand beside BLIP's layers and cannot be "
                "folded into its weights. LoRA, BitFit and linear heads can."
            )
        for key, delta in active.deltas.items():
            delta.fold_into(self.get_submodule(key.replace("/", ".")))
        for name, head in active.heads.items():
            getattr(self, name).load_state_dict(head.state_dict())
        self.adapters.clear()
        self._frozen = frozenset()
        self.base_changed(f"{self.base_name} with '{self.tuning}' merged")

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside, the model is the BLIP it was built on, heads included."""
        with self.adapters.disabled():
            yield

    def reset_momentum(self) -> None:
        """Restart moving averages, where the model has any, from the present parameters."""

    # --- LAVIS ----------------------------------------------------------------------------------

    def get_optimizer_params(self, weight_decay: float, lr_scale: float = 1) -> list[dict]:
        """Parameter groups of what trains, for the runner of LAVIS's main branch."""
        return lavis_versions.optimizer_params(
            self.trainable_parameters().values(), weight_decay, lr_scale
        )

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
