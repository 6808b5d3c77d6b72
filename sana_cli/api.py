"""Sana from Python: the options of the command line in, Pillow images with their recipes out.

    from sana_cli import Pipeline

    with Pipeline("demo") as pipeline:
        for image in pipeline.generate("a red circle on a blue background", seed=7):
            image.save("circle.png")
            print(image.recipe.seed)

A call takes the arguments of diffusers: `pipeline(prompt, num_inference_steps=20).images`.

What the user can mend is a SanaError with a `.hint`, in the words of the command line. Warnings go
through `warnings`, information to the logger "sana_cli". Nothing is printed, except bars while
stderr is a terminal.
"""

import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, NamedTuple, Self, TypeAlias, cast

import numpy as np
from PIL import Image

from sana_cli import diffusers_compat
from sana_cli.errors import SanaError, UsageError
from sana_cli.images.files import saving
from sana_cli.images.metadata import Metadata
from sana_cli.images.names import SUFFIXES
from sana_cli.recipe import Recipe, parse_seeds
from sana_cli.reporter import LogReporter, TransferReporter
from sana_cli.session import Session
from sana_cli.settings import RunOptions, Settings, check_value, declared, is_path
from sana_cli.units import gigabytes, parse_memory
from sana_cli.weights.catalogue import choose_model

if TYPE_CHECKING:
    import torch

    from sana_cli.pipeline.events import Event, Latents
    from sana_cli.session import DrawRequest
    from sana_cli.ui import Console

__all__ = ["Pipeline", "SanaError", "SanaImage"]

# A function that is called with each event; None shows bars on a terminal, False does not.
Watch: TypeAlias = "Callable[[Event], None] | Literal[False] | None"

AT_LOAD = {n: one for n, one in declared(Settings, RunOptions).items() if one.option.at_load}
PER_CALL = {n: one for n, one in declared(Settings).items() if not one.option.at_load}
# What `Pipeline(…)(…)` takes: the names of diffusers as well.
CALLED = PER_CALL | dict.fromkeys((*diffusers_compat.CALL, "width", "height", "generator"))
CALLED |= dict.fromkeys(("output_type", "callback_on_step_end"))


class SanaImage(Image.Image):
    """A Pillow image that carries its recipe, as do its copies and conversions to other modes.

    What has other pixels, such as a crop, is a plain Pillow image.
    """

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

    def copy(self) -> "SanaImage":
        return with_metadata(super().copy(), self.metadata)

    __copy__ = copy

    def convert(self, *arguments: Any, **named: Any) -> "SanaImage":
        return with_metadata(super().convert(*arguments, **named), self.metadata)

    def __repr__(self) -> str:
        recipe = self.recipe
        size = f"{self.width}x{self.height} {self.mode}"
        return f"<SanaImage {size}, {recipe.model}, seed {recipe.seed}: {recipe.prompt!r}>"

    def __getstate__(self) -> list[Any]:
        return [self.metadata, super().__getstate__()]

    def __setstate__(self, state: list[Any]) -> None:
        self.metadata, image = state
        super().__setstate__(image)


class _Reporter(LogReporter):
    """Reports as to a program, and shows downloads on a terminal."""

    def transfer(self) -> AbstractContextManager[TransferReporter]:
        console = _terminal()
        return console.transfer() if console else super().transfer()


class Output(NamedTuple):
    """What a call draws: `images` and the recipe of each."""

    images: "list[SanaImage] | np.ndarray | torch.Tensor"
    recipes: list[Recipe]


