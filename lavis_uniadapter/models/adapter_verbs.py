"""The verbs of adapters: save, load, set, delete, merge, disable, summarise."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping

import torch
from lavis.models.base_model import BaseModel
from torch import nn

from lavis_uniadapter.adapters.bank import delta_path
from lavis_uniadapter.checkpoints import adapter_files
from lavis_uniadapter.common.errors import ConfigError

DEFAULT_SET = "default"


class AdapterVerbs(BaseModel):
    """Mixin for models whose ``adapters`` is an AdapterBank."""

    def save_adapter(
        self, folder: str | os.PathLike, metrics: Mapping[str, float] | None = None
    ) -> None:
        """Write the active adapter and a model card; see ``checkpoints.adapter_files``.

        Raises:
            ConfigError: with ``tuning: full``, which has no adapter.
        """
        adapter_files.save(self, folder, metrics or {})

    def load_adapter(
        self, folder: str | os.PathLike, name: str = DEFAULT_SET, force: bool = False
    ) -> None:
        """Read an adapter folder into the set ``name``, created if it does not exist; activate it.

        Args:
            force: load although it was trained on another base checkpoint.

        Raises:
            CheckpointError: if anything about it does not fit this model.
        """
        adapter_files.load(self, folder, name, force)
        self.set_adapter(name)
        if self._trains(name):
            self.reset_momentum()

    def set_adapter(self, name: str) -> None:
        """Activate a loaded adapter, for all threads; KeyError if no adapter has that name."""
        self.adapters.activate(name)

    def delete_adapter(self, name: str) -> None:
        """Remove a loaded adapter and free its memory.

        Raises:
            KeyError: if no adapter has that name.
            ValueError: for the active one, and for the one that training changes.
        """
        if self._trains(name) or name == self.adapters.active:
            raise ValueError(
                f"'{name}' is active, or the adapter that this model trains, and cannot be "
                "deleted. Activate another one, and load what you want to delete later under "
                "another name."
            )
        del self.adapters[name]

    def _trains(self, name: str) -> bool:
        """Whether a named adapter set is the one that training changes."""
        return any(p.requires_grad for p in self.adapters[name].parameters())

    @torch.no_grad()
    def merge_adapter(self) -> None:
        """Fold the active adapter into BLIP itself, heads included, and remove all adapters.

        The model computes what it computed, at a plain BLIP's cost; its state dict is one that
        LAVIS's own models load.

        Raises:
            ConfigError: for a method whose adapters stand beside BLIP's layers.
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
        for key, delta in active.deltas.items():
            delta.fold_into(self.get_submodule(delta_path(key)))
        for name, head in active.heads.items():
            getattr(self, name).load_state_dict(head.state_dict())
        self.adapters.clear()
        self.adapters.active = None
        self._frozen = frozenset()
        self.base_changed(f"{self.base_name} with '{self.tuning}' merged")
        self.reset_momentum()

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Compute with the BLIP that the model was built on, heads included, inside the context."""
        with self.adapters.disabled():
            yield

    def reset_momentum(self) -> None:
        """Restart moving averages, where the model has any, from the present parameters."""

    def parameter_counts(self) -> dict[str, int]:
        """Numbers of parameters.

        ``adapters`` is the paper's count (bottlenecks alone), ``trainable`` all that is trained,
        ``backbone`` BLIP's encoders without heads, ``total`` everything.
        """
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


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)
