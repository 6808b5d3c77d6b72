"""About how long images will take on this machine: as they took before, else predicted.

A run keeps what its stages took (`pipeline.timings`). Before the first run of such images, a stage
is predicted to take

    FLOP / (matrix rate · products) + bytes · bytes / copy bandwidth + operations · each

seconds, with the numbers of `EFFICIENCY` and with a rate and share of its own for 8-bit products.
What there is to do is counted as it runs here (`bench.counted`), and the rates are measured in
about a second; both are kept in the cache folder.
"""

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from sana_cli import __version__
from sana_cli.bench.counted import (
    SAMPLE,
    Capability,
    Count,
    cells_of,
    count_decode,
    count_image,
    count_step,
    count_text,
)
from sana_cli.pipeline import timings
from sana_cli.recipe import Recipe
from sana_cli.session import Session
from sana_cli.system.json_cache import JsonCache
from sana_cli.units import rough_time
from sana_cli.weights.model_files import ModelFiles

RATES, COUNTS = "rates.json", "counts.json"  # in the cache folder
LIMIT = 200  # values in each
COPY = "copy"  # the rate of copies, in bytes read and written a second
# FLOP for which CPUs need many seconds, a quarter of an image of the smallest released model. For
# images of fewer nothing is measured: it would take as long as they do.
LONG = 2e12


class Efficiency(NamedTuple):
    """How far a kind of device falls short of its rates."""

    products: float  # share of the matrix rate that products reach
    products8: float  # the same of 8-bit products
    texts: float  # the same of a text encoder, whose inputs have few rows
    bytes: float  # times that a byte takes as long as in a copy; below 1 if products hide it
    each: float  # seconds that an operation takes, however small


EFFICIENCY = {
    # Fitted on one thread of an x86-64 machine with AVX-512, 250 GFLOP/s in float32 and 38 GB/s.
    # Predicted to measured seconds there, when idle: 20 steps of `demo` at 256² 0.8, at 512² 1.3,
    # decodes 1.1 and 0.9; of the 0.6B at 512² a text 1.0, steps 1.1, a decode 1.1.
    "cpu": Efficiency(0.85, 0.85, 0.5, 2.0, 40e-6),
    # Not measured yet. Products take as long as cuBLAS's usually do. They hide most bytes: of the
    # 5.4 GB of a step of the 0.6B at 1024², 2.1 are not read or written by a product. A launch from
    # a CUDA graph takes 1.6 µs. In 8 bits sums of 64 channels are converted and scaled as well.
    "cuda": Efficiency(0.85, 0.7, 0.5, 0.4, 1.6e-6),
}


