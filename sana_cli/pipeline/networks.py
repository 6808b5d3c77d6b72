"""The loaded networks, kept between calls within a memory budget.

When a stage needs room, CUDA graphs are released first, as they are captured sooner than a network
is loaded; then the least recently used networks.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sana_cli.recipe import Adapter
from sana_cli.system.devices import release_unused_memory
from sana_cli.weights.layout import Part
from sana_cli.weights.single_file import SingleFile

if TYPE_CHECKING:
    from sana_cli.models.cuda_graph import RepeatedCall


class NetworkKey(NamedTuple):
    """All that determines the tensors of a loaded network."""

    part: str  # "text_encoder", "transformer", "encoder" or "decoder"
    weights: tuple[Hashable, ...]  # identity of every source of tensors
    dtype: str
    device: str = ""  # only for a network that cannot be moved
    adapters: tuple[Adapter, ...] = ()  # LoRAs merged into the weights
    quant: str | None = None  # as in the recipe


@dataclass
class _Loaded:
    network: Any
    weights: int  # bytes

    @property
    def graph(self) -> "RepeatedCall | None":
        """Return what may have a CUDA graph, which comes later and holds memory of its own."""
        return getattr(self.network, "graph", None)

    @property
    def nbytes(self) -> int:
        """Return the bytes of its weights and of its CUDA graph."""
        return self.weights + (self.graph.nbytes if self.graph else 0)

    def device(self, key: NetworkKey) -> str:
        """Return the kind of device that it is on, such as "cuda"."""
        if key.device:
            return key.device.partition(":")[0]
        return next(self.network.parameters()).device.type


class Networks:
    """Loaded networks by key. With `keep` they stay loaded after the call that loaded them.

    Not thread-safe: the session that owns it serialises its calls.
    """

    def __init__(self, keep: bool = True) -> None:
        self.keep = keep
        self._loaded: dict[NetworkKey, _Loaded] = {}  # the least recently used first

    @property
    def held_bytes(self) -> int:
        """Return the bytes of the weights of all loaded networks."""
        return sum(loaded.weights for loaded in list(self._loaded.values()))  # as of one moment

    def held_on(self, device: str) -> int:
        """Return those on a device: a network that did not fit there may be on the CPU."""
        return sum(self._loaded[key].weights for key in self._keys_on(device))

    def _keys_on(self, device: str) -> list[NetworkKey]:
        wanted = device.partition(":")[0]
        return [key for key, loaded in self._loaded.items() if loaded.device(key) == wanted]

    @property
    def loaded(self) -> list[NetworkKey]:
        """Return the keys of the loaded networks, the most recently used last."""
        return list(self._loaded)

    def find(self, key: NetworkKey) -> Any | None:
        """Return the network of a key and mark it as used now; None if it is not loaded."""
        loaded = self._loaded.pop(key, None)
        if loaded is None:
            return None
        self._loaded[key] = loaded
        return loaded.network

    def add(self, key: NetworkKey, network: Any, nbytes: int) -> None:
        self._loaded[key] = _Loaded(network, nbytes)

    def make_room(self, needed: int, budget: int, using: NetworkKey, device: str) -> None:
        """Release graphs, then the least recently used, until a stage of `needed` bytes fits.

        `needed` includes the weights of the network in use, which stays.
        """
        others = [key for key in self._keys_on(device) if key != using]
        released = False
        for key in list(others) if using.adapters else ():
            # Of one network with LoRAs the last stays: a server is asked for ever new scales.
            if key.adapters and key._replace(adapters=using.adapters) == using:
                others.remove(key)
                del self._loaded[key]
                released = True
        held = sum(self._loaded[key].nbytes for key in others)
        for loaded in map(self._loaded.__getitem__, others):
            if held + needed > budget and loaded.graph and loaded.graph.nbytes:
                held -= loaded.graph.nbytes
                loaded.graph.forget()
                released = True
        while others and held + needed > budget:
            held -= self._loaded.pop(others.pop(0)).nbytes
            released = True
        if released:
            release_unused_memory(device)

    def release(self, *parts: str, device: str) -> None:
        """Release every network of these parts."""
        keys = [key for key in self._loaded if key.part in parts]
        for key in keys:
            del self._loaded[key]
        if keys:
            release_unused_memory(device)

    def release_idle(self, using: NetworkKey, device: str) -> bool:
        """Release everything but one network; return whether anything was released."""
        idle = [key for key in self._loaded if key != using]
        for key in idle:
            del self._loaded[key]
        if idle:
            release_unused_memory(device)
        return bool(idle)

    def clear(self, device: str) -> None:
        """Release everything."""
        self._loaded.clear()
        release_unused_memory(device)


@dataclass(frozen=True, eq=False)
class _SameObject:
    """The identity of weights that are not in a file: the object that holds them."""

    source: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _SameObject) and self.source is other.source

    def __hash__(self) -> int:
        return id(self.source)


def identity_of(part: Part) -> tuple[Hashable, ...]:
    """Return the identity of a part's weights: path, size and mtime of a file, else the object.

    A file that is replaced between two calls gets another identity.
    """
    identities: list[Any] = []
    for source in part.weights:
        file = source.path if isinstance(source, SingleFile) else source
        if isinstance(file, Path):
            state = file.stat()
            identities.append((str(file), state.st_size, state.st_mtime_ns))
        else:
            identities.append(_SameObject(source))
    return tuple(identities)
