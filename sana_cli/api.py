"""Sana from Python: the settings of the command line in, Pillow images with their recipes out.

    from sana_cli import Pipeline

    for picture in Pipeline("demo").generate("a red circle on a blue background", seed=7):
        picture.save("circle.png")
        print(picture.recipe.seed)

What the user can mend is a SanaError with a `.hint`, in the words of the command line. Warnings go
through `warnings`, what is merely worth knowing to the logger "sana_cli". Nothing is printed.
"""

import logging
import os
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from PIL import Image

from sana_cli.errors import SanaError
from sana_cli.images.files import SUFFIXES, saving
from sana_cli.images.metadata import Record
from sana_cli.recipe import Recipe, parse_seeds
from sana_cli.settings import Settings
from sana_cli.ui import Talk
from sana_cli.units import parse_memory
from sana_cli.weights.catalogue import choose_model

if TYPE_CHECKING:
    from sana_cli.pipeline.draw import Event

__all__ = ["Picture", "Pipeline", "SanaError"]

logger = logging.getLogger("sana_cli")


class Picture(Image.Image):
    """A Pillow image that knows its recipe. What is made of it (a copy, a crop) does not."""

    record: Record

    @property
    def recipe(self) -> Recipe:
        return self.record.recipe

    def save(
        self,
        fp: str | bytes | os.PathLike[str] | os.PathLike[bytes] | IO[bytes],
        format: str | None = None,
        **params: Any,
    ) -> None:
        """As Pillow's, with the recipe inside PNG, JPEG, WebP and AVIF files, and with the
        command's own defaults. `pnginfo=None` or `exif=b""` leaves the recipe out.

        It overwrites, as Pillow's does. UsageError if the recipe is too long for a JPEG.
        """
        known = format.lower() if format else _format_of(getattr(fp, "name", fp))
        if known in SUFFIXES.values():
            replaced = ("pnginfo" if known == "png" else "exif") in params
            params = saving(known, None, None if replaced else self.record) | params
        super().save(fp, format, **params)

    def __getstate__(self) -> list[Any]:
        return [self.record, super().__getstate__()]

    def __setstate__(self, state: list[Any]) -> None:
        self.record, image = state
        super().__setstate__(image)


class Pipeline:
    """A model on a device. Between two calls of `generate` nothing of it stays in memory, so ask
    for many pictures at once rather than for one many times."""

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        device: str = "auto",
        dtype: str = "auto",
        text_precision: str = "auto",
        memory: str = "auto",
        cache: bool = True,
        offline: bool = False,
    ) -> None:
        """`model` is a name of `sana models list`, a hub id or a folder; None chooses by `res`.
        What it lacks on this machine is fetched at the first use, unless `offline`.

        All of them mean what the options of `sana generate` mean. UsageError if a model or an
        amount of memory is none.
        """
        self.model = os.fspath(model) if model is not None else None
        choose_model(self.model, None)
        self.limit = parse_memory(memory)
        self.device, self.dtype, self.text_precision = device, dtype, text_precision
        self.cache, self.offline = cache, offline

    def generate(
        self,
        prompt: str | Iterable[str],
        *,
        seed: int | Iterable[int] | None = None,
        count: int | None = None,
        negative: str = "",
        res: str | int | None = None,
        ar: str | None = None,
        fit: str = "trained",
        steps: int | None = None,
        guidance: float | None = None,
        solver: str | None = None,
        image: str | os.PathLike[str] | None = None,
        strength: float | None = None,
        instruction: bool | None = None,
        progress: "Callable[[Event], None] | None" = None,
    ) -> list[Picture]:
        """Every prompt with every seed, in this order: all seeds of the first prompt come first.

        `seed` is one, with the `count - 1` after it, or several, or None for a random one; the
        rest means what the options of `sana generate` mean, and gives the same pixels. `progress`
        is called with each event of `sana_cli.pipeline.draw`: Progress as a step is done, Picture
        as one is drawn.

        A SanaError is raised for what no model takes (UsageError), weights that are not here
        (MissingModel) or unusable (BrokenModel), too little memory (NotEnoughMemory) or disk
        (DiskFull), and a picture that came out as NaN or flat (BadImage). Pictures that were
        drawn before it are only with `progress`.
        """
        from sana_cli.resolve import choose

        seeds = [seed] if isinstance(seed, int) else seed
        numbers = parse_seeds(None if seeds is None else ",".join(map(str, seeds)), count)
        settings: dict[str, Any] = {
            "model": self.model,
            "dtype": self.dtype,
            "text_precision": self.text_precision,
            "negative": negative,
            "res": None if res is None else str(res),
            "ar": ar,
            "fit": fit,
            "steps": steps,
            "guidance": guidance,
            "solver": solver,
            "image": None if image is None else os.fspath(image),
            "strength": strength,
            "instruction": instruction,
        }
        prompts = [prompt] if isinstance(prompt, str) else prompt
        choices = [choose(Settings(text, **settings)) for text in prompts]
        if not choices:
            return []

        from sana_cli.pipeline.plan import make_plan
        from sana_cli.system.devices import choose_device
        from sana_cli.system.folders import cache_folder
        from sana_cli.weights.fetch import open_chosen

        first, voice = choices[0], _Voice()
        files = open_chosen(first.model, voice, self.offline, dry_run=False)
        device = choose_device(self.device)
        recipes = [choice.recipe(files, device, one) for choice in choices for one in numbers]
        for text in first.sampling(files).warnings:
            voice.warn(text)
        plan = make_plan(recipes, files, device, self.limit)
        for text in plan.words():
            voice.say(text)

        import torch

        from sana_cli.pipeline import draw as stages

        sources = {first.source.digest: first.source.pixels} if first.source else {}
        cache = cache_folder() if self.cache else None
        pictures: dict[int, Picture] = {}
        for event in stages.draw(recipes, files, plan, images=sources, cache=cache):
            if progress:
                progress(event)
            match event:
                case stages.Failure(error=error):
                    raise error
                case stages.Remark(text, warning):
                    (voice.warn if warning else voice.say)(text)
                case stages.Picture(index, pixels):
                    record = Record(recipes[index], device, torch.__version__)
                    pictures[index] = _picture(pixels, record)
        return [pictures[index] for index in range(len(recipes))]


def _picture(pixels: Any, record: Record) -> Picture:
    """uint8 RGB (height, width, 3) as an image that knows its recipe."""
    image = Image.fromarray(pixels)
    image.__class__ = Picture  # Pillow makes images by functions only, and of its own class
    picture = cast(Picture, image)
    picture.record = record
    return picture


def _format_of(path: Any) -> str:
    """By the suffix, as Pillow does; "" where that says nothing."""
    named = isinstance(path, str | bytes | os.PathLike)
    return SUFFIXES.get(Path(os.fsdecode(path)).suffix.lower(), "") if named else ""


class _Voice(Talk):
    """What the command would say, for a program: silent, with no bars."""

    def __init__(self) -> None:
        super().__init__(quiet=True)

    def say(self, text: str) -> None:
        logger.info(text)

    def warn(self, text: str) -> None:
        warnings.warn(text, stacklevel=3)  # at the call of `generate`
