"""`sana bench`: how fast this machine draws, and how near that is to what it could do."""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sana_cli.bench.run import (
    Competitor,
    check_comparable,
    make_subject,
    measure_all,
    parse_sizes,
    resolve_at,
)
from sana_cli.commands._bench_tables import show
from sana_cli.commands._defaults import apply_defaults
from sana_cli.commands._options import Json, Quiet, RunColor, Verbose, with_options
from sana_cli.errors import SanaError, UsageError
from sana_cli.settings import FILES, FileOptions, RunOptions, Settings

if TYPE_CHECKING:
    from sana_cli.ui import Console

TAKEN = frozenset(
    {
        *("model", "steps", "guidance", "dtype", "quant", "text_precision"),
        *("force", "device", "memory"),
    }
)
MAX_RUNS = 1000
MAX_COUNT = 1000


@with_options(Settings, FileOptions, RunOptions, only=TAKEN)
def bench(
    context: typer.Context,
    *,
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
        int, typer.Option("-n", "--count", metavar="N", help="Images in every run.")
    ] = 1,
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
    competitor: Annotated[
        Competitor | None,
        typer.Option(
            "--against",
            metavar="|".join(Competitor),
            help="Measure diffusers too, on the same weights and seeds, alternating with sana.",
        ),
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option(
            "--save", metavar="FILE", help="Keep the result, as JSON.", rich_help_panel=FILES
        ),
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(
            "--compare",
            metavar="FILE",
            help="Compare the result with one written by --save.",
            rich_help_panel=FILES,
        ),
    ] = None,
    json_output: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    color: RunColor = True,
    **asked: Any,
) -> None:
    """Measure the time and memory of each phase, and the least time that this machine would need.

    Every run loads the model, reads the prompt, denoises, decodes and saves; shown are medians.
    Nothing is downloaded.

    [b]Examples[/b]

    [dim]sana bench --model demo

    sana bench --model sana-0.6b-1024 --random-weights --res 512,1024,2048

    sana bench --model demo --against diffusers

    sana bench --model demo --save before.json

    sana bench --model demo --compare before.json[/dim]
    """
    from sana_cli.session import Session
    from sana_cli.ui import Console, StageBars
    from sana_cli.units import parse_memory

    console = Console(quiet, verbose, color)
    apply_defaults(context, console)
    for name, value, most in (("runs", runs, MAX_RUNS), ("count", count, MAX_COUNT)):
        if not 1 <= value <= most:
            raise UsageError(f"--{name} {value} is not between 1 and {most}")
    if not 0 <= warmup <= MAX_RUNS:
        raise UsageError(f"--warmup {warmup} is not between 0 and {MAX_RUNS}")
    if asked["force"] and save is None:
        raise UsageError("--force has no effect without --save", "leave it out")
    if save is not None:
        from sana_cli.images.names import check_writable

        check_writable(save.parent, "--save")
    limit = parse_memory(asked["memory"])
    sizes = parse_sizes(res)
    names = ("steps", "guidance", "dtype", "quant", "text_precision")
    settings = {name: asked[name] for name in names}
    resolutions = [resolve_at(asked["model"], size, settings) for size in sizes]
    if competitor is not None:
        if asked["text_precision"] == "int8":
            raise UsageError(
                "--against measures the same weights, and diffusers has none for"
                " --text-precision int8",
                "leave it out",
            )
        if asked["quant"] != "none":
            raise UsageError(
                f"--against measures the same weights, and diffusers has none for"
                f" --quant {asked['quant']}",
                "leave it out",
            )
        from sana_cli.bench.competitor import check_installed

        check_installed()
    from sana_cli.bench.baseline import compare, read_baseline

    before = read_baseline(baseline) if baseline is not None else None

    from sana_cli.system.signals import exit_by_exception

    session = Session(
        device=asked["device"],
        memory=limit,
        cache=False,  # every run reads the prompt
        offline=True,
        keep_loaded=False,  # and loads the networks
        reporter=console,
    )
    with (
        exit_by_exception(),
        TemporaryDirectory(prefix="sana-bench-") as folder,
        StageBars(console, ("runs", "denoise", "pairs")) as bars,
    ):
        subjects = [
            make_subject(session, *both, count, random_weights, competitor, Path(folder))
            for both in zip(resolutions, sizes.values(), strict=True)
        ]
        if before is not None:
            check_comparable(before, subjects)

        def watch(bar: str, done: int, total: int) -> None:
            if bars.live or bar != "denoise":  # a line for every run would be too many
                bars.update(bar, done, total)

        times = runs, warmup
        document = measure_all(session, subjects, times, competitor, Path(folder), watch)
    if before is not None:
        document["compared"] = compare(document, before)
        for text in document["compared"]["differences"]:
            console.warn(f"{baseline} was measured otherwise: {text}")
    if json_output:
        sys.stdout.write(json.dumps(document, indent=2) + "\n")
    else:
        show(document, color)
    if save is not None:
        _keep(document, save, asked["force"], console)
    for size in document["sizes"]:
        if size["against"] and "failed" in size["against"]:
            raise SanaError(f"--against {size['against']['with']}: {size['against']['failed']}")


def _keep(document: dict[str, Any], path: Path, force: bool, console: "Console") -> None:
    from sana_cli.system.disk import save

    data = (json.dumps(document, indent=1) + "\n").encode()
    try:
        written = save(path, data, force)
    except SanaError as error:
        raise type(error)(error.message, "give another file to --save") from None
    console.info(f"kept in {written}")