@dataclass(frozen=True)
class Expected:
    """What images are expected to take. Starting, loading and saving come on top of `seconds`."""

    seconds: float  # of texts, denoising and decoding
    load_seconds: float | None  # of all networks, if none is loaded; None: not known
    images: int
    measured: bool  # whether a run has been timed; else it is predicted

    def __add__(self, other: "Expected") -> "Expected":
        loads = self.load_seconds, other.load_seconds
        return Expected(
            self.seconds + other.seconds,
            None if None in loads else sum(filter(None, loads)),
            self.images + other.images,
            self.measured and other.measured,
        )

    def __str__(self) -> str:
        text = f"about {rough_time(self.seconds)}"
        text += f" for {self.images} images" if self.images > 1 else ""
        if self.load_seconds is None:
            text += ", without loading"
        else:
            text += f" and up to {rough_time(self.load_seconds)} of loading"
        return f"{text}, {'measured on' if self.measured else 'predicted for'} this machine"

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, for JSON documents."""
        loading = None if self.load_seconds is None else round(self.load_seconds, 3)
        facts = {"seconds": round(self.seconds, 3), "load_seconds": loading}
        return facts | {"images": self.images, "measured": self.measured}


class Forecaster:
    """Makes forecasts for a device, under the user's memory limit in bytes."""

    def __init__(
        self,
        device: str,
        limit: int | None,
        folder: Path | None,
        tell: Callable[[str], None],
    ) -> None:
        """`folder` is that of the cache, None to keep nothing; `tell` hears of measurements."""
        self.device, self.limit, self.folder, self.tell = device, limit, folder, tell
        self.rates, self.counts = (
            JsonCache(folder and folder / name, LIMIT) for name in (RATES, COUNTS)
        )

    @classmethod
    def of(cls, session: Session) -> "Forecaster":
        return cls(session.device, session.memory, session.cache_folder(), session.reporter.info)

    def expected(
        self, recipes: Sequence[Recipe], files: ModelFiles, measure: bool = False
    ) -> Expected | None:
        """Return what images of one model take; None if that is neither known nor predicted.

        Rates and counts that are not kept are found now if the images take long, or to `measure` is
        asked for.
        """
        alike: dict[Any, list[Recipe]] = {}
        for recipe in recipes:
            kind = timings.kind_of(recipe), steps_of(recipe)
            alike.setdefault(kind, []).append(recipe)
        total: Expected | None = None
        for group in alike.values():
            found = self._timed(group) or self._predicted(group, files, measure)
            if found is None:
                return None
            total = found if total is None else total + found
        return total

    def _timed(self, recipes: list[Recipe]) -> Expected | None:
        found = timings.read(recipes[0], self.device, self.limit, self.folder)
        if not found.whole:
            return None
        load = sum(found.load.values()) if found.load else None
        return Expected(_total(recipes, found.stages), load, len(recipes), True)

    def _predicted(
        self, recipes: list[Recipe], files: ModelFiles, measure: bool
    ) -> Expected | None:
        first = recipes[0]
        long = len(recipes) * steps_of(first) * least_flops(first, files) > LONG
        stages = self.stages(first, files, measure or long)
        if stages is None:
            return None
        return Expected(_total(recipes, stages), None, len(recipes), False)

    def stages(self, recipe: Recipe, files: ModelFiles, measure: bool) -> dict[str, float] | None:
        """Predict the seconds of a text ("encode"), of a "step", of a "decode", and of all input
        images of an image ("image"), if it has any.

        None if they are not predicted, or if something is not kept and not to be measured.
        """
        efficiency = EFFICIENCY.get(self.device.split(":")[0])
        if efficiency is None:
            return None
        precisions = {
            "encode": recipe.dit_dtype if recipe.text_dtype == "int8" else recipe.text_dtype,
            "image": recipe.vae_dtype,
            "step": recipe.products,
            "decode": recipe.vae_dtype,
        }
        wanted = [COPY, *precisions.values(), *(["int8"] if recipe.quant else [])]
        rates = {what: self.rate(what, measure) for what in wanted}
        counts = self.count(recipe, files, measure)
        if counts is None or None in rates.values():
            return None
        return {
            stage: seconds(
                count,
                Rates(rates[precisions[stage]], rates[COPY], rates.get("int8")),
                efficiency,
                stage == "encode",
            )
            for stage, count in counts.items()
        }

    def rate(self, what: str, measure: bool = True) -> Any:
        """Return the FLOP per second of products in a precision, or the bytes per second of "copy".

        One that is not kept is measured, or None without `measure`.
        """
        key = [*timings.machine_key(self.device), what]
        found = self.rates.get(*key)
        if isinstance(found, float) and found > 0:
            return found
        if not measure:
            return None
        from sana_cli.bench.roofline import bandwidth, matrix_rate

        if what == COPY:
            self.tell("measuring how fast this machine copies")
            found = bandwidth(self.device)
        else:
            self.tell(f"measuring how fast this machine multiplies in {what}")
            found = matrix_rate(self.device, what)
        self.rates.put(found, *key)
        return found

    def keep_rates(self, rates: dict[str, Any]) -> None:
        """Keep the rates of `bench.phases`, unless this machine was faster before."""
        for what, rate in {COPY: rates["bytes_per_second"], **rates["flops_per_second"]}.items():
            if rate > (self.rate(what, measure=False) or 0.0):
                self.rates.put(rate, *timings.machine_key(self.device), what)

    def count(self, recipe: Recipe, files: ModelFiles, anew: bool) -> dict[str, Count] | None:
        """Return the counts of the stages; None if some are not kept and not to be found `anew`."""
        capability = capability_of(self.device)
        size = recipe.native_width, recipe.native_height
        how = recipe.dit_dtype, recipe.guidance > 1, recipe.negative == "", recipe.quant
        more = recipe.control and repr(files.controlnet), recipe.pag and recipe.pag_layer
        step = "step", repr(files.dit), files.vae.compression, *size, *how, *more, capability
        vae = repr(files.vae), recipe.vae_dtype, capability
        finders = {
            "step": (partial(count_step, recipe, files, capability), step),
            "decode": (partial(count_decode, recipe, files, capability), ("decode", *vae)),
        }
        if recipe.image is not None or recipe.control is not None:
            finders["image"] = partial(count_image, recipe, files, capability), ("image", *vae)
        counts = {"encode": count_text(recipe, files)}
        for stage, (find, key) in finders.items():
            found = self._kept_count(*key)
            if found is None:
                if not anew:
                    return None
                found = find()
                self.counts.put(astuple(found), __version__, *key)
            counts[stage] = found
        for stage in counts.keys() & {"image", "decode"}:
            counts[stage] = counts[stage].enlarged(cells_of(recipe, files) / SAMPLE**2)
        if recipe.image is not None and recipe.control is not None:
            counts["image"] *= 2
        return counts

    def _kept_count(self, *key: Any) -> Count | None:
        try:
            return Count(*map(float, self.counts.get(__version__, *key)))
        except (TypeError, ValueError):  # nothing, or broken
            return None


