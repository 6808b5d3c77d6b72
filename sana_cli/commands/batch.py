"""`sana batch`: a file or a pipe of jobs in, a folder of pictures out, resumed where it ended."""

import json
import os
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from sana_cli.commands import _options as options
from sana_cli.commands._options import (
    FILES,
    RUN,
    DTypeName,
    FitName,
    MetadataKind,
    TextPrecisionName,
)
from sana_cli.commands._standing import take_up
from sana_cli.errors import FAILURES, UsageError

if TYPE_CHECKING:
    from sana_cli.batch.rows import Found

JOBS = "Jobs"  # panel of --help
MOST_SHOWN = 10  # faults


class RowFormat(StrEnum):
    txt = "txt"
    jsonl = "jsonl"
    csv = "csv"
    tsv = "tsv"


class _RunsByDefault(TyperGroup):
    """`sana batch FILE` runs a batch; only `sana batch status` is a verb of its own."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args if args[:1] == ["status"] else ["run", *args])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return ("" if name == "run" else name), command, rest


class _Nameless(TyperCommand.context_class):  # type: ignore[misc, valid-type]
    @property
    def command_path(self) -> str:
        return super().command_path.rstrip()


class _Run(TyperCommand):
    context_class = _Nameless


app = typer.Typer(cls=_RunsByDefault, help="Draw the jobs of a file or a pipe; resume.")


@app.command(cls=_Run)
def run(
    context: typer.Context,
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="Jobs, as .txt, .jsonl, .csv or .tsv; [b]-[/b] reads them from stdin as they"
            " come.",
        ),
    ],
    input_format: Annotated[
        RowFormat | None,
        typer.Option(
            help="What FILE holds. [dim]default: by its suffix; txt of stdin[/dim]",
            rich_help_panel=JOBS,
        ),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Prompts from columns, as in 'a {style} photo of {animal}'.",
            rich_help_panel=JOBS,
        ),
    ] = None,
    expand: Annotated[
        bool,
        typer.Option(
            "--expand",
            help="Take {red|blue} in a prompt each in turn, in all combinations.",
            rich_help_panel=JOBS,
        ),
    ] = False,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Check every row, say how many jobs there are; draw nothing.",
            rich_help_panel=JOBS,
        ),
    ] = False,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N|auto",
            help="Draw the I-th of N shares; auto asks SLURM and other schedulers.",
            rich_help_panel=JOBS,
        ),
    ] = None,
    retry_failed: Annotated[
        bool,
        typer.Option("--retry-failed", help="Draw again what failed before.", rich_help_panel=JOBS),
    ] = False,
    restart: Annotated[
        bool,
        typer.Option(
            "--restart", help="Draw all again, and replace the pictures.", rich_help_panel=JOBS
        ),
    ] = False,
    max_failures: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Stop after so many failures.", rich_help_panel=JOBS),
    ] = None,
    count: Annotated[
        int | None,
        typer.Option("-n", "--count", metavar="N", help="Pictures a prompt: seeds s, s+1, …"),
    ] = None,
    seed: Annotated[
        str | None,
        typer.Option(
            "-s",
            "--seed",
            metavar="SEED",
            help="7, 1,5,9 or 1..8 for every row. [dim]default: from a hash of the job[/dim]",
        ),
    ] = None,
    res: options.Res = None,
    ar: options.Ar = None,
    fit: options.Fit = FitName.trained,
    model: options.Model = None,
    negative: options.Negative = "",
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    solver: options.Solver = None,
    image: options.Image = None,
    strength: options.Strength = None,
    instruction: options.Instruction = None,
    output: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--output",
            metavar="FOLDER",
            help="Folder, with names if wanted, as in out/{style}/{slug}-{id}.webp."
            " [dim]default: FILE-images/{slug}-{seed}.png[/dim]",
            rich_help_panel=FILES,
        ),
    ] = None,
    force: options.Force = False,
    format: options.Format = None,
    quality: options.Quality = None,
    metadata: options.Metadata = MetadataKind.full,
    device: options.Device = "auto",
    dtype: options.DType = DTypeName.auto,
    text_precision: options.TextPrecision = TextPrecisionName.auto,
    memory: options.Memory = "auto",
    cache: options.Cache = True,
    offline: options.Offline = False,
    json_output: Annotated[
        bool,
        typer.Option("--json", help="JSON Lines of events on stdout.", rich_help_panel=RUN),
    ] = False,
    quiet: options.RunQuiet = False,
    verbose: options.RunVerbose = False,
    color: options.RunColor = True,
) -> None:
    """Draw every job of a file into a folder; run it again to go on where it ended.

    Options are defaults for all rows, and rows win: the fields of .jsonl and the columns of .csv
    are called as the options, with [b]prompt[/b], and [b]output[/b] for a name in the folder.
    [b]sana batch status FOLDER[/b] says how far it is.

    [b]Examples[/b]

    [dim]sana batch prompts.txt --model demo --seed 7

    sana batch animals.csv --template "a {style} photo of {animal}" -o 'out/{style}/{slug}.webp'

    echo "a {red|blue} {circle|star} on white" | sana batch - --expand -m demo -o shapes/

    sana batch jobs.jsonl --json | jq -r 'select(.event == "image").path'

    sana batch jobs.jsonl --shard auto -o /shared/out/[/dim]
    """
    from sana_cli.batch.jobs import Reader
    from sana_cli.batch.rows import Pipe, parse, read_file
    from sana_cli.batch.run import Batch
    from sana_cli.batch.shards import parse_shard
    from sana_cli.images.names import parse_batch_output
    from sana_cli.settings import check_text
    from sana_cli.system.signals import leaving_when_asked_twice
    from sana_cli.ui import Talk
    from sana_cli.units import parse_memory

    # What can be wrong with the call or a row is found before anything heavy is imported.
    talk = Talk(quiet, verbose, color)
    aside = take_up(context, talk)
    ar = None if "ar" in aside else ar
    format = None if "format" in aside else format
    quality = None if "quality" in aside else quality
    for name, text in (("--output", output), ("--template", template)):
        check_text(text or "", name)
    kind = _row_format(file, input_format)
    picture_format = format.value if format else None
    folder, names = parse_batch_output(output, picture_format, _usual_folder(file))
    share = parse_shard(shard, os.environ) if shard is not None else None
    defaults = {
        "negative": negative,
        "model": model,
        "res": res,
        "ar": ar,
        "fit": fit.value,
        "steps": steps,
        "guidance": guidance,
        "solver": solver.value if solver else None,
        "image": image,
        "strength": strength,
        "instruction": instruction,
        "dtype": dtype.value,
        "text_precision": text_precision.value,
        "seed": seed,
        "count": count,
    }
    reader = Reader(defaults, names, picture_format, template, expand)
    batch = Batch(
        *(talk, reader, folder, share, "stdin" if file == "-" else file),
        device=device,
        memory=parse_memory(memory),
        offline=offline,
        cache=cache,
        retry_failed=retry_failed,
        restart=restart,
        max_failures=max_failures,
        with_recipe=metadata is MetadataKind.full,
        quality=quality,
        force=force,
        json_output=json_output,
    )
    found = [] if file == "-" else list(parse(read_file(file), kind, reader.used))
    with ExitStack() as stack:
        asked = stack.enter_context(leaving_when_asked_twice())
        batch.show(stack)
        rounds: Iterable[list[Found]] = [found] if found else []
        if file == "-":
            rounds = Pipe(0, kind, reader.used).rounds(lambda: bool(asked), whole=check)
        code = batch.check(rounds) if check else batch.draw(rounds, asked, stack)
    raise typer.Exit(code)


@app.command()
def status(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The -o of a batch.")],
    json_output: options.Json = False,
    color: options.Color = True,
) -> None:
    """Say how far a batch is, and what has failed; exit code 3 if anything is left to do."""
    from sana_cli.batch.manifest import Ledger, is_held

    ledger = Ledger(folder)
    if not ledger.last and not ledger.runs:
        raise UsageError(f"{folder} holds no manifest of a batch", "give the folder of its -o")
    states = {id: ledger.status(id) for id in ledger.last}
    runs = [_run_row(name, lines) for name, lines in ledger.runs.items()]
    for row in runs:
        row["running"] = is_held(folder, row["manifest"].removesuffix(".jsonl"))
    failures = [ledger.last[id] for id, state in states.items() if state == "failed"]
    gone = [ledger.last[id] for id, state in states.items() if state == "open"]
    document = {
        "folder": str(folder),
        "done": sum(state == "done" for state in states.values()),
        "failed": len(failures),
        "gone": sum(line["status"] == "done" for line in gone),
        "left": sum(row["left"] for row in runs),
        "resubmit": _shards_to_resubmit(runs),
        "runs": runs,
        "failures": failures,
    }
    if json_output:
        sys.stdout.write(json.dumps(document) + "\n")
    else:
        _print_status(document, color)
    unfinished = any(document[name] for name in ("failed", "gone", "left", "resubmit"))
    raise typer.Exit(FAILURES if unfinished else 0)


def _run_row(name: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """A manifest's last run: its facts, and how many of its jobs are left."""
    run = lines[0]
    ended = {line["id"] for line in lines[1:] if line["status"] in ("done", "failed")}
    left = max(0, run.get("todo", 0) - len(ended))
    facts = {key: run.get(key) for key in ("time", "file", "shard", "jobs", "pid", "host")}
    return {"manifest": name, **facts, "left": left}