class Pipeline:
    """A model on a device. Its networks stay loaded from one call to the next, within the memory
    that there is, until `close`, the end of a `with`, or never with `keep_loaded=False`.

    Calls from several threads queue.
    """

    # No other attributes: setting one that diffusers has would do nothing, without a word.
    __slots__ = ("_settings", "model", "session")

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
        _refuse_unknown(options, "Pipeline", AT_LOAD, {"Pipeline.generate": PER_CALL})
        chosen = {name: one.default for name, one in AT_LOAD.items()} | options
        chosen["model"] = os.fspath(model) if model is not None else None
        for name in ("dtype", "device"):  # torch.bfloat16 and torch.device("cpu") have names
            chosen[name] = str(chosen[name]).removeprefix("torch.")
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
            reporter=_Reporter(),
        )
        _ = self.device  # which may not be here

    @classmethod
    def from_pretrained(cls, model: str | os.PathLike[str], **options: Any) -> Self:
        """The same as `Pipeline(model, …)`; `torch_dtype` is taken for `dtype`."""
        return cls(model, **diffusers_compat.translate(options, diffusers_compat.LOAD))

    @property
    def device(self) -> str:
        return self.session.device

    def to(self, device: "str | torch.device") -> Self:
        """Draw on another device from now on, and return this pipeline. Networks are loaded again
        there; the same seeds give the same noise. UsageError if the device is not here.
        """
        self.session.move(str(device))
        return self

    def generate(
        self,
        prompt: str | Iterable[str],
        *,
        seed: int | str | Iterable[int] | None = None,
        count: int | None = None,
        progress: Watch = None,
        **settings: Any,
    ) -> list[SanaImage]:
        """Draw every prompt with every seed: all seeds of the first prompt come first.

        `seed` is one, with the `count - 1` after it, or several, also as a text such as "1..8", or
        None for a random one; the rest means what the options of `sana generate` mean, and gives
        the same pixels. `progress` is called with each event of `sana_cli.pipeline.draw`: Progress
        as a step is done or a network loaded, ImageDone as an image is finished. Without, bars are
        shown on a terminal, but not for `progress=False`.

        A SanaError is raised for what no model takes (UsageError), weights that are not here
        (MissingModel) or unusable (BrokenModel), too little memory (NotEnoughMemory) or disk
        (DiskFull), and an image that came out as NaN or flat (BadImage). Images that were
        finished before it reach `progress` only.
        """
        _refuse_unknown(settings, "generate", PER_CALL, {"Pipeline": AT_LOAD})
        if seed is not None and not isinstance(seed, str):
            seed = ",".join(map(str, seed if isinstance(seed, Iterable) else [seed]))
        numbers = parse_seeds(seed, count)
        asked = self._asked(prompt, settings)
        if not asked:
            return []
        images: dict[int, SanaImage] = {}
        with self.session.exclusive():
            request = self._request(asked, [numbers] * len(asked))
            for event in self._draw(request, progress):
                self._keep_image(event, request, images)
        return [images[index] for index in range(len(request.recipes))]

    def __call__(
        self,
        prompt: str | Iterable[str],
        *,
        width: int | None = None,
        height: int | None = None,
        generator: "torch.Generator | int | Sequence[torch.Generator | int] | None" = None,
        output_type: str | None = "pil",
        callback_on_step_end: "Callable[..., dict[str, Any] | None] | None" = None,
        progress: Watch = None,
        **arguments: Any,
    ) -> Output:
        """Draw as diffusers' pipelines do, with their arguments; `.images` has the result.

        `negative_prompt`, `num_inference_steps`, `guidance_scale` and `num_images_per_prompt` are
        diffusers' names for `negative`, `steps`, `guidance` and `count`; the options of `generate`
        are taken as well. `width` and `height` are those of the image, which is drawn in the
        nearest trained shape, resized and cropped (`fit="exact"`: only cropped).

        `generator` is a torch generator on the CPU that was just seeded, for one image; a list
        with one for each image; or a seed, with the next ones for the next images. A generator
        gives the image that diffusers draws with it, and is left as diffusers leaves it.

        `output_type` is "pil" for images with recipes; "np" for float32 (N, height, width, 3) in
        [0, 1], in steps of 1/255; or "latent" for the latents, float32 (N, 32, h, w), which are
        not decoded. `recipes` has the recipe of each.

        `callback_on_step_end(pipeline, step, timestep, {"latents": …})` is called after each step
        of each image, as images are drawn one by one; the latents are a copy, (1, 32, h, w). To
        stop, raise an exception. UsageError if it returns or makes other latents, as then no
        recipe would describe the image.
        """
        settings = diffusers_compat.translate(arguments, diffusers_compat.CALL)
        count = settings.pop("count", None)
        _refuse_unknown(settings, "Pipeline(…)(…)", CALLED, {"Pipeline": AT_LOAD})
        if output_type not in diffusers_compat.OUTPUTS:
            known = ", ".join(diffusers_compat.OUTPUTS)
            raise UsageError(f"output_type {output_type!r} is not one of {known}")
        if size := diffusers_compat.resolution(width, height):
            if "res" in settings:
                raise TypeError("res is the width and height; give one of them")
            settings["res"] = size
        if settings.get("negative") is None:
            settings.pop("negative", None)
        asked = self._asked(prompt, settings)
        if not asked:
            raise UsageError("no prompt is given")
        seeds = diffusers_compat.seeds_of(generator, len(asked), count)
        from sana_cli.pipeline.events import Latents

        latents: dict[int, Latents] = {}
        images: dict[int, SanaImage] = {}
        as_latents = output_type == "latent"
        with self.session.exclusive():
            request = replace(
                self._request(asked, seeds),
                latents=as_latents or callback_on_step_end is not None,
                decoded=not as_latents,
            )
            for event in self._draw(request, progress):
                if isinstance(event, Latents):
                    latents[event.index] = event
                    if callback_on_step_end is not None:
                        self._call_back(callback_on_step_end, event)
                self._keep_image(event, request, images)
        import torch

        from sana_cli.pipeline.draw import draw_all_noise

        recipes = request.recipes
        generators = generator if isinstance(generator, Sequence) else [generator]
        for one, recipe in zip(generators, recipes, strict=False):
            if isinstance(one, torch.Generator):
                draw_all_noise(recipe, request.files, one)
        if as_latents:
            found = [latents[index].tensor.cpu() for index in range(len(recipes))]
            return Output(torch.cat(found), recipes)
        drawn = [images[index] for index in range(len(recipes))]
        if output_type == "np":
            pixels = np.stack([np.asarray(image) for image in drawn])
            return Output(pixels.astype(np.float32) / 255, recipes)
        return Output(drawn, recipes)

    def _asked(self, prompt: str | Iterable[str], settings: dict[str, Any]) -> list[Settings]:
        """The settings of each prompt, with the values that Python has for text."""
        texts: dict[str, Any] = {}
        for name, one in PER_CALL.items():
            value = settings.get(name)
            if one.kind is str and not one.repeated and isinstance(value, int | os.PathLike):
                texts[name] = str(value)  # res=512, image=Path(…)
            elif one.kind is str and not one.repeated and not isinstance(value, str | None):
                wanted = "the path of a file" if is_path(one) else "text"
                raise TypeError(f"{name} is {wanted}, not {value!r}")
            if one.repeated and name in settings:
                several = [value] if isinstance(value, str | os.PathLike) else value or ()
                texts[name] = tuple(map(str, several))
        prompts = [prompt] if isinstance(prompt, str) else prompt
        return [Settings(text, **self._settings | settings | texts) for text in prompts]

    def _request(self, asked: list[Settings], seeds: list[list[int]]) -> "DrawRequest":
        """Resolve a call: the recipes of each prompt with its own seeds."""
        request = self.session.request(asked, seeds[0][:1])
        recipes = [
            replace(recipe, seed=seed)
            for recipe, own in zip(request.recipes, seeds, strict=True)
            for seed in own
        ]
        return replace(request, recipes=recipes)

    def _draw(self, request: "DrawRequest", progress: Watch) -> "Iterator[Event]":
        """Yield the events of a request, and show them. Its first failure is raised."""
        from sana_cli.pipeline.events import Failure, Notice

        reporter = self.session.reporter
        with _shown(progress) as show:
            for event in self.session.draw(request):
                show(event)
                match event:
                    case Failure(error=error):
                        raise error
                    case Notice(text, warning):
                        (reporter.warn if warning else reporter.info)(text)
                yield event

    def _keep_image(
        self, event: "Event", request: "DrawRequest", images: dict[int, SanaImage]
    ) -> None:
        """Add the image of an event, if it has one."""
        from sana_cli.pipeline.events import ImageDone

        if isinstance(event, ImageDone):
            metadata = self.session.metadata(request.recipes[event.index])
            images[event.index] = with_metadata(Image.fromarray(event.pixels), metadata)

    def _call_back(self, callback: Callable[..., dict[str, Any] | None], event: "Latents") -> None:
        latents = event.tensor.clone()
        returned = callback(self, event.step, event.timestep, {"latents": latents}) or {}
        for tensor in (latents, returned.get("latents", latents)):
            if not tensor.equal(event.tensor):
                raise UsageError(
                    "callback_on_step_end gave other latents, which no recipe describes",
                    "return the latents as they are, or {}",
                )

    def close(self) -> None:
        """Release the networks. The pipeline can be used again, and then loads them again."""
        self.session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def __repr__(self) -> str:
        options = [
            f"{name}={value!r}"
            for name, value in self._settings.items()
            if value != AT_LOAD[name].default and name != "model"
        ]
        networks = self.session.networks
        loaded = ", ".join(key.part for key in networks.loaded)
        size = f" ({gigabytes(networks.held_bytes)})" if loaded else ""
        call = ", ".join([f"Pipeline {self.model or 'by res'} on {self.device}", *options])
        return f"<{call}: {loaded or 'nothing'} loaded{size}>"


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


# --- bars, on a terminal -----------------------------------------------------------------------


def _terminal() -> "Console | None":
    """The terminal that stderr is, if bars can be shown there."""
    if not (sys.stderr and sys.stderr.isatty()):
        return None
    from sana_cli.ui import Console

    console = Console()
    return console if console.live else None


@contextmanager
def _shown(progress: Watch) -> "Iterator[Callable[[Event], None]]":
    """Yield a function that shows events as `progress` says."""
    console = _terminal() if progress is None else None
    if progress:
        yield progress
    elif console is None:
        yield lambda event: None
    else:
        from sana_cli.ui import STAGES, StageBars

        with StageBars(console, STAGES) as bars:
            yield bars.show


# --- arguments, as they are declared -----------------------------------------------------------


def _refuse_unknown(
    given: dict[str, Any], call: str, known: dict[str, Any], others: dict[str, dict[str, Any]]
) -> None:
    """TypeError for an argument that is not declared, or that only another call takes."""
    for name in given:
        if name not in known:
            elsewhere = next((other for other, taken in others.items() if name in taken), None)
            raise diffusers_compat.unknown(name, call, known, elsewhere)


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
