"""The one way from settings to images: resolve → plan → draw, over networks that stay loaded.

The command line, `Pipeline` in Python, the batch runner and the benchmarks each hold a `Session`.
It reports through a `Reporter` and yields events; it never prints. Calls from several threads
queue.
"""

import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sana_cli.errors import SanaError
from sana_cli.recipe import Adapter, adapters_of
from sana_cli.reporter import LogReporter, Reporter
from sana_cli.resolve import Inputs, Resolution, resolve
from sana_cli.settings import FileOptions, Settings
from sana_cli.weights.catalogue import Model
from sana_cli.weights.fetch import fetch_lora, open_component, open_or_fetch
from sana_cli.weights.hub_cache import find_parts
from sana_cli.weights.vocabulary import unknown_words, unknown_words_warning, vocabulary

if TYPE_CHECKING:
    from sana_cli.images.metadata import Metadata
    from sana_cli.pipeline.events import Event, ImageDone
    from sana_cli.pipeline.networks import Networks
    from sana_cli.pipeline.plan import Plan
    from sana_cli.recipe import Recipe
    from sana_cli.weights.model_files import ModelFiles


@dataclass(frozen=True)
class DrawRequest:
    """What to draw: recipes of one model in one precision, its files, and the input images."""

    model: Model
    files: "ModelFiles"
    recipes: "list[Recipe]"
    inputs: Inputs = field(default_factory=Inputs)
    warnings: tuple[str, ...] = ()
    latents: bool = False  # yielded after every step
    decoded: bool = True  # into images; without, the last latents are the result

    def lora_names(self) -> list[tuple[str, float]]:
        """The file and the scale of every LoRA, in order."""
        adapters = adapters_of(self.recipes[0])
        return [(str(self.inputs.loras[a.sha256]), a.scale) for a in adapters]


