"""How `sana bench` goes: subjects are made ready, measured one after the other, and summed up."""

import math
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sana_cli.errors import MissingModel, UsageError

if TYPE_CHECKING:
    from sana_cli.bench.phases import Run
    from sana_cli.pipeline.draw import Event
    from sana_cli.pipeline.plan import Plan
    from sana_cli.recipe import Recipe
    from sana_cli.resolve import Choice
    from sana_cli.ui import Talk
    from sana_cli.weights.model_files import ModelFiles

PROMPT = "a red circle on a blue background"
AMPLE = 2**62  # bytes
UNSTEADY = 1.5  # times that rates may differ before and after the runs

Sides = tuple[int, int]  # (width, height) in pixels


class Against(StrEnum):
    diffusers = "diffusers"
    compiled = "diffusers-compiled"


@dataclass(frozen=True)
class Subject:
    """A model at a size, ready to be measured."""

    recipes: "list[Recipe]"
    files: "ModelFiles"
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


def choose_at(model: str | None, size: str | None, asked: dict[str, Any]) -> "Choice":
    """The size chooses the model if none is named. One that is draws any, see `make_subject`."""
    from sana_cli.resolve import choose
    from sana_cli.settings import Settings

    return choose(Settings(PROMPT, model=model, res=None if model else size, **asked))


def make_subject(
    choice: "Choice",
    sides: Sides | None,
    where: str,
    count: int,
    limit: int | None,
    random: bool,
    against: Against | None,
    folder: Path,
    talk: "Talk",
) -> Subject:
    from sana_cli.pipeline.plan import make_plan
    from sana_cli.weights.fetch import open_chosen
    from sana_cli.weights.hub_cache import find_parts

    model = choice.model
    found = find_parts(model)
    if random:
        from sana_cli.bench.random_weights import random_model

        files = random_model(model, found, folder / model.name, where)
    elif found is None:
        raise MissingModel(
            f"the weights of {model.name} are not on this machine",
            "add --random-weights, which costs the same, or use --model demo"
            + (f", or: sana models pull {model.name}" if model.architecture else ""),
        )
    else:
        files = open_chosen(model, talk, offline=True, dry_run=False)
    first = choice.recipe(files, where, 1)
    # As large as was asked for, whether or not the model was trained for it: the work is the same.
    width, height = sides or (first.native_width, first.native_height)
    first = replace(first, native_width=width, native_height=height, width=width, height=height)
    if against is not None and first.text_dtype == "int8":
        from sana_cli.system.devices import wide_dtype

        first = replace(first, text_dtype=wide_dtype(where))
        talk.say(f"the text encoder runs in {first.text_dtype}, as that of diffusers does")
    recipes = [replace(first, seed=1 + i) for i in range(count)]
    plan = make_plan(recipes, files, where, limit)
    for text in plan.words():
        talk.say(text)
    return Subject(recipes, files, plan, random, not random or found is not None)


def check_comparable(before: dict[str, Any], subjects: list[Subject]) -> None:
    """Better known now than after the runs."""
    known = {(size["model"], size["width"], size["height"]) for size in before["sizes"]}
    if not any(
        (s.recipes[0].model, s.recipes[0].width, s.recipes[0].height) in known for s in subjects
    ):
        there = ", ".join(f"{model} at {width}x{height}" for model, width, height in sorted(known))
        raise UsageError(f"--compare: nothing that is measured is in there ({there})")


