"""One run of `sana bench`: prepare subjects, measure one after the other, and sum up."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sana_cli.errors import MissingModel, UsageError

if TYPE_CHECKING:
    from sana_cli.bench.phases import BenchRun
    from sana_cli.pipeline.events import Event
    from sana_cli.pipeline.plan import Plan
    from sana_cli.resolve import Resolution
    from sana_cli.session import DrawRequest, Session

PROMPT = "a red circle on a blue background"
AMPLE = 2**62  # bytes
UNSTEADY = 1.5  # times that rates may differ before and after the runs

Sides = tuple[int, int]  # (width, height) in pixels
Watch = Callable[[str, int, int], None]  # of a bar, how much is done, and of how much


class Competitor(StrEnum):
    diffusers = "diffusers"
    compiled = "diffusers-compiled"


@dataclass(frozen=True)
class Subject:
    """A model at a size, prepared for measuring."""

    request: "DrawRequest"
    plan: "Plan"
    random: bool
    own_tokenizer: bool


def parse_sizes(asked: list[str] | None) -> dict[str | None, Sides | None]:
    """`["512,1k", "300x200"]` -> (width, height) of each in pixels, the next multiples of 32;
    {None: None}, the model's own, where nothing is asked for."""
    from sana_cli.shapes import parse_resolution

    if not asked:
        return {None: None}
    sizes: dict[str | None, Sides | None] = {}
    for size in ",".join(asked).split(","):
        if not size.strip():
            raise UsageError(f"--res {','.join(asked)!r} has an empty size", "write --res 512,1024")
        request = parse_resolution(size)
        width, height = request.side or request.width, request.side or request.height
        sizes[size] = math.ceil(width / 32) * 32, math.ceil(height / 32) * 32
    return sizes


def resolve_at(model: str | None, size: str | None, asked: dict[str, Any]) -> "Resolution":
    """Resolve a size, which chooses the model if none is named.

    A model that is named draws any size, see `make_subject`.
    """
    from sana_cli.resolve import Inputs, resolve
    from sana_cli.settings import Settings

    settings = Settings(PROMPT, model=model, res=None if model else size, **asked)
    return resolve(settings, Inputs())


def make_subject(
    session: "Session",
    resolution: "Resolution",
    sides: Sides | None,
    count: int,
    random: bool,
    competitor: Competitor | None,
    folder: Path,
) -> Subject:
    """Prepare a model at a size. MissingModel if its weights are needed and are not here."""
    from sana_cli.session import DrawRequest
    from sana_cli.weights.hub_cache import find_parts

    model, device = resolution.model, session.device
    found = find_parts(model)
    if random:
        from sana_cli.bench.random_weights import random_model

        files = random_model(model, found, folder / model.name, device)
    elif found is None:
        raise MissingModel(
            f"the weights of {model.name} are not on this machine",
            "add --random-weights, which costs the same, or use --model demo"
            + (f", or: sana models pull {model.name}" if model.architecture else ""),
        )
    else:
        files = session.open(model)
    first = resolution.recipe(files, device, 1, session.memory)
    # As large as was asked for, whether or not the model was trained for it: the work is the same.
    width, height = sides or (first.native_width, first.native_height)
    first = replace(first, native_width=width, native_height=height, width=width, height=height)
    if competitor is not None and first.text_dtype == "int8":
        from sana_cli.system.devices import wide_dtype

        first = replace(first, text_dtype=wide_dtype(device))
        text = f"the text encoder runs in {first.text_dtype}, as that of diffusers does"
        session.reporter.info(text)
    recipes = [replace(first, seed=1 + i) for i in range(count)]
    request = DrawRequest(model, files, recipes)
    own_tokenizer = not random or found is not None
    return Subject(request, session.plan(request), random, own_tokenizer)


def check_comparable(before: dict[str, Any], subjects: list[Subject]) -> None:
    """Raise UsageError before the runs if the baseline has none of the subjects."""
    known = {(size["model"], size["width"], size["height"]) for size in before["sizes"]}
    firsts = [subject.request.recipes[0] for subject in subjects]
    if not any((first.model, first.width, first.height) in known for first in firsts):
        there = ", ".join(f"{model} at {width}x{height}" for model, width, height in sorted(known))
        raise UsageError(f"--compare: nothing that is measured is in there ({there})")


