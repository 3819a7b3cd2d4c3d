"""The bank owns every adapter parameter, once, in named sets of which one is active."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

from lavis_uniadapter.adapters.config import AdapterConfig
from lavis_uniadapter.adapters.uniadapter import KeyValueAdapter, UniAdapter


@dataclass(frozen=True)
class BackboneGeometry:
    """The sizes of a backbone that adapters must fit.

    Attributes:
        visual_width, visual_depth: of the visual encoder.
        text_width, text_depth: of the text encoder.
        memory_widths: for each encoder with cross-attention, by its name in the model, the width
            of the states that it attends to.
    """

    visual_width: int
    visual_depth: int
    text_width: int
    text_depth: int
    memory_widths: dict[str, int] = field(default_factory=dict)


class AdapterSet(nn.Module):
    """Everything that one tuned task owns: adapters by layer, key/value adapters, heads.

    This base class has heads only (``tuning: linear``). A method with adapters is a subclass that
    fills ``key_value`` and answers ``layer`` and ``layer_parameters``.

    Args:
        heads: the modules that are trained whole, by their names in the model.

    Attributes:
        frame_aware: whether matching weighs the frames of a video (PFA) while this set is active.
    """

    frame_aware = False

    def __init__(self, heads: Mapping[str, nn.Module]):
        super().__init__()
        self.heads = nn.ModuleDict(heads)
        self.key_value = nn.ModuleDict()

    def layer(self, encoder: str, index: int) -> nn.Module | None:
        """The adapter of a layer of the ``visual`` or ``text`` encoder, or None."""
        return None

    def layer_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the layers' adapters, which is what the paper counts."""
        return iter(())


class UniAdapterSet(AdapterSet):
    """All adapters of a backbone: one UniAdapter a layer, and the key/value adapters.

    Where vision and text are equally wide, layer i of both share ``layers[i]``. Where they are
    not (ViT-L: 1024 against 768) no matrix fits both, and each has its own.
    """

    def __init__(
        self, heads: Mapping[str, nn.Module], config: AdapterConfig, geometry: BackboneGeometry
    ):
        super().__init__(heads)
        self.frame_aware = config.frame_aware

        def build(width: int, visual: bool, textual: bool) -> UniAdapter:
            return UniAdapter(
                width,
                config,
                visual=visual and config.visual,
                textual=textual and config.textual,
                cross_modal=textual and config.cross_modal,
            )

        visual_depth = geometry.visual_depth if config.visual else 0
        text_depth = geometry.text_depth if config.textual or config.cross_modal else 0
        if geometry.visual_width == geometry.text_width:
            self.layers = nn.ModuleList(
                build(geometry.text_width, i < visual_depth, i < text_depth)
                for i in range(max(visual_depth, text_depth))
            )
            visual_layers = text_layers = self.layers
        else:
            visual_layers = self.visual_layers = nn.ModuleList(
                build(geometry.visual_width, True, False) for _ in range(visual_depth)
            )
            text_layers = self.text_layers = nn.ModuleList(
                build(geometry.text_width, False, True) for _ in range(text_depth)
            )
        self._depths = {"visual": visual_depth, "text": text_depth}
        self._names = {
            "visual": next(n for n, m in self.named_children() if m is visual_layers),
            "text": next(n for n, m in self.named_children() if m is text_layers),
        }
        if config.kv_bottleneck:
            for name, width in geometry.memory_widths.items():
                self.key_value[name] = KeyValueAdapter(width, geometry.text_width, config)

    def layer(self, encoder: str, index: int) -> UniAdapter | None:
        if index >= self._depths[encoder]:
            return None
        return getattr(self, self._names[encoder])[index]

    def layer_parameters(self) -> Iterator[nn.Parameter]:
        for name in dict.fromkeys(self._names.values()):
            yield from getattr(self, name).parameters()


class AdapterBank(nn.Module):
    """Named adapter sets side by side; layers read the active one through an AdapterSlot."""

    def __init__(self):
        super().__init__()
        self.active: str | None = None

    def names(self) -> list[str]:
        return [name for name, _ in self.named_children()]

    def add(self, name: str, adapter_set: AdapterSet) -> None:
        """Add a set; the first becomes active.

        Raises:
            ValueError: if the name is taken or cannot be part of a state-dict key.
        """
        if not name.isidentifier() or hasattr(self, name):
            raise ValueError(
                f"'{name}' cannot name an adapter: it is taken ({', '.join(self.names())}), "
                "reserved, or not a plain identifier. Choose another name."
            )
        self.add_module(name, adapter_set)
        if self.active is None:
            self.active = name

    def get(self, name: str) -> AdapterSet:
        if name not in self.names():
            raise KeyError(
                f"No adapter is named '{name}'. Loaded: {', '.join(self.names()) or 'none'}."
            )
        return getattr(self, name)

    def activate(self, name: str) -> None:
        self.get(name)
        self.active = name

    @property
    def active_set(self) -> AdapterSet | None:
        return None if self.active is None else getattr(self, self.active)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """No adapter inside; afterwards, also after an exception, the one that was active."""
        before, self.active = self.active, None
        try:
            yield
        finally:
            self.active = before


class AdapterSlot:
    """A layer's unregistered way to the active adapter, so the bank stays its only owner."""

    def __init__(self, bank: AdapterBank, encoder: str, index: int):
        self._bank = bank
        self._encoder = encoder
        self._index = index

    def __call__(self) -> UniAdapter | None:
        active = self._bank.active_set
        return None if active is None else active.layer(self._encoder, self._index)


class KeyValueSlot:
    """A cross-modal encoder's way to the active key/value adapter."""

    def __init__(self, bank: AdapterBank, encoder_name: str):
        self._bank = bank
        self._encoder_name = encoder_name

    def __call__(self) -> KeyValueAdapter | None:
        active = self._bank.active_set
        if active is None or self._encoder_name not in active.key_value:
            return None
        return active.key_value[self._encoder_name]
