"""`sana bench`: how fast this machine draws, and how near that is to what it could do."""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sana_cli.bench.run import (
    Against,
    check_comparable,
    choose_at,
    make_subject,
    measure_all,
    parse_sizes,
)
from sana_cli.commands import _options as options
from sana_cli.commands._bench_tables import show
from sana_cli.commands._options import FILES, RUN, DTypeName, TextPrecisionName
from sana_cli.commands._standing import take_up
from sana_cli.errors import SanaError, UsageError

if TYPE_CHECKING:
    from sana_cli.ui import Talk

MOST_RUNS = 1000
MOST_COUNT = 1000


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
    sizes = parse_sizes(res)
    asked: dict[str, Any] = {"steps": steps, "guidance": guidance, "dtype": dtype.value}
    asked["text_precision"] = text_precision.value
    choices = [choose_at(model, size, asked) for size in sizes]
    if against is not None:
        if text_precision is TextPrecisionName.int8:
            raise UsageError(
                "--against measures the same weights, and diffusers has none for"
                " --text-precision int8",
                "leave it out",
            )
        from sana_cli.bench.competitor import check_installed

        check_installed()
    from sana_cli.bench.baseline import compare, read_earlier

    before = read_earlier(earlier) if earlier is not None else None

    from sana_cli.system.devices import choose_device
    from sana_cli.system.signals import leaving_in_order

    where = choose_device(device)
    with leaving_in_order(), TemporaryDirectory(prefix="sana-bench-") as folder:
        subjects = [
            make_subject(*both, where, count, limit, random_weights, against, Path(folder), talk)
            for both in zip(choices, sizes.values(), strict=True)
        ]
        if before is not None:
            check_comparable(before, subjects)
        document = measure_all(subjects, where, (runs, warmup), against, Path(folder), talk)
    if before is not None:
        document["compared"] = compare(document, before)
        for text in document["compared"]["differences"]:
            talk.warn(f"{earlier} was measured otherwise: {text}")
    if json_output:
        sys.stdout.write(json.dumps(document, indent=2) + "\n")
    else:
        show(document, color)
    if save is not None:
        _keep(document, save, force, talk)
    for size in document["sizes"]:
        if size["against"] and "failed" in size["against"]:
            raise SanaError(f"--against {size['against']['with']}: {size['against']['failed']}")


def _keep(document: dict[str, Any], path: Path, force: bool, talk: "Talk") -> None:
    from sana_cli.images.files import write

    data = (json.dumps(document, indent=1) + "\n").encode()
    try:
        written = write(path, data, force)
    except SanaError as error:
        raise type(error)(error.message, "give another file to --save") from None
    talk.say(f"kept in {written}")
