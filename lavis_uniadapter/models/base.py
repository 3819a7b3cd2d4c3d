"""What every tuned BLIP has in common: how it is built, what of it trains, and its adapters."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from lavis.models.base_model import BaseModel
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import BatchEncoding, BertTokenizer

from lavis_uniadapter.adapters.bank import AdapterBank, AdapterSet
from lavis_uniadapter.adapters.methods import TUNING_METHODS
from lavis_uniadapter.backbone.attach import attach_adapters, attach_deltas, geometry_of
from lavis_uniadapter.backbone.build import build_visual_encoder
from lavis_uniadapter.backbone.features import text_list, visual_input
from lavis_uniadapter.backbone.vision import encode_frames
from lavis_uniadapter.backbone.visual_memory import VisualMemory
from lavis_uniadapter.checkpoints import adapter_files, blip_files, identity
from lavis_uniadapter.checkpoints.tokenizer import build_tokenizer
from lavis_uniadapter.common import lavis_versions, paths
from lavis_uniadapter.common.errors import CheckpointError, ConfigError
from lavis_uniadapter.common.schema import ModelSection

logger = logging.getLogger(__name__)

DEFAULT_SET = "default"  # the adapter set that training changes


class TunedBlip(BaseModel):
    """Mixin for LAVIS's BLIP models, built from a ``model:`` section; it keeps LAVIS's names."""

    CONFIG: type[ModelSection]
    HEADS: tuple[str, ...] = ()  # modules that are trained whole
    TEXT_MODE = False  # whether the model ever encodes text alone
    # Attributes that decide what an adapter computes, noted in adapter folders.
    SETTINGS: tuple[str, ...] = ("max_txt_len",)
    build_tokenizer = staticmethod(build_tokenizer)
    _frozen: frozenset[str] = frozenset()  # parameters that training leaves as they were built
    _hashed: tuple[int | None, str] = None, ""  # see adapter_state
    _changes = 0  # of any model that do not count in a parameter's version

    # --- building -------------------------------------------------------------------------------

    def __init__(self, section: ModelSection, tokenizer: BertTokenizer | None = None):
        lavis_versions.init_blip(self)  # LAVIS's constructors load a tokenizer from the hub
        self.section = section
        self.max_txt_len = section.max_txt_len
        sizes = section.vit and section.vit.model_dump()
        self.visual_encoder = build_visual_encoder(
            section.vit_type, section.image_size, sizes, section.drop_path_rate
        )
        med_config = str(paths.find(section.med_config_path) or section.med_config_path)
        self.build_text_models(med_config, self.visual_encoder.vision_width)
        vocab_size = next(iter(self.text_encoders().values())).config.vocab_size
        self.tokenizer = tokenizer or self.build_tokenizer(section.tokenizer, vocab_size)
        self.base_changed("random weights")
        self.randomly_initialised = ["everything"]  # names of weights that no checkpoint had

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any]) -> TunedBlip:
        """Build with weights and adapters; ConfigError or CheckpointError for what does not fit."""
        section = cls.CONFIG.read(cfg, "model")
        model = cls(section)
        if section.pretrained is not None:
            model.load_base(section.pretrained)
        model.attach_tuning()
        if section.load_finetuned:
            model.load_checkpoint(section.finetuned)
        if section.adapter_ckpt is not None:
            model.load_adapter(section.adapter_ckpt, force=section.force)
        return model

    def build_text_models(self, med_config: str, visual_width: int) -> None:
        """Set ``text_encoder`` or ``text_decoder``, or both, by BERT's JSON configuration."""
        raise NotImplementedError

    def load_base(self, source: str) -> None:
        """Load BLIP's weights from a path or URL; CheckpointError unless the backbone is whole."""
        state = blip_files.read_state_dict(source)
        may_be_missing = (*(f"{head}." for head in self.HEADS), "temp")
        self.base_changed(os.path.basename(source))
        self.comment_on_base(state)
        saved = identity.of_checkpoint(source)
        if saved.vocabulary:  # a run of full tuning wrote it
            now = identity.Identity(vocabulary=identity.of_model(self).vocabulary)
            identity.check(saved, now, source, self.section.force)
        self.randomly_initialised = blip_files.load_base_state_dict(
            self, state, source, may_be_missing
        )
        # at its own image size, so that it does not depend on the model's
        self._fingerprint = blip_files.hash_tensors(blip_files.base_part(self, state))
        if self.randomly_initialised:
            logger.warning(
                "'%s' has no %s: they start at random values. A BLIP checkpoint of pre-training "
                "or retrieval has them.",
                *(self.base_name, ", ".join(self.randomly_initialised)),
            )

    def comment_on_base(self, state: Mapping[str, Tensor]) -> None:
        """Warn of a base checkpoint that fits in shape and was trained for something else."""

    def base_changed(self, name: str) -> None:
        """Note that the model's BLIP weights have been replaced."""
        self.base_name = name
        self._fingerprint: str | None = None

    @property
    def base_fingerprint(self) -> str:
        """Hash of BLIP's values in float32, without those that no checkpoint had.

        Computed once, before the model's precision changes, and again when BLIP has changed.
        """
        if self._fingerprint is None:
            base = blip_files.base_state_dict(self)
            self._fingerprint = blip_files.hash_tensors(
                {k: v for k, v in base.items() if k not in self.randomly_initialised}
            )
        return self._fingerprint

    def _apply(self, fn, recurse=True):
        """Convert all tensors (``torch.nn.Module``), to float16 for example."""
        _ = self.base_fingerprint
        return super()._apply(fn, recurse)

    def attach_tuning(self) -> None:
        """Make the encoders adapter-aware, create what ``model.tuning`` trains, freeze the rest."""
        section = self.section
        self.tuning, self.method_config = section.tuning, section.method_config
        self.adapters = AdapterBank()
        visual_layers = section.vit_ckpt_layer if section.vit_grad_ckpt else 0
        attach_adapters(self, visual_layers, section.text_ckpt_layer)
        if TUNING_METHODS[self.tuning] is None:
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
        parts = {name: getattr(self, name, None) for name in ("text_encoder", "text_decoder")}
        return {name: getattr(part, "bert", part) for name, part in parts.items() if part}

    def new_adapter_set(self) -> AdapterSet:
        """A fresh set of the model's tuning method, with copies of BLIP's heads."""
        heads = {name: copy.deepcopy(getattr(self, name)) for name in self.HEADS}
        set_cls = TUNING_METHODS[self.tuning]
        return set_cls(heads, self.method_config, geometry_of(self)).to(self.device)

    # --- computing ------------------------------------------------------------------------------

    def forward(self, samples: Mapping[str, Any]):
        """Loss of a batch; see LAVIS's model."""
        self.check_training()
        return super().forward(samples)

    def check_training(self) -> None:
        """ValueError in training mode unless the adapter that trains is active."""
        active = self.adapters.active
        if self.training and self.adapters and not (active and self._trains(active)):
            raise ValueError(
                f"The active adapter is {active!r}, not the one that trains. Call "
                f"set_adapter('{DEFAULT_SET}') first."
            )

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that training changes, by name; each once."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def apply_head(self, name: str, states: Tensor) -> Tensor:
        """Apply the active adapter's own head, or BLIP's, to (..., width) states.

        Under autocast it keeps its precision: its output is ranked, and bfloat16 would make ties.
        """
        active = self.adapters.active_set
        head = getattr(self, name) if active is None else active.heads[name]
        with torch.autocast(states.device.type, enabled=False):
            return head(states.to(head.weight.dtype))

    def tokenize(
        self, texts: Sequence[str], padding: str = "longest", truncation: bool = True
    ) -> BatchEncoding:
        """Token ids and mask, cut at ``max_txt_len`` tokens, on the model's device."""
        tokens = self.tokenizer(
            text_list(texts, "texts"),
            padding=padding,
            truncation=truncation,
            max_length=self.max_txt_len if truncation else None,
            return_tensors="pt",
        )
        # BatchEncoding.to would wait until the device is idle.
        tokens.data = {k: v.to(self.device, non_blocking=True) for k, v in tokens.items()}
        return tokens

    def visual_tokens(self, samples: Mapping[str, Any]) -> Tensor:
        """(batch, frames * tokens, width) of ``image`` or ``video``; see ``visual_input``."""
        return encode_frames(self.visual_encoder, visual_input(samples)).flatten(1, 2)

    @torch.no_grad()
    def generate_texts(
        self, prompt_ids: Tensor, memory: VisualMemory, *, num_return_sequences: int = 1, **options
    ) -> list[str]:
        """Continue (items, length) prompts; ``options`` are those of transformers' ``generate``."""
        most = self.text_decoder.config.max_position_embeddings
        shortest, longest = options["min_length"], options["max_length"]
        rows = num_return_sequences if options.get("do_sample") else options.get("num_beams", 1)
        if not (0 <= shortest <= longest <= most and 1 <= num_return_sequences <= rows):
            raise ConfigError(
                f"Cannot write {num_return_sequences} texts of {shortest} to {longest} tokens with "
                f"num_beams {rows}: at most {most} tokens, and at least 1 text and 1 beam for it."
            )
        items = torch.arange(len(prompt_ids), device=prompt_ids.device)
        output = self.text_decoder.generate(
            input_ids=prompt_ids,
            attention_mask=torch.ones_like(prompt_ids),
            # transformers repeats tensors for beams; what is not a tensor it passes on as it is
            encoder_hidden_states=memory.pairs(items.repeat_interleave(rows)),
            num_return_sequences=num_return_sequences,
            eos_token_id=self.tokenizer.sep_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
            **options,
        )
        continuations = output[:, prompt_ids.shape[1] :]
        return self.tokenizer.batch_decode(continuations, skip_special_tokens=True)

    # --- adapters -------------------------------------------------------------------------------

    def save_adapter(
        self, folder: str | os.PathLike, metrics: Mapping[str, float] | None = None
    ) -> None:
        """Write the active adapter; see ``checkpoints.adapter_files``."""
        adapter_files.save(self, folder, metrics or {})

    def load_adapter(
        self, folder: str | os.PathLike, name: str = DEFAULT_SET, force: bool = False
    ) -> None:
        """Read an adapter folder into a new or existing set, and activate it.

        Args:
            force: load although it was trained on another base checkpoint or vocabulary.

        Raises:
            CheckpointError: if anything else about it does not fit this model.
            KeyError: for an impossible name.
        """
        adapter_files.load(self, folder, name, force)
        self.set_adapter(name)
        if self._trains(name):
            self.reset_momentum()

    def set_adapter(self, name: str) -> None:
        """Activate a loaded adapter, for all threads; KeyError if no adapter has that name."""
        self.adapters[name]
        self.adapters.active = name

    def adapter_state(self) -> str:
        """Identifies what features are computed with: the values of the active adapter, or BLIP's.

        In training, where hashing each step would take too long, it counts changes instead.
        """
        active = self.adapters.active_set
        owner = self if active is None else active
        counts = (0 if p.is_inference() else p._version for p in owner.parameters())
        version = sum(counts, start=TunedBlip._changes)
        if self.training:
            return f"training: {id(owner)}, {version}"
        if owner._hashed[0] != version:
            tensors = blip_files.base_state_dict(self) if active is None else active.state_dict()
            owner._hashed = version, blip_files.hash_tensors(tensors)
        return owner._hashed[1]

    def delete_adapter(self, name: str) -> None:
        """Remove a loaded adapter; ValueError for the active one and the one that trains."""
        if self._trains(name) or name == self.adapters.active:
            raise ValueError(
                f"'{name}' is active or the adapter that trains, and cannot be deleted. Activate "
                "another one first; the adapter that trains stays."
            )
        del self.adapters[name]

    def _trains(self, name: str) -> bool:
        """Whether a named adapter set is the one that training changes."""
        return any(p.requires_grad for p in self.adapters[name].parameters())

    @torch.no_grad()
    def merge_adapter(self) -> None:
        """Fold the active adapter into BLIP itself, heads included, and remove all adapters.

        The result has a plain BLIP's cost, and a state dict that LAVIS's own models load.

        Raises:
            ConfigError: for a method whose adapters are modules beside BLIP's layers.
        """
        active = self.adapters.active_set
        if active is None:
            raise ConfigError("There is no active adapter to merge.")
        beside = {*active.layer_parameters(), *active.key_value.parameters()}
        if active.frame_aware or beside - {*active.deltas.parameters()}:
            raise ConfigError(
                f"Adapters of tuning '{self.tuning}' are modules beside BLIP's layers and cannot "
                "be folded into its weights. Those of LoRA, BitFit and linear can."
            )
        for path, delta in active.deltas.items():
            delta.fold_into(self.get_submodule(path.replace("/", ".")))
        for name, head in active.heads.items():
            getattr(self, name).load_state_dict(head.state_dict())
        self.adapters.clear()
        self.adapters.active = None
        self._frozen = frozenset()
        self.base_changed(f"{self.base_name} with '{self.tuning}' merged")
        self.reset_momentum()

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside the context, compute with BLIP as it was loaded, heads included."""
        before, self.adapters.active = self.adapters.active, None
        try:
            yield
        finally:  # unless it was deleted or merged inside
            self.adapters.active = before if before in self.adapters else None

    def reset_momentum(self) -> None:
        """Restart moving averages, where the model has any, from the present parameters."""

    def parameter_counts(self) -> dict[str, int]:
        """Numbers of parameters: ``adapters`` as the paper counts, ``backbone`` without heads."""
        active = self.adapters.active_set
        encoders = nn.ModuleList([self.visual_encoder, *self.text_encoders().values()])
        return {
            "adapters": 0 if active is None else _count(active.layer_parameters()),
            "trainable": _count(self.trainable_parameters().values()),
            "backbone": _count(encoders.parameters()),
            "total": _count(self.parameters()),
        }

    def adapter_summary(self) -> str:
        """A table of what is loaded, what is active and what trains; its rows add up."""
        counts = self.parameter_counts()
        rows = {"backbone": counts["backbone"]}
        for name, adapter_set in self.adapters.items():
            state = "active" if name == self.adapters.active else "loaded"
            parts = {
                adapter_set.KIND: adapter_set.layer_parameters(),
                "key/value adapters": adapter_set.key_value.parameters(),
                "heads": adapter_set.heads.parameters(),
            }
            rows |= {f"{name} ({state}): {part}": _count(p) for part, p in parts.items()}
        rows["BLIP's heads"] = counts["total"] - sum(rows.values())
        rows |= {"total": counts["total"], "trained": counts["trainable"]}
        width = max(map(len, rows))
        lines = [f"{'':{width}}  {'parameters':>12}  share"]
        for label, number in rows.items():
            if number:
                lines.append(f"{label:{width}}  {number:>12,}  {number / counts['total']:6.2%}")
        if counts["adapters"]:
            share = counts["adapters"] / counts["backbone"]
            lines.append(f"the paper's count: adapters over backbone {share:.2%}")
        return "\n".join(lines)

    # --- checkpoints ----------------------------------------------------------------------------

    def load_checkpoint(self, url_or_filename, force=False):
        """Load what a runner saved (``lavis`` ``BaseModel``).

        Args:
            force: load it although it was trained on another base checkpoint or vocabulary.

        Raises:
            CheckpointError: if anything about it does not fit this model.
        """
        blip_files.load_trained(self, str(url_or_filename), force or self.section.force)

    def load_state_dict(self, state_dict, strict=True, assign=False):
        """Load tensors by name; with ``strict``, CheckpointError for those that do not fit.

        Frozen parameters may be absent: LAVIS's runners do not save them.
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
        note_change()
        own = blip_files.base_state_dict(self)
        new = ((own[name], value) for name, value in state_dict.items() if name in own)
        if not all(torch.equal(old, value.to(old)) for old, value in new):
            self._fingerprint = None
        return super().load_state_dict(state_dict, strict=False, assign=assign)


def note_change(*_: Any) -> None:
    """Note that some model's weights may have changed; see ``adapter_state``."""
    TunedBlip._changes += 1


register_optimizer_step_post_hook(note_change)  # a fused one's steps do not count in versions


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)
