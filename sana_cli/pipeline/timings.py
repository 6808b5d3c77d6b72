"""How long the stages of an image took on this machine, kept from one run to the next."""

import math
import os
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sana_cli import __version__
from sana_cli.pipeline.events import Event, Failure, Progress
from sana_cli.recipe import Recipe
from sana_cli.system import inventory
from sana_cli.system.devices import full_name, torch_version
from sana_cli.system.json_cache import JsonCache

FILE = "timings.json"  # in the cache folder
LIMIT = 100  # settings
CHANGED = 0.1  # the share by which a time must differ to be written again


@dataclass
class Timings:
    """Seconds: `load` by network, `encode` a text, `image` all input images of an image, `step` of
    an image, and `decode` an image. What no run has done is missing."""

    load: dict[str, float] = field(default_factory=dict)
    stages: dict[str, float] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        """Whether an image has been drawn from its text to its pixels."""
        return {"encode", "step", "decode"} <= self.stages.keys()


def machine_key(device: str) -> tuple[Any, ...]:
    """Return what decides how long the same work takes: versions, device and threads."""
    versions = __version__, torch_version().__version__
    if device != "cpu":
        return *versions, full_name(device)
    cores, threads = inventory.cores(), os.environ.get("OMP_NUM_THREADS")
    return *versions, inventory.cpu_name(), cores, threads


def kind_of(recipe: Recipe) -> tuple[Any, ...]:
    """Return what decides the times of stages: neither texts nor the seed nor the steps."""
    return (
        *(recipe.model, recipe.revision, recipe.controlnet, recipe.vae, recipe.quant),
        *(recipe.native_width, recipe.native_height, recipe.image is None),
        *(recipe.guidance > 1, recipe.negative == "", recipe.pag is None),
        *(recipe.text_dtype, recipe.dit_dtype, recipe.vae_dtype),
    )


def read(recipe: Recipe, device: str, limit: int | None, folder: Path | None) -> Timings:
    """Return what images like that of a recipe took; `limit` is the user's, in bytes."""
    try:
        load, stages = _cache(folder).get(*machine_key(device), limit, *kind_of(recipe))
        return Timings(*({str(k): float(v) for k, v in part.items()} for part in (load, stages)))
    except (TypeError, ValueError, AttributeError):  # nothing, or broken
        return Timings()


def keep(
    found: Timings, recipe: Recipe, device: str, limit: int | None, folder: Path | None
) -> None:
    """Keep what images like that of a recipe took, in place of what was kept of the same stages."""
    before = read(recipe, device, limit, folder)
    now = Timings(before.load | found.load, before.stages | found.stages)
    old, new = before.load | before.stages, now.load | now.stages
    if old.keys() != new.keys() or any(
        not math.isclose(old[name], new[name], rel_tol=CHANGED) for name in new
    ):
        key = *machine_key(device), limit, *kind_of(recipe)
        _cache(folder).put([now.load, now.stages], *key)


class Stopwatch:
    """Adds up the seconds in the events of a run."""

    def __init__(self) -> None:
        self.load: dict[str, float] = {}
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.units: Counter[str] = Counter()
        self.failed = False

    def see(self, event: Event) -> None:
        self.failed |= isinstance(event, Failure)
        if not isinstance(event, Progress):
            return
        if event.stage == "load":
            self.load[event.network] = event.seconds
        elif event.stage != "encode" or event.network:  # a text that was not in the cache
            stage = "step" if event.stage == "denoise" else event.stage
            self.seconds[stage] += event.seconds
            self.units[stage] += 1

    def keep(
        self, recipes: list[Recipe], device: str, limit: int | None, folder: Path | None
    ) -> None:
        """Keep the times of a run that has ended, if its images are of one kind and none failed."""
        if not self.failed and len(set(map(kind_of, recipes))) == 1:
            stages = {stage: self.seconds[stage] / count for stage, count in self.units.items()}
            keep(Timings(self.load, stages), recipes[0], device, limit, folder)


def _cache(folder: Path | None) -> JsonCache:
    return JsonCache(folder and folder / FILE, LIMIT)
