"""Sana from Python: the options of the command line in, Pillow images with their recipes out.

    from sana_cli import Pipeline

    with Pipeline("demo") as pipeline:
        for image in pipeline.generate("a red circle on a blue background", seed=7):
            image.save("circle.png")
            print(image.recipe.seed)

What the user can mend is a SanaError with a `.hint`, in the words of the command line. Warnings go
through `warnings`, information to the logger "sana_cli". Nothing is printed.
"""

import inspect
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from PIL import Image

from sana_cli.errors import SanaError
from sana_cli.images.files import SUFFIXES, saving
from sana_cli.images.metadata import Metadata
from sana_cli.recipe import Recipe, parse_seeds
from sana_cli.session import Session
from sana_cli.settings import RunOptions, Settings, check_value, declared
from sana_cli.units import parse_memory
from sana_cli.weights.catalogue import choose_model

if TYPE_CHECKING:
    from sana_cli.pipeline.events import Event

__all__ = ["Pipeline", "SanaError", "SanaImage"]

AT_LOAD = {n: one for n, one in declared(Settings, RunOptions).items() if one.option.at_load}
PER_CALL = {n: one for n, one in declared(Settings).items() if not one.option.at_load}


class SanaImage(Image.Image):
    """A Pillow image that carries its recipe. What is made of it (a copy, a crop) does not."""

    metadata: Metadata

    @property
    def recipe(self) -> Recipe:
        return self.metadata.recipe

    def save(
        self,
        fp: str | bytes | os.PathLike[str] | os.PathLike[bytes] | IO[bytes],
        format: str | None = None,
        **params: Any,
    ) -> None:
        """Save as Pillow does, with the recipe inside PNG, JPEG, WebP and AVIF files, and with the
        command's own defaults. `pnginfo=None` or `exif=b""` leaves the recipe out.

        It overwrites, as Pillow's does. UsageError if the recipe is too long for a JPEG.
        """
        known = format.lower() if format else _format_of(getattr(fp, "name", fp))
        if known in SUFFIXES.values():
            replaced = ("pnginfo" if known == "png" else "exif") in params
            params = saving(known, None, None if replaced else self.metadata) | params
        super().save(fp, format, **params)

    def __getstate__(self) -> list[Any]:
        return [self.metadata, super().__getstate__()]

    def __setstate__(self, state: list[Any]) -> None:
        self.metadata, image = state
        super().__setstate__(image)


