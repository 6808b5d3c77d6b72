"""`sana bench`: how fast this machine draws, and how near that is to what it could do."""

import json
import math
import sys
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sana_cli.commands import options
from sana_cli.commands.options import FILES, RUN, DTypeName, TextPrecisionName
from sana_cli.commands.standing import take_up
from sana_cli.errors import MissingModel, SanaError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from sana_cli.bench.phases import Run
    from sana_cli.jobs.resolve import Choice
    from sana_cli.pipeline.plan import Plan
    from sana_cli.pipeline.stages import Event
    from sana_cli.recipe import Recipe
    from sana_cli.ui import Talk
    from sana_cli.weights.model_files import ModelFiles

PROMPT = "a red circle on a blue background"
MOST_RUNS = 1000
MOST_COUNT = 1000
AMPLE = 2**62  # bytes

Sides = tuple[int, int]  # (width, height) in pixels
UNSTEADY = 1.5  # times that rates may differ before and after the runs


class Against(StrEnum):
    diffusers = "diffusers"
    compiled = "diffusers-compiled"


def bench(
    context: typer.Context,
    model: options.Model = None,
    res: Annotated[
        list[str] | None,
        typer.Option(
            "-r",
            "--res",
            metavar="SIZE,…",
            help="Sizes, as in 512,1024 or 1280x720; may be repeated. A named model draws any, at"
            " exactly that size. [dim]default: what the model draws[/dim]",
        ),
    ] = None,
    count: Annotated[
        int, typer.Option("-n", "--count", metavar="N", help="Pictures in every run.")
    ] = 1,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    runs: Annotated[int, typer.Option("--runs", metavar="N", help="Runs that count.")] = 3,
    warmup: Annotated[
        int, typer.Option("--warmup", metavar="N", help="Runs before them that do not.")
    ] = 1,
    random_weights: Annotated[
        bool,
        typer.Option(
            "--random-weights",
            help="Draw the model's weights at random: it costs the same, and needs no download.",
        ),
    ] = False,
    against: Annotated[
        Against | None,
        typer.Option(
            "--against",
            help="Measure diffusers too, on the same weights and seeds, turn and turn about.",
        ),
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option(
            "--save", metavar="FILE", help="Keep the result, as JSON.", rich_help_panel=FILES
        ),
    ] = None,
    force: options.Force = False,
    earlier: Annotated[
        Path | None,
        typer.Option(
            "--compare",
            metavar="FILE",
            help="Show how this stands to a result kept by --save.",
            rich_help_panel=FILES,
        ),
    ] = None,
    device: options.Device = "auto",
    dtype: options.DType = DTypeName.auto,
    memory: options.Memory = "auto",
    text_precision: options.TextPrecision = TextPrecisionName.auto,
    json_output: Annotated[
        bool, typer.Option("--json", help="One JSON document on stdout.", rich_help_panel=RUN)
    ] = False,
    quiet: options.RunQuiet = False,
    verbose: options.RunVerbose = False,
    color: options.RunColor = True,
) -> None:
    """Measure how long each phase takes, how much memory, and what this machine could do at best.

    Every run loads the model, reads the prompt, denoises, decodes and saves; shown are medians.
    Nothing is downloaded.

    [b]Examples[/b]

    [dim]sana bench --model demo

    sana bench --model sana-0.6b-1024 --random-weights --res 512,1024,2048

    sana bench --model demo --against diffusers

    sana bench --model demo --save before.json

    sana bench --model demo --compare before.json[/dim]
    """
    from sana_cli.ui import Talk
    from sana_cli.units import parse_memory

    talk = Talk(quiet, verbose, color)
    take_up(context, talk)
    for name, value, most in (("runs", runs, MOST_RUNS), ("count", count, MOST_COUNT)):
        if not 1 <= value <= most:
            raise UsageError(f"--{name} {value} is not between 1 and {most}")
    if not 0 <= warmup <= MOST_RUNS:
        raise UsageError(f"--warmup {warmup} is not between 0 and {MOST_RUNS}")
    if force and save is None:
        raise UsageError("--force has no effect without --save", "leave it out")
    limit = parse_memory(memory)
    sizes = _sizes(res)
    asked: dict[str, Any] = {"steps": steps, "guidance": guidance, "dtype": dtype.value}
    asked["text_precision"] = text_precision.value
    choices = [_choose(model, size, asked) for size in sizes]
    if against is not None:
        if text_precision is TextPrecisionName.int8:
            raise UsageError(
                "--against measures the same weights, and diffusers has none for"
                " --text-precision int8",
                "leave it out",
            )
        from sana_cli.bench.against import check_installed

        check_installed()
    from sana_cli.bench import phases

    before = phases.read_earlier(earlier) if earlier is not None else None

    from sana_cli.machine.device import choose_device
    from sana_cli.machine.signals import leaving_in_order

    where = choose_device(device)
    with leaving_in_order(), TemporaryDirectory(prefix="sana-bench-") as folder:
        subjects = [
            _subject(*both, where, count, limit, random_weights, against, Path(folder), talk)
            for both in zip(choices, sizes.values(), strict=True)
        ]
        if before is not None:
            _check_comparable(before, subjects)
        document = _measure(subjects, where, (runs, warmup), against, Path(folder), talk)
    if before is not None:
        document["compared"] = phases.compare(document, before)
        for text in document["compared"]["differences"]:
            talk.warn(f"{earlier} was measured otherwise: {text}")
    if json_output:
        sys.stdout.write(json.dumps(document, indent=2) + "\n")
    else:
        _show(document, color)
    if save is not None:
        _keep(document, save, force, talk)
    for size in document["sizes"]:
        if size["against"] and "failed" in size["against"]:
            raise SanaError(f"--against {size['against']['with']}: {size['against']['failed']}")