def measure_all(
    subjects: list[Subject],
    where: str,
    times: tuple[int, int],
    against: Against | None,
    folder: Path,
    talk: "Talk",
) -> dict[str, Any]:
    from sana_cli.bench import phases
    from sana_cli.system.inventory import power, saving_power

    runs, warmup = times
    count = len(subjects[0].recipes)
    warnings = saving_power(power())
    for text in warnings:
        talk.warn(f"expect less than this machine can do: {text}")
    dtypes = {d for s in subjects for d in (s.recipes[0].dit_dtype, s.recipes[0].vae_dtype)}
    seen, measured = [], []
    for subject in subjects:
        talk.say("measuring the machine")
        seen.append(phases.rates(where, dtypes))
        measured.append(_runs(subject, times, folder, talk))
    document = phases.surroundings(where)  # of a GPU while it is warm
    seen.append(phases.rates(where, dtypes))
    compared = [
        _against(subject, times, against, folder, talk) if against else None for subject in subjects
    ]
    rates, apart = phases.best(seen)
    if apart > UNSTEADY:
        warnings.append(
            f"this machine did the same work up to {apart:.1f} times slower at one time than at"
            " another: does something else run on it?"
        )
        talk.warn(warnings[-1])
    document |= {"rates": rates, "runs": runs, "warmup": warmup, "count": count}
    document |= {"warnings": warnings, "sizes": []}
    for subject, some, other in zip(subjects, measured, compared, strict=True):
        recipe, plan = subject.recipes[0], subject.plan
        document["sizes"].append(
            {
                "model": recipe.model,
                "width": recipe.width,
                "height": recipe.height,
                "random_weights": subject.random,
                "tokenizer": "its own" if subject.own_tokenizer else "made up",
                "recipe": recipe.as_dict(),
                "plan": {
                    "halves_together": plan.together,
                    "rows_at_once": plan.rows,
                    "strip_bytes": plan.strip_bytes,
                    "networks_together": plan.resident,
                },
                "predicted_peak_bytes": _predicted(subject),
                **phases.summary(some, subject.recipes, subject.files, rates),
                "against": other,
            }
        )
    return document


def _predicted(subject: Subject) -> dict[str, int]:
    """Peaks by stage. Only now, as the rehearsal itself would count as memory of the runs."""
    from sana_cli.pipeline.plan import make_plan

    plan = subject.plan
    if plan.peaks:
        return plan.peaks
    # There was plainly room, so nothing was cut in pieces.
    return make_plan(subject.recipes, subject.files, plan.device, AMPLE, rehearsed=True).peaks


def _runs(subject: Subject, times: tuple[int, int], folder: Path, talk: "Talk") -> "list[Run]":
    """The runs that count."""
    from sana_cli.bench.phases import measure
    from sana_cli.pipeline.draw import Progress, Remark
    from sana_cli.ui import Bars

    runs, warmup = times
    recipe, done = subject.recipes[0], []
    weights = ", random weights" if subject.random else ""
    talk.say(f"{recipe.model} at {recipe.width}x{recipe.height}{weights}")
    with Bars(talk, ("runs", "denoise")) as bars:

        def watch(event: "Event") -> None:
            if isinstance(event, Progress) and event.stage == "denoise" and bars.live:
                bars.update("denoise", event.done, event.total)
            if isinstance(event, Remark):
                (talk.warn if event.warning else talk.detail)(event.text)

        for i in range(warmup + runs):
            run = measure(subject.recipes, subject.files, subject.plan, folder, watch)
            run.pictures.clear()
            done.append(run)
            bars.update("runs", i + 1, warmup + runs)
            bars.progress.reset(bars.tasks["denoise"], visible=False)
    return done[warmup:]


def _against(
    subject: Subject, times: tuple[int, int], against: Against, folder: Path, talk: "Talk"
) -> dict[str, Any]:
    """What `result` tells of pairs of runs, or why there are none."""
    from sana_cli.bench.competitor import Diffusers, result
    from sana_cli.bench.phases import measure
    from sana_cli.system.devices import give_back
    from sana_cli.ui import Bars

    runs, warmup = times
    warmup = max(1, warmup)
    talk.say(f"the same with {against.value}")
    pairs: list[tuple[Run, Run]] = []
    recipes, plan = subject.recipes, subject.plan
    try:
        theirs = Diffusers(
            recipes[0], subject.files, plan.device, compiled=against is Against.compiled
        )
        shared = theirs.files_that_share()
        with Bars(talk, ("pairs",)) as bars:
            for i in range(warmup + runs):
                if pairs:
                    pairs[-1][0].pictures.clear()
                    pairs[-1][1].pictures.clear()
                pairs.append((measure(recipes, shared, plan, folder), theirs.run(recipes)))
                bars.update("pairs", i + 1, warmup + runs)
        return {"with": against.value, **result(theirs, pairs[warmup:])}
    except Exception as error:  # a library's own, whatever it is: that is a result too
        reason = (str(error).splitlines() or [""])[0]
        return {"with": against.value, "failed": f"{type(error).__name__}: {reason}"}
    finally:
        give_back(plan.device)