class Pipeline:
    """A model on a device. Its networks stay loaded from one call to the next, within the memory
    that there is, until `close`, the end of a `with`, or never with `keep_loaded=False`.

    Calls from several threads queue.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        keep_loaded: bool = True,
        **options: Any,
    ) -> None:
        """`model` is a name of `sana models list`, a hub id or a folder; None chooses by `res`.
        What is missing on this machine is fetched at the first use, unless `offline`.

        The other arguments mean what the options of `sana generate` mean. UsageError for a value
        that is impossible here.
        """
        _refuse_unknown(options, AT_LOAD, PER_CALL, "Pipeline.generate")
        chosen = {name: one.default for name, one in AT_LOAD.items()} | options
        chosen["model"] = os.fspath(model) if model is not None else None
        for name, value in chosen.items():
            check_value(AT_LOAD[name], value)
        choose_model(chosen["model"], None)
        self._settings = {name: chosen[name] for name in declared(Settings) if name in chosen}
        self.model = chosen["model"]
        self.session = Session(
            device=chosen["device"],
            memory=parse_memory(chosen["memory"]),
            cache=chosen["cache"],
            offline=chosen["offline"],
            keep_loaded=keep_loaded,
        )
        self.device = self.session.device

    def generate(
        self,
        prompt: str | Iterable[str],
        *,
        seed: int | Iterable[int] | None = None,
        count: int | None = None,
        progress: "Callable[[Event], None] | None" = None,
        **settings: Any,
    ) -> list[SanaImage]:
        """Draw every prompt with every seed: all seeds of the first prompt come first.

        `seed` is one, with the `count - 1` after it, or several, or None for a random one; the
        rest means what the options of `sana generate` mean, and gives the same pixels. `progress`
        is called with each event of `sana_cli.pipeline.draw`: Progress as a step is done or a
        network loaded, ImageDone as an image is finished.

        A SanaError is raised for what no model takes (UsageError), weights that are not here
        (MissingModel) or unusable (BrokenModel), too little memory (NotEnoughMemory) or disk
        (DiskFull), and an image that came out as NaN or flat (BadImage). Images that were
        finished before it reach `progress` only.
        """
        _refuse_unknown(settings, PER_CALL, AT_LOAD, "Pipeline")
        seeds = [seed] if isinstance(seed, int) else seed
        numbers = parse_seeds(None if seeds is None else ",".join(map(str, seeds)), count)
        for name, one in PER_CALL.items():
            value = settings.get(name)
            if one.kind is str and not one.repeated and isinstance(value, int | os.PathLike):
                settings[name] = str(settings[name])  # res=512, image=Path(…)
            if one.repeated and name in settings:
                given = settings[name]
                several = [given] if isinstance(given, str | os.PathLike) else given or ()
                settings[name] = tuple(map(str, several))
        prompts = [prompt] if isinstance(prompt, str) else prompt
        asked = [Settings(text, **self._settings | settings) for text in prompts]
        if not asked:
            return []
        with self.session.exclusive():
            return self._draw(asked, numbers, progress)

    def _draw(
        self,
        asked: list[Settings],
        seeds: list[int],
        progress: "Callable[[Event], None] | None",
    ) -> list[SanaImage]:
        request = self.session.request(asked, seeds)

        from sana_cli.pipeline.events import Failure, ImageDone, Notice

        reporter = self.session.reporter
        images: dict[int, SanaImage] = {}
        for event in self.session.draw(request):
            if progress:
                progress(event)
            match event:
                case Failure(error=error):
                    raise error
                case Notice(text, warning):
                    (reporter.warn if warning else reporter.info)(text)
                case ImageDone(index, pixels):
                    metadata = self.session.metadata(request.recipes[index])
                    images[index] = with_metadata(Image.fromarray(pixels), metadata)
        return [images[index] for index in range(len(request.recipes))]

    def close(self) -> None:
        """Release the networks. The pipeline can be used again, and then loads them again."""
        self.session.close()

    def __enter__(self) -> "Pipeline":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def __repr__(self) -> str:
        state = ", ".join(key.part for key in self.session.networks.loaded) or "nothing"
        return f"<Pipeline {self.model or 'by res'} on {self.device}, {state} loaded>"


def with_metadata(image: Image.Image, metadata: Metadata) -> SanaImage:
    """The same image, carrying its recipe."""
    image.__class__ = SanaImage  # Pillow makes images by functions only, and of its own class
    ours = cast(SanaImage, image)
    ours.metadata = metadata
    return ours


def _format_of(path: Any) -> str:
    """By the suffix, as Pillow does; "" where that says nothing."""
    named = isinstance(path, str | bytes | os.PathLike)
    return SUFFIXES.get(Path(os.fsdecode(path)).suffix.lower(), "") if named else ""


# --- arguments, as they are declared -----------------------------------------------------------


def _refuse_unknown(
    given: dict[str, Any], known: dict[str, Any], elsewhere: dict[str, Any], other: str
) -> None:
    """TypeError for an argument that is not declared, or belongs to the other call."""
    for name in given:
        if name not in known:
            where = f"; it is an argument of {other}" if name in elsewhere else ""
            raise TypeError(f"unexpected argument {name!r}{where}; use {', '.join(known)}")


def _declare(call: Callable[..., Any], options: dict[str, Any]) -> None:
    """Put declared options in the place of `**` in a signature, for help() and editors."""
    signature = inspect.signature(call)
    parameters = signature.parameters
    own = [p for p in parameters.values() if p.kind is not p.VAR_KEYWORD]
    more = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=one.default,
            annotation=one.kind | None if one.optional else one.kind,
        )
        for name, one in options.items()
        if name not in parameters
    ]
    call.__signature__ = signature.replace(parameters=own + more)  # type: ignore[attr-defined]


_declare(Pipeline.__init__, AT_LOAD)
_declare(Pipeline.generate, PER_CALL)