def _shards_to_resubmit(runs: list[dict[str, Any]]) -> list[str]:
    """Of the newest division into shards, those that no process has begun, or none will finish."""
    shards = [row for row in runs if row["shard"]]
    if not shards:
        return []
    count = max(shards, key=lambda row: row["time"])["shard"].split("/")[1]
    fine = {row["shard"] for row in shards if row["running"] or not row["left"]}
    names = [f"{number}/{count}" for number in range(1, int(count) + 1)]
    return [name for name in names if name not in fine]


def _print_status(document: dict[str, Any], color: bool) -> None:
    from rich.console import Console

    console = Console(no_color=None if color else True, highlight=False, soft_wrap=True)
    counts = [f"{document[name]} {name}" for name in ("done", "failed", "gone", "left")]
    console.print(", ".join(counts[:1] + [text for text in counts[1:] if text[0] != "0"]))
    for row in document["runs"]:
        if row["running"]:
            console.print(f"running: process {row['pid']} on {row['host']}", markup=False)
    if document["resubmit"]:
        console.print(f"shards to run: {', '.join(document['resubmit'])}", markup=False)
    for line in document["failures"][:MOST_SHOWN]:
        console.print(f"row {line.get('row')}: {line.get('error')}", markup=False)
    if len(document["failures"]) > MOST_SHOWN:
        console.print(f"and {len(document['failures']) - MOST_SHOWN} more failures")


def _row_format(file: str, asked: RowFormat | None) -> str:
    if asked is not None:
        return asked.value
    suffix = Path(file).suffix.lower().lstrip(".")
    if file == "-":
        return RowFormat.txt.value
    if suffix not in RowFormat.__members__:
        known = ", ".join(f".{name}" for name in RowFormat.__members__)
        raise UsageError(
            f"{file} does not say what it holds: its name ends in none of {known}",
            "add --input-format txt, or what it is",
        )
    return suffix


def _usual_folder(file: str) -> str:
    return "sana-images" if file == "-" else f"{Path(file).stem}-images"
