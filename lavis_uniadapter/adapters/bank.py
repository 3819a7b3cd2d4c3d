"""What tuning methods share: the backbone as they see it, their sets of modules, and the bank.

The bank owns every adapter parameter, once, in named sets of which one is active.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lavis_uniadapter.common.schema.methods import MethodConfig


@dataclass(frozen=True)
class BackboneGeometry:
    """The backbone that adapters must fit.

    Attributes:
        memory_widths: width of what each encoder with cross-attention attends to, by its name.
        text_mode: whether the model ever encodes text alone.
        modules: those of all encoders and the transform before the vocabulary, by path with
            slashes for dots, each with what equal parts of its output are (LAVIS's ViT has query,
            key and value in one): query, key, value, attention_output, ffn_in, ffn_out or
            word_transform.
    """

    visual_width: int
    visual_depth: int
    text_width: int
    text_depth: int
    memory_widths: dict[str, int] = field(default_factory=dict)
    text_mode: bool = True
    modules: dict[str, tuple[Any, tuple[str, ...]]] = field(default_factory=dict)


class AdapterSet(nn.Module):
    """All that one tuned task owns: adapters by layer, key/value adapters, heads.

    A tuning method is a subclass with a ``build``. A method that adds modules beside the FFNs
    overrides ``layer``. One that changes modules of the backbone fills ``deltas``, by path: a delta
    maps the module's input and output to a new output, and its ``fold_into`` changes the module
    itself to that effect.
    """

    KIND = "adapters"  # name of the parameters that are neither heads nor key/value adapters
    frame_aware = False  # whether matching weighs the frames of a video (PFA)
    _hashed: tuple[int | None, str] = None, ""  # of TunedBlip.adapter_state

    def __init__(
        self, heads: Mapping[str, nn.Module], config: MethodConfig, geometry: BackboneGeometry
    ):
        super().__init__()
        self.heads = nn.ModuleDict(heads)  # trained whole, by their names in the model
        self.key_value = nn.ModuleDict()  # by name of the text encoder
        self.deltas = nn.ModuleDict()
        self.build(config, geometry)

    def build(self, config: Any, geometry: BackboneGeometry) -> None:
        raise NotImplementedError

    def layer(self, encoder: str, index: int) -> nn.Module | None:
        """The adapter of a layer of the ``visual`` or ``text`` encoder."""
        return None

    def layer_parameters(self) -> Iterator[nn.Parameter]:
        """All but heads and key/value adapters, which is what the paper counts."""
        for name, module in self.named_children():
            if name not in ("heads", "key_value"):
                yield from module.parameters()


class AdapterBank(nn.ModuleDict):
    """Adapter sets by name, one of them active.

    Layers of the backbone look up what they compute with here, each time they run. Which set is
    active is a property of the whole model: threads may share it, but must not change or disable it
    while another computes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.active: str | None = None

    def __getitem__(self, name: str) -> Any:
        if not isinstance(name, str) or name not in self:
            raise KeyError(f"No adapter is named '{name}'. Loaded: {', '.join(self) or 'none'}.")
        return super().__getitem__(name)

    def check_name(self, name: str) -> None:
        """KeyError for a name that cannot be part of a state dict's keys."""
        unusable = not isinstance(name, str) or not name or "." in name
        if unusable or (name not in self and hasattr(self, name)):
            raise KeyError(
                f"An adapter cannot be named '{name}'. A name is not empty, has no dot, and is no "
                "attribute of the bank, as 'active' and 'layer' are. Choose another name."
            )

    def add(self, name: str, adapter_set: AdapterSet) -> None:
        """Add a set; the first becomes active. KeyError for a name that cannot be one."""
        self.check_name(name)
        self[name] = adapter_set
        self.active = self.active or name

    @property
    def active_set(self) -> AdapterSet | None:
        return None if self.active is None else self[self.active]

    # --- what the backbone looks up -------------------------------------------------------------

    def layer(self, encoder: str, index: int, branch: str, *states: Tensor) -> Tensor | int:
        """What the active adapter of a layer adds beside its FFN; 0 without one.

        ``branch`` names the adapter's method: ``visual``, ``textual`` or ``cross_modal``.
        """
        active = self.active_set
        adapter = None if active is None else active.layer(encoder, index)
        return 0 if adapter is None else getattr(adapter, branch)(*states)

    def key_value(self, encoder: str) -> Any:
        """The active ``key`` and ``value`` adapters of a text encoder; empty without any."""
        active = self.active_set
        return (
            {} if active is None or encoder not in active.key_value else active.key_value[encoder]
        )

    def delta(self, key: str, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        """The active set's delta of a module, as its forward hook."""
        active = self.active_set
        return output if active is None else active.deltas[key](inputs[0], output)