class Session:
    """Networks on a device, and everything that it takes to draw with them."""

    def __init__(
        self,
        *,
        device: str = "auto",
        memory: int | None = None,
        cache: bool = True,
        offline: bool = False,
        keep_loaded: bool = True,
        reporter: Reporter | None = None,
    ) -> None:
        """`memory` is a limit in bytes, None for what is free. `cache` is whether text states are
        kept on disk. With `keep_loaded` networks stay in memory until `close`; without, each is
        released as soon as a call needs it no more. Nothing is imported or loaded yet.
        """
        self.memory, self.cache, self.offline = memory, cache, offline
        self.keep_loaded = keep_loaded
        self.reporter: Reporter = reporter or LogReporter()
        self._asked_device = device
        self._device: str | None = None
        self._networks: Networks | None = None
        self._overhead: int | None = None  # bytes that the process held before any network
        self._described: list[str] = []  # of the last plan that was reported
        self._told_products = False  # how fast the CPU computes them
        self._turn = threading.Lock()
        self._owner: int | None = None  # the thread whose turn it is
        self._is_drawing = False

    @property
    def device(self) -> str:
        """The device that is used. UsageError if it is not here."""
        if self._device is None:
            from sana_cli.kernels.dispatch import chosen_path
            from sana_cli.system.devices import choose_device

            self._device = choose_device(self._asked_device)
            self.reporter.detail("kernels: {} path, as {}".format(*chosen_path(self._device)))
        return self._device

    def move(self, device: str) -> None:
        """Draw on another device from now on. UsageError if it is not here."""
        from sana_cli.system.devices import choose_device

        with self.exclusive():
            choose_device(device)
            if device == self._asked_device:
                return
            self.close()
            self._asked_device, self._device = device, None

    @property
    def networks(self) -> "Networks":
        """The networks that are loaded."""
        if self._networks is None:
            from sana_cli.pipeline.networks import Networks

            self._networks = Networks(self.keep_loaded)
        return self._networks

    def cache_folder(self) -> Path | None:
        from sana_cli.system.folders import cache_folder

        return cache_folder() if self.cache else None

    def metadata(self, recipe: "Recipe") -> "Metadata":
        """The metadata of a file of this recipe, drawn here."""
        from sana_cli.images.metadata import Metadata
        from sana_cli.system.devices import torch_version

        return Metadata(recipe, self.device, torch_version().__version__)

    def encode(
        self, image: "ImageDone", recipe: "Recipe", format: str, files: FileOptions
    ) -> bytes:
        """Encode an image of a recipe drawn here; `format` is what `files` amount to."""
        from sana_cli.images.files import encode

        record = self.metadata(recipe) if files.metadata == "full" else None
        return encode(image.pixels, format, files.quality, record)

    def peak_bytes(self) -> int:
        """The most memory held so far."""
        from sana_cli.system.devices import peak_bytes

        return peak_bytes(self.device)

    # --- resolve and plan ----------------------------------------------------------------------

    def resolve(self, settings: Settings, inputs: Inputs) -> Resolution:
        """Resolve settings as far as the catalogue allows, adding the input image to `inputs`."""
        return resolve(settings, inputs)

    def is_here(self, model: Model) -> bool:
        """Whether nothing of a model would have to be fetched."""
        return find_parts(model) is not None

    def with_components(
        self, resolution: Resolution, files: "ModelFiles", *, dry_run: bool = False
    ) -> "ModelFiles":
        """The files of a model with the autoencoder and the ControlNet that a resolution names.

        They are fetched if they are not here, unless this is a dry run. BrokenModel for one that
        does not fit the model.
        """
        from sana_cli.weights.model_files import with_controlnet, with_vae

        offline = self.offline or dry_run
        if resolution.vae is not None:
            part = open_component(resolution.vae, self.reporter, offline)
            files = with_vae(files, part)
        if resolution.controlnet is not None:
            part = open_component(resolution.controlnet, self.reporter, offline)
            files = with_controlnet(files, part)
        return files

    def with_loras(
        self,
        resolution: Resolution,
        inputs: Inputs,
        files: "ModelFiles",
        *,
        dry_run: bool = False,
    ) -> Resolution:
        """Find the LoRAs of a resolution, and identify them.

        They are fetched if they are not here, unless this is a dry run. Their files are added to
        `inputs`. UsageError for one that does not fit the model.
        """
        if not resolution.loras:
            return resolution
        from sana_cli.weights.lora import fit, read_lora, remarks

        offline = self.offline or dry_run
        adapters = []
        for choice in resolution.loras:
            place = choice.place
            path = place if isinstance(place, Path) else fetch_lora(place, self.reporter, offline)
            lora = read_lora(path)
            fit(lora, files.dit)
            if lora.sha256 not in inputs.loras:
                names = (resolution.model.name, resolution.model.source)
                for text in remarks(lora, files.dit, names):
                    self.reporter.warn(text)
            inputs.loras[lora.sha256] = path
            adapters.append(Adapter(lora.sha256, choice.scale))
        return replace(resolution, adapters=tuple(adapters))

    def open(self, model: Model, *, dry_run: bool = False) -> "ModelFiles":
        """Read the configs of a model, after fetching it if it is not on this machine.

        A dry run fetches nothing: the configs of a missing model are the released ones.
        """
        return open_or_fetch(model, self.reporter, offline=self.offline, dry_run=dry_run)

    def vocabulary(self, model: Model, files: "ModelFiles | None") -> frozenset[str] | None:
        """Return the words that a model, of these files, was trained on; None if not known."""
        return vocabulary(files.parts) if files is not None else None

    def about_words(
        self, model: Model, files: "ModelFiles | None", settings: Sequence[Settings]
    ) -> tuple[str, ...]:
        """Return the warning of words that a model was not trained on, if there are any."""
        texts = [text for one in settings for text in (one.prompt, one.negative)]
        unknown = unknown_words(texts, self.vocabulary(model, files))
        return (unknown_words_warning(model.name, unknown),) if unknown else ()

    def request(
        self,
        settings: Sequence[Settings],
        seeds: Sequence[int],
        inputs: Inputs | None = None,
        *,
        dry_run: bool = False,
    ) -> DrawRequest:
        """Resolve a call: every prompt with every seed, in this order.

        The settings may differ in their prompts only. What is wrong with them is found before
        torch is imported; then the model is opened, and fetched unless this is a dry run. `inputs`
        holds those that are not files, by the names that the settings give.
        """
        inputs = Inputs() if inputs is None else inputs
        resolutions = [self.resolve(one, inputs) for one in settings]
        first = resolutions[0]
        files = self.open(first.model, dry_run=dry_run)
        files = self.with_components(first, files, dry_run=dry_run)
        adapters = self.with_loras(first, inputs, files, dry_run=dry_run).adapters
        resolutions = [replace(one, adapters=adapters) for one in resolutions]
        chosen = files, self.device, seeds, self.memory
        recipes = [r for one in resolutions for r in one.recipes(*chosen)]
        warnings = first.all_warnings(files, self.device, self.memory)
        warnings = *warnings, *self.about_words(first.model, files, settings)
        return DrawRequest(first.model, files, recipes, inputs, warnings)

    def plan(self, request: DrawRequest, *, predict: bool = False) -> "Plan":
        """Plan how this machine draws a request, and report it.

        With `predict` the peaks are predicted even where there is plainly room. NotEnoughMemory
        if no plan fits.
        """
        from sana_cli.pipeline.peaks import PeakCache
        from sana_cli.pipeline.plan import make_plan
        from sana_cli.system.devices import resident_bytes

        held = self._networks.held_on(self.device) if self._networks is not None else 0
        if self.memory is not None and not held:
            import sana_cli.pipeline.draw  # noqa: F401 - its libraries count against the limit

            self._overhead = resident_bytes()
        cache = PeakCache(self.cache_folder())
        plan = make_plan(
            request.recipes,
            request.files,
            self.device,
            self.memory,
            predict=predict,
            held=held,
            overhead=self._overhead,
            cache=cache,
        )
        if cache.fault is not None:
            self.reporter.warn(f"the cache in {cache.folder} cannot be written: {cache.fault}")
        for text in (*request.warnings, *self._about_quantisation(request)):
            self.reporter.warn(text)
        if plan.describe() != self._described:  # of a batch, once and not for every round
            self._described = plan.describe()
            for text in self._described:
                self.reporter.info(text)
        return plan

    def _about_quantisation(self, request: DrawRequest) -> Iterator[str]:
        """Warn where 8-bit products are no faster than others."""
        quant = request.recipes[0].quant
        if quant is not None:
            from sana_cli.kernels.rows8 import chosen_products

            fast, reason = chosen_products(self.device, request.files.dit.width)
            if not fast:
                yield f"--quant {quant} is no faster on this machine: {reason}"

    # --- draw ----------------------------------------------------------------------------------

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Wait for the turn of this thread, and keep it: what is planned here is drawn like that.

        Nested use in one thread is free.
        """
        if self._owner == threading.get_ident():
            yield
            return
        with self._turn:
            self._owner = threading.get_ident()
            try:
                yield
            finally:
                self._owner = None

    def draw(
        self, request: DrawRequest, plan: "Plan | None" = None, previews: int = 0
    ) -> "Generator[Event, None, None]":
        """Draw the recipes of a request; the events of `pipeline.draw`, as they happen.

        The plan is made now if there is none. `previews` are asked for of each image.

        The turn of this thread ends with the last event, or when the generator is closed. How long
        a run took is kept with its end. SanaError if this thread is drawing already, as a callback
        that draws would be.
        """
        from sana_cli.pipeline import packing
        from sana_cli.pipeline.draw import draw
        from sana_cli.pipeline.timings import Stopwatch

        with self.exclusive():
            if self._is_drawing:
                raise SanaError("this session is already drawing in this thread")
            self._is_drawing = True
            watch, folder = Stopwatch(), self.cache_folder()
            try:
                if self.device == "cpu" and not self._told_products:
                    self._told_products = True
                    if rates := packing.rates(folder):
                        self.reporter.detail(f"products: {rates}")
                for event in draw(
                    request.recipes,
                    request.files,
                    plan or self.plan(request),
                    networks=self.networks,
                    images=request.inputs,
                    loras=request.inputs.loras,
                    cache=folder,
                    previews=previews,
                    latents=request.latents,
                    decoded=request.decoded,
                ):
                    watch.see(event)
                    yield event
                watch.keep(request.recipes, self.device, self.memory, folder)
            finally:
                self._is_drawing = False

    def close(self) -> None:
        """Release every network; the session can be used again."""
        with self.exclusive():
            if self._networks is not None:
                self._networks.clear(self.device)

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()