def measure_all(
    session: "Session",
    subjects: list[Subject],
    times: tuple[int, int],
    competitor: Competitor | None,
    folder: Path,
    watch: Watch,
) -> dict[str, Any]:
    """Measure subjects; the document of `sana_cli.bench.phases`. `times` are runs and warm-ups."""
    from sana_cli.bench import phases
    from sana_cli.bench.forecast import Forecaster
    from sana_cli.system.folders import cache_folder
    from sana_cli.system.inventory import power, saving_power

    (runs, warmup), device, reporter = times, session.device, session.reporter
    count = len(subjects[0].request.recipes)
    warnings = saving_power(power())
    for text in warnings:
        reporter.warn(f"expect less than this machine can do: {text}")
    firsts = [subject.request.recipes[0] for subject in subjects]
    precisions = {p for first in firsts for p in (first.products, first.vae_dtype)}
    seen, measured = [], []
    for subject in subjects:
        reporter.info("measuring the machine")
        seen.append(phases.rates(device, precisions))
        measured.append(_runs(session, subject, times, folder, watch))
    document = phases.surroundings(device)  # of a GPU while it is warm
    seen.append(phases.rates(device, precisions))
    compared = [
        _compete(session, subject, times, competitor, folder, watch) if competitor else None
        for subject in subjects
    ]
    rates, apart = phases.best(seen)
    forecaster = Forecaster(device, session.memory, cache_folder(), reporter.info)
    forecaster.keep_rates(rates)
    if apart > UNSTEADY:
        warnings.append(
            f"this machine did the same work up to {apart:.1f} times slower at one time than at"
            " another: does something else run on it?"
        )
        reporter.warn(warnings[-1])
    document |= {"rates": rates, "runs": runs, "warmup": warmup, "count": count}
    document |= {"warnings": warnings, "sizes": []}
    for subject, own, other in zip(subjects, measured, compared, strict=True):
        recipes, files = subject.request.recipes, subject.request.files
        recipe = recipes[0]
        predicted = forecaster.stages(recipe, files, measure=True)
        document["sizes"].append(
            {
                "model": recipe.model,
                "width": recipe.width,
                "height": recipe.height,
                "random_weights": subject.random,
                "tokenizer": "its own" if subject.own_tokenizer else "made up",
                "recipe": recipe.as_dict(),
                "plan": subject.plan.choices(),
                "predicted_peak_bytes": _predicted(subject),
                **phases.summary(own, recipes, files, rates, predicted),
                "against": other,
            }
        )
    return document


def _predicted(subject: Subject) -> dict[str, int]:
    """Predict peaks by stage, after the runs: predicting would itself count as their memory."""
    from sana_cli.pipeline.plan import make_plan

    plan, request = subject.plan, subject.request
    if plan.peaks:
        return plan.peaks
    # There was plainly room, so nothing was cut in pieces.
    return make_plan(request.recipes, request.files, plan.device, AMPLE, predict=True).peaks


def _runs(
    session: "Session", subject: Subject, times: tuple[int, int], folder: Path, watch: Watch
) -> "list[BenchRun]":
    """Run a subject; return the runs after the warm-up. Later forecasts use the last of them."""
    from sana_cli.bench.phases import measure
    from sana_cli.pipeline.events import Notice, Progress
    from sana_cli.pipeline.timings import Stopwatch
    from sana_cli.system.folders import cache_folder

    (runs, warmup), reporter = times, session.reporter
    recipe, done = subject.request.recipes[0], []
    weights = ", random weights" if subject.random else ""
    reporter.info(f"{recipe.model} at {recipe.width}x{recipe.height}{weights}")

    def follow(event: "Event") -> None:
        stopwatch.see(event)
        if isinstance(event, Progress) and event.stage == "denoise":
            watch("denoise", event.done, event.total)
        if isinstance(event, Notice):
            (reporter.warn if event.warning else reporter.detail)(event.text)

    for i in range(warmup + runs):
        stopwatch = Stopwatch()
        run = measure(session, subject.request, subject.plan, folder, follow)
        run.images.clear()
        done.append(run)
        watch("runs", i + 1, warmup + runs)
    if subject.random:
        stopwatch.load.clear()  # their weights are made, not loaded
    stopwatch.keep(subject.request.recipes, session.device, session.memory, cache_folder())
    return done[warmup:]


def _compete(
    session: "Session",
    subject: Subject,
    times: tuple[int, int],
    competitor: Competitor,
    folder: Path,
    watch: Watch,
) -> dict[str, Any]:
    """Run a subject and a competitor in turns; return the result, or why there is none."""
    from sana_cli.bench.competitor import Diffusers, result
    from sana_cli.bench.phases import measure
    from sana_cli.system.devices import release_unused_memory

    runs, warmup = times
    warmup = max(1, warmup)
    session.reporter.info(f"the same with {competitor.value}")
    pairs: list[tuple[BenchRun, BenchRun]] = []
    request, plan = subject.request, subject.plan
    compiled = competitor is Competitor.compiled
    try:
        theirs = Diffusers(request.recipes[0], request.files, plan.device, compiled=compiled)
        shared = replace(request, files=theirs.files_that_share())
        for i in range(warmup + runs):
            if pairs:
                pairs[-1][0].images.clear()
                pairs[-1][1].images.clear()
            ours = measure(session, shared, plan, folder)
            pairs.append((ours, theirs.run(request.recipes)))
            watch("pairs", i + 1, warmup + runs)
        return {"with": competitor.value, **result(theirs, pairs[warmup:])}
    except Exception as error:  # a library's own, whatever it is: that is a result too
        reason = (str(error).splitlines() or [""])[0]
        return {"with": competitor.value, "failed": f"{type(error).__name__}: {reason}"}
    finally:
        release_unused_memory(plan.device)