@dataclass(frozen=True)
class Subject:
    """A model at a size, ready to be measured."""

    recipes: "list[Recipe]"
    files: "ModelFiles"
    plan: "Plan"
    random: bool
    own_tokenizer: bool


def _sizes(asked: list[str] | None) -> dict[str | None, Sides | None]:
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


def _choose(model: str | None, size: str | None, asked: dict[str, Any]) -> "Choice":
    """The size chooses the model if none is named. One that is draws any, see `_subject`."""
    from sana_cli.jobs.resolve import choose
    from sana_cli.settings import Settings

    return choose(Settings(PROMPT, model=model, res=None if model else size, **asked))


def _subject(
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
    from sana_cli.fetching import open_chosen
    from sana_cli.pipeline.plan import make_plan
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
        from sana_cli.machine.device import wide_dtype

        first = replace(first, text_dtype=wide_dtype(where))
        talk.say(f"the text encoder runs in {first.text_dtype}, as that of diffusers does")
    recipes = [replace(first, seed=1 + i) for i in range(count)]
    plan = make_plan(recipes, files, where, limit)
    for text in plan.words():
        talk.say(text)
    return Subject(recipes, files, plan, random, not random or found is not None)


def _check_comparable(before: dict[str, Any], subjects: list[Subject]) -> None:
    """Better known now than after the runs."""
    known = {(size["model"], size["width"], size["height"]) for size in before["sizes"]}
    if not any(
        (s.recipes[0].model, s.recipes[0].width, s.recipes[0].height) in known for s in subjects
    ):
        there = ", ".join(f"{model} at {width}x{height}" for model, width, height in sorted(known))
        raise UsageError(f"--compare: nothing that is measured is in there ({there})")


def _measure(
    subjects: list[Subject],
    where: str,
    times: tuple[int, int],
    against: Against | None,
    folder: Path,
    talk: "Talk",
) -> dict[str, Any]:
    from sana_cli.bench import phases
    from sana_cli.machine.inventory import power, saving_power

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
    from sana_cli.pipeline.stages import Progress, Remark
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
    from sana_cli.bench.against import Diffusers, result
    from sana_cli.bench.phases import measure
    from sana_cli.machine.device import give_back
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


def _keep(document: dict[str, Any], path: Path, force: bool, talk: "Talk") -> None:
    from sana_cli.pictures.images import write

    data = (json.dumps(document, indent=1) + "\n").encode()
    try:
        written = write(path, data, force)
    except SanaError as error:
        raise type(error)(error.message, "give another file to --save") from None
    talk.say(f"kept in {written}")


# --- for people --------------------------------------------------------------------------------


def _show(document: dict[str, Any], color: bool) -> None:
    from rich.console import Console

    console = Console(no_color=None if color else True, highlight=False)
    compared = {
        (row["model"], row["width"], row["height"]): row["ratios"]
        for row in document.get("compared", {"sizes": []})["sizes"]
    }
    for size in document["sizes"]:
        ratios = compared.get((size["model"], size["width"], size["height"]))
        _show_size(size, document, ratios, console)
        if size["against"] and "failed" not in size["against"]:
            _show_against(size["against"], console)
    _show_machine(document, console)


def _show_size(
    size: dict[str, Any],
    document: dict[str, Any],
    ratios: dict[str, float] | None,
    console: "Console",
) -> None:
    from rich.table import Table

    from sana_cli.units import gigabytes

    recipe, count = size["recipe"], document["count"]
    weights = ", random weights" if size["random_weights"] else ""
    if size["tokenizer"] != "its own":
        weights += " and tokenizer"
    console.print(f"[bold]{size['model']} at {size['width']}x{size['height']}[/bold]{weights}")
    pictures = "1 picture" if count == 1 else f"{count} pictures"
    precisions = [recipe[f"{part}_dtype"] for part in ("text", "dit", "vae")]
    console.print(
        f"{pictures}, {recipe['steps']} step{'s' * (recipe['steps'] > 1)} of {recipe['solver']},"
        f" guidance {recipe['guidance']:g}, in {' / '.join(dict.fromkeys(precisions))};"
        f" median of {document['runs']}",
        style="dim",
    )
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("phase", no_wrap=True)
    for title in ("time", "spread", "peak memory", "floor", "reached"):
        table.add_column(title, justify="right", no_wrap=True)
    if ratios is not None:
        table.add_column("to before", justify="right", no_wrap=True)
    for name, phase in size["phases"].items():
        seconds = phase["seconds"]
        drawn = name == "load" and size["random_weights"]  # which is no loading
        cells = [
            name,
            "–" if drawn else _time(seconds["median"]),
            "–" if drawn or document["runs"] == 1 else _spread(seconds),
            gigabytes(phase["peak_bytes"]) if phase["peak_bytes"] is not None else "–",
            _time(phase["floor_seconds"]) if "share" in phase else "",
            f"{phase['share']:.0%}" if "share" in phase else "",
        ]
        if ratios is not None:
            cells.append("" if drawn else f"{ratios[name]:.2f}" if name in ratios else "–")
        table.add_row(*cells, style="bold" if name == "total" else "")
        if name == "denoise":
            floor = phase["floor_seconds"] / (recipe["steps"] * count)
            table.add_row("  a step", _time(size["step_seconds"]), "", "", _time(floor), "")
    console.print(table)
    console.print(f"{size['images_per_minute']:.1f} pictures a minute, once loaded\n")


def _show_against(facts: dict[str, Any], console: "Console") -> None:
    from rich.table import Table

    from sana_cli.units import gigabytes

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("in turns", no_wrap=True)
    for title in ("sana", facts["with"], "times faster"):
        table.add_column(title, justify="right", no_wrap=True)
    for stage, both in facts["seconds"].items():
        times = [_time(both[who]["median"]) for who in ("sana", "diffusers")]
        table.add_row(
            stage, *times, f"{facts['ratio'][stage]:.2f}", style="bold" * (stage == "total")
        )
    console.print(table)
    likeness = "equal" if facts["psnr"] is None else f"{facts['psnr']:.1f} dB alike"
    memory = f"; its peak memory {gigabytes(facts['peak_bytes'])}" if facts["peak_bytes"] else ""
    console.print(f"pictures are {likeness}{memory}\n")


def _show_machine(document: dict[str, Any], console: "Console") -> None:
    from sana_cli.ui import print_fact

    machine, rates = document["machine"], document["rates"]
    driver = f", driver {machine['driver']}" if machine["driver"] else ""
    threads = machine["threads"]
    threads = f", {threads} thread{'' if threads == 1 else 's'}" * (machine["device"] == "cpu")
    print_fact(console, "device", f"{machine['device']}: {machine['device_name']}{driver}{threads}")
    products = ", ".join(
        f"{rate / 1e12:.3g} TFLOP/s in {dtype}" for dtype, rate in rates["flops_per_second"].items()
    )
    print_fact(console, "at best", f"copies {rates['bytes_per_second'] / 1e9:.3g} GB/s, {products}")
    triton = f", triton {document['triton']}" if document["triton"] else ""
    print_fact(console, "versions", f"sana {document['sana']}, torch {document['torch']}{triton}")
    print_fact(console, "kernels", machine["kernels"])
    for text in document["warnings"]:
        print_fact(console, "warning", text, "yellow")


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def _spread(seconds: dict[str, Any]) -> str:
    """Of all runs, about the median."""
    return f"{(seconds['most'] - seconds['least']) / seconds['median']:.0%}"