class Rates(NamedTuple):
    products: float  # FLOP/s
    bytes: float  # read and written in a second
    products8: float | None = None  # FLOP/s of 8-bit products


def seconds(count: Count, rates: Rates, efficiency: Efficiency, text: bool = False) -> float:
    """Predict the seconds of a stage."""
    share = efficiency.texts if text else efficiency.products
    busy = count.flops / (rates.products * share) + count.bytes * efficiency.bytes / rates.bytes
    if count.flops8:
        assert rates.products8 is not None, "there are 8-bit products"
        busy += count.flops8 / (rates.products8 * efficiency.products8)
    return busy + count.operations * efficiency.each


def steps_of(recipe: Recipe) -> int:
    """Return the number of steps that run, which is less than that of the schedule for an image."""
    if recipe.strength is None:
        return recipe.steps
    from sana_cli.pipeline.solver import first_step  # imports torch

    return recipe.steps - first_step(recipe.steps, recipe.strength)


def least_flops(recipe: Recipe, files: ModelFiles) -> float:
    """Return what a step has at least: the products of all tokens with weights of width²."""
    return 2 * 23 * files.dit.num_layers * files.dit.width**2 * cells_of(recipe, files)


def capability_of(device: str) -> Capability:
    """Return the compute capability of a GPU on which the kernels run; else None."""
    if not device.startswith("cuda"):
        return None
    import torch

    from sana_cli.kernels.dispatch import fallback_reason

    if fallback_reason(torch.device(device)) is not None:
        return None
    return torch.cuda.get_device_capability(device)


def _total(recipes: list[Recipe], stages: dict[str, float]) -> float:
    """Return the seconds of images that are alike but for prompt and seed."""
    image = steps_of(recipes[0]) * stages["step"] + stages["decode"] + stages.get("image", 0.0)
    texts = len({recipe.prompt for recipe in recipes})
    return texts * stages["encode"] + len(recipes) * image
