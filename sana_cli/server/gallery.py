"""The images that were drawn last, as files in memory, with their recipes."""

import threading
import time
import uuid
from collections import OrderedDict
from dataclasses import dataclass, field

from sana_cli.recipe import Recipe

MAX_IMAGES = 100
MAX_BYTES = 256 << 20


@dataclass(frozen=True)
class Drawn:
    recipe: Recipe
    format: str
    data: bytes
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: float = field(default_factory=time.time)


class Gallery:
    """The oldest go first, at MAX_IMAGES and at MAX_BYTES. Safe to use from several threads."""

    def __init__(self) -> None:
        self._images: OrderedDict[str, Drawn] = OrderedDict()
        self._turn = threading.Lock()
        self.nbytes = 0

    def add(self, drawn: Drawn) -> None:
        with self._turn:
            self._images[drawn.id] = drawn
            self.nbytes += len(drawn.data)
            while len(self._images) > MAX_IMAGES or self.nbytes > MAX_BYTES:
                self.nbytes -= len(self._images.popitem(last=False)[1].data)

    def newest(self) -> list[Drawn]:
        with self._turn:
            return list(reversed(self._images.values()))

    def find(self, id: str) -> Drawn | None:
        with self._turn:
            return self._images.get(id)

    def remove(self, id: str) -> bool:
        with self._turn:
            drawn = self._images.pop(id, None)
            self.nbytes -= len(drawn.data) if drawn else 0
            return drawn is not None
