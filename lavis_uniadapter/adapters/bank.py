"""The bank owns every adapter parameter, once, in named sets of which one is active."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from torch import Tensor, nn


class AdapterSet(nn.Module):
    """Everything that one tuned task owns: adapters by layer, key/value adapters, heads.

    A method is a subclass, built from (heads, config, geometry). One that stands beside the FFNs
    answers ``layer``; one that changes the backbone's own modules fills ``deltas``.

    Args:
        heads: the modules that are trained whole, by their names in the model.

    Attributes:
        KIND: what ``adapter_summary`` calls the parameters that are neither heads nor key/value
            adapters.
        frame_aware: whether matching weighs the frames of a video (PFA) while this set is active.
        deltas: modules by ``delta_key`` of the backbone module they change. Each is called with
            that module's input and output and returns what takes the output's place; ``fold_into``
            changes the backbone module itself to the same effect.
    """

    KIND = "adapters"
    frame_aware = False

    def __init__(self, heads: Mapping[str, nn.Module]):
        super().__init__()
        self.heads = nn.ModuleDict(heads)
        self.key_value = nn.ModuleDict()
        self.deltas = nn.ModuleDict()

    def layer(self, encoder: str, index: int) -> nn.Module | None:
        """The adapter of a layer of the ``visual`` or ``text`` encoder, or None."""
        return None

    def layer_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters but for heads and key/value adapters, which is what the paper counts."""
        return self.deltas.parameters()


def delta_key(path: str) -> str:
    """A module's path as a key of an nn.ModuleDict, which may hold no dot."""
    return path.replace(".", "/")


class AdapterBank(nn.Module):
    """Named adapter sets side by side; layers read the active one through a slot.

    Which set is active is a property of the whole model: threads may compute with it at once, and
    none may change it, or disable it, while another computes.
    """

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

    def remove(self, name: str) -> None:
        """Forget a set.

        Raises:
            KeyError: if no set has that name.
            ValueError: for the active one.
        """
        self.get(name)
        if name == self.active:
            raise ValueError(f"'{name}' is the active adapter. Set another one before deleting it.")
        del self._modules[name]

    def clear(self) -> None:
        """Forget all sets; none is active then."""
        self._modules.clear()
        self.active = None

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

    def __call__(self) -> nn.Module | None:
        active = self._bank.active_set
        return None if active is None else active.layer(self._encoder, self._index)


class KeyValueSlot:
    """A cross-modal encoder's way to the active key/value adapter."""

    def __init__(self, bank: AdapterBank, encoder_name: str):
        self._bank = bank
        self._encoder_name = encoder_name

    def __call__(self) -> nn.Module | None:
        active = self._bank.active_set
        if active is None or self._encoder_name not in active.key_value:
            return None
        return active.key_value[self._encoder_name]


class DeltaSlot:
    """A forward hook by which a backbone module reaches what the active set changes of it."""

    def __init__(self, bank: AdapterBank, path: str):
        self._bank = bank
        self._key = delta_key(path)

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        active = self._bank.active_set
        return output if active is None else active.deltas[self._key](inputs[0], output)
