"""`sana batch`: draw a file or a pipe of jobs into a folder of images, resumably."""

import json
import os
import sys
from collections.abc import Iterable
from contextlib import ExitStack, closing
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from sana_cli.commands._batch_view import show_events
from sana_cli.commands._defaults import apply_defaults, is_default, was_typed
from sana_cli.commands._help import Command, Group
from sana_cli.commands._options import (
    Color,
    Json,
    Quiet,
    RunColor,
    Server,
    Verbose,
    with_options,
)
from sana_cli.commands._session import open_session
from sana_cli.errors import FAILURES, UsageError
from sana_cli.settings import FILES, RUNNING, FileOptions, RunOptions, Seeds, Settings, declared

if TYPE_CHECKING:
    from sana_cli.batch.engine import OpenEngine
    from sana_cli.batch.rows import RowOrFault
    from sana_cli.session import Session
    from sana_cli.ui import Console

JOBS = "Jobs"  # panel of --help
MAX_SHOWN = 10  # faults


class RowFormat(StrEnum):
    txt = "txt"
    jsonl = "jsonl"
    csv = "csv"
    tsv = "tsv"


class EngineName(StrEnum):
    local = "local"
    ray = "ray"


class _RunsByDefault(Group):
    """A command group where `sana batch FILE` runs a batch; `sana batch status` is a subcommand."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args if args[:1] == ["status"] else ["run", *args])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return ("" if name == "run" else name), command, rest


class _BatchContext(TyperCommand.context_class):  # type: ignore[misc, valid-type]
    @property
    def command_path(self) -> str:
        return super().command_path.rstrip()


class _Run(Command):
    context_class = _BatchContext


app = typer.Typer(cls=_RunsByDefault, help="Draw the jobs of a file or a pipe; rerun to resume.")


@app.command(cls=_Run)
@with_options(Settings, Seeds, FileOptions, RunOptions)
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
    *,
    input_format: Annotated[
        RowFormat | None,
        typer.Option(
            metavar="|".join(RowFormat),
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
            help="Replace {red|blue} in prompts by each of its alternatives, in all combinations.",
            rich_help_panel=JOBS,
        ),
    ] = False,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Check every row and count the jobs; draw nothing.",
            rich_help_panel=JOBS,
        ),
    ] = False,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N|auto",
            help="Draw the I-th of N shares; auto reads what SLURM and other schedulers set.",
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
            "--restart", help="Draw all again, and replace the images.", rich_help_panel=JOBS
        ),
    ] = False,
    max_failures: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Stop after so many failures.", rich_help_panel=JOBS),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--output",
            metavar="FOLDER|URL",
            help="Folder, with names if wanted, as in out/{style}/{slug}-{id}.webp; or that of an"
            " object store, as in s3://bucket/out."
            " [dim]default: FILE-images/{slug}-{seed}.png[/dim]",
        ),
    ] = None,
    sheet: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="At the end, write a contact sheet of the finished images, or with .html a page"
            " with their recipes.",
            rich_help_panel=FILES,
        ),
    ] = None,
    json_output: Annotated[
        bool,
        typer.Option("--json", help="JSON Lines of events on stdout."),
    ] = False,
    gpus: Annotated[
        str | None,
        typer.Option(
            metavar="auto|N|0,1",
            help="Draw on several GPUs of this machine, with a process on each.",
            rich_help_panel=RUNNING,
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Draw in several processes that share the CPU; needs --device cpu. With"
            " --engine ray, the most actors. [dim]default there: one for each GPU, else for each"
            " node[/dim]",
            rich_help_panel=RUNNING,
        ),
    ] = None,
    engine: Annotated[
        EngineName,
        typer.Option(
            metavar="|".join(EngineName),
            help="Draw on this machine or on a Ray cluster, which needs sana-cli\\[ray].",
            rich_help_panel=RUNNING,
        ),
    ] = EngineName.local,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT|auto",
            help="Address of the Ray cluster. [dim]default: RAY_ADDRESS, else start one here[/dim]",
            rich_help_panel=RUNNING,
        ),
    ] = None,
    server: Server = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    color: RunColor = True,
    **asked: Any,
) -> None:
    """Draw every job of a file into a folder; run it again to resume.

    Options are defaults for all rows, and rows win: the fields of .jsonl and the columns of .csv
    have the names of the options, with [b]prompt[/b], and [b]output[/b] for a name in the folder.
    [b]sana batch status FOLDER[/b] shows its progress.

    [b]Examples[/b]

    [dim]sana batch prompts.txt --model demo --seed 7

    sana batch animals.csv --template "a {style} photo of {animal}" -o 'out/{style}/{slug}.webp'

    echo "a {red|blue} {circle|star} on white" | sana batch - --expand -m demo -o shapes/

    sana batch jobs.jsonl --json | jq -r 'select(.event == "image").path'

    sana batch jobs.jsonl --shard auto -o /shared/out/[/dim]
    """
    from sana_cli.batch.jobs import RowReader
    from sana_cli.batch.manifest import open_store
    from sana_cli.batch.rows import Pipe, parse, read_file
    from sana_cli.batch.run import Batch, RunPolicy
    from sana_cli.batch.shards import parse_shard
    from sana_cli.images.names import parse_batch_output
    from sana_cli.settings import check_text
    from sana_cli.system.signals import exit_on_second_signal
    from sana_cli.ui import Console

    # Faults of the call and the rows are reported before heavy imports.
    console = Console(quiet, verbose, color)
    asked |= dict.fromkeys(apply_defaults(context, console))
    for name, text in (("--output", output), ("--template", template)):
        check_text(text or "", name)
    kind = _row_format(file, input_format)
    folder, names = parse_batch_output(output, asked["format"], _usual_folder(file))
    if sheet is not None and check:
        raise UsageError("--sheet has no effect with --check, which draws nothing")
    target = None
    if sheet is not None:
        from sana_cli.sheet import check_sheet

        target = check_sheet(sheet)
    if isinstance(folder, str):
        if sheet is not None:
            raise UsageError("--sheet needs the images on a disk, not in an object store")
        open_store(folder)  # refuses a URL that cannot be used before a model is opened
    share = parse_shard(shard, os.environ) if shard is not None else None
    options = FileOptions(**{name: asked[name] for name in declared(FileOptions)})
    running = RunOptions(**{name: asked[name] for name in declared(RunOptions)})
    on_ray = engine == EngineName.ray
    _refuse_engine(on_ray, address, server, gpus, workers)
    if gpus is not None:
        running = _without_device(context, running, console)
    defaults = {name: asked[name] for name in declared(Settings, Seeds)}
    session = open_session(context, server, running, console, on_ray=on_ray)
    reader = RowReader(defaults, names, options.format, template, expand, session.resolve)
    source = "stdin" if file == "-" else file
    policy = RunPolicy(retry_failed, restart, max_failures)
    if on_ray:
        drawing, place = _on_ray(address, workers, running.device), "a Ray cluster"
    else:
        drawing, place = _on_this_machine(session, gpus, workers), session.device
    batch = Batch(session, reader, folder, share, source, options, policy, drawing, place)

    def note(text: str) -> None:
        console.info(f"{source}: {text}")

    rows = [] if file == "-" else list(parse(read_file(file), kind, reader.used, note))
    with ExitStack() as stack:
        asked_to_stop = stack.enter_context(exit_on_second_signal())
        rounds: Iterable[list[RowOrFault]] = [rows] if rows else []
        if file == "-":
            pipe = Pipe(0, kind, reader.used, note)
            rounds = pipe.rounds(lambda: bool(asked_to_stop), whole=check)
        events = batch.check(rounds) if check else batch.run(rounds, asked_to_stop)
        stack.enter_context(closing(events))
        code = show_events(events, batch, check, target, json_output, console, stack)
    raise typer.Exit(code)


def _without_device(context: typer.Context, running: RunOptions, console: "Console") -> RunOptions:
    """Let --gpus choose the devices. UsageError if --device is typed beside it."""
    if was_typed(context, "device"):
        raise UsageError("--gpus and --device both choose a device", "leave one of them out")
    if is_default(context, "device"):
        console.info("ignored, as --gpus chooses the devices: device")
    return replace(running, device="cuda")


def _refuse_engine(
    on_ray: bool, address: str | None, server: str | None, gpus: str | None, workers: int | None
) -> None:
    """UsageError for choices of where to draw that contradict each other."""
    if address is not None and not on_ray:
        raise UsageError("--address has no effect without --engine ray", "add --engine ray")
    if on_ray and gpus is not None:
        raise UsageError(
            "--gpus is for this machine; with --engine ray there is an actor on each GPU",
            "leave it out, or limit the actors by --workers",
        )
    if gpus is not None and workers is not None:
        raise UsageError("--gpus and --workers both choose processes", "leave one of them out")
    given = {"--engine ray": on_ray, "--gpus": gpus is not None, "--workers": workers is not None}
    for name in (name for name, is_given in given.items() if is_given and server):
        raise UsageError(f"{name} has no effect with --server", "leave one of them out")


def _on_ray(address: str | None, workers: int | None, device: str) -> "OpenEngine":
    """Draw on a Ray cluster. UsageError if Ray is not installed."""
    from sana_cli.batch.on_ray import OnRay, RayOptions, check_address, import_ray

    if device not in ("auto", "cuda", "cpu"):
        raise UsageError(f"--device {device} cannot be used on Ray", "use auto, cuda or cpu")
    if workers is not None and workers < 1:
        raise UsageError(f"--workers {workers} is not at least 1")
    import_ray()
    address = address or os.environ.get("RAY_ADDRESS") or None
    check_address(address)
    return lambda work: OnRay(work, RayOptions(address, workers, device))


def _on_this_machine(session: "Session", gpus: str | None, workers: int | None) -> "OpenEngine":
    """Draw in this process or in several, and report which. UsageError for what is not here."""
    from sana_cli.batch.this_process import ThisProcess

    if gpus is None and workers is None:
        return ThisProcess
    from sana_cli.batch.placement import on_cpu, on_gpus
    from sana_cli.batch.processes import Processes

    if workers is not None:
        if session.device != "cpu":
            raise UsageError(f"--workers is for the CPU, not for {session.device}", "use --gpus")
        from sana_cli.pipeline.plan import free_memory

        memory = free_memory("cpu") if session.memory is None else session.memory
        placements = on_cpu(workers, memory)
        session.reporter.info(f"{workers} processes, each with {placements[0].share()}")
    else:
        assert gpus is not None
        placements = on_gpus(gpus, session.memory)
        session.reporter.info(f"a process on each of {', '.join(map(str, placements))}")
    return lambda work: Processes(work, placements)


@app.command(cls=Command)
def status(
    folder: Annotated[str, typer.Argument(metavar="FOLDER|URL", help="The -o of a batch.")],
    json_output: Json = False,
    color: Color = True,
) -> None:
    """Show the progress of a batch and its failures; exit code 3 if jobs failed or are left."""
    from sana_cli.batch.manifest import Ledger

    ledger = Ledger(folder)
    if not ledger.last and not ledger.runs:
        raise UsageError(f"{folder} holds no manifest of a batch", "give the folder of its -o")
    states = {id: ledger.status(id) for id in ledger.last}
    runs = [_run_row(name, lines) for name, lines in ledger.runs.items()]
    for row in runs:
        row["running"] = ledger.store.is_held(row["manifest"].removesuffix(".jsonl"))
    current = _last_division(runs)
    failures = [ledger.last[id] for id, state in states.items() if state == "failed"]
    gone = [ledger.last[id] for id, state in states.items() if state == "open"]
    document = {
        "folder": str(folder),
        "done": sum(state == "done" for state in states.values()),
        "failed": len(failures),
        "gone": sum(line["status"] == "done" for line in gone),
        "left": sum(row["left"] for row in current),
        "resubmit": _shards_to_resubmit(current),
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
    """Return a manifest's last run, with the number of jobs that are left."""
    run = lines[0]
    ended = {line["id"] for line in lines[1:] if line["status"] in ("done", "failed")}
    left = max(0, run.get("todo", 0) - len(ended))
    facts = {key: run.get(key) for key in ("time", "file", "shard", "jobs", "pid", "host")}
    return {"manifest": name, **facts, "left": left}


def _last_division(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the runs that divide the jobs as the newest one does: itself, or all of its shards.

    What runs of another division have left is among the jobs of these.
    """
    newest = max(runs, key=lambda row: row["time"], default=None)
    return [row for row in runs if newest and _shard_count(row) == _shard_count(newest)]


def _shard_count(row: dict[str, Any]) -> int:
    """The number of shards of a run's division; 0 for a run of all jobs."""
    return int(row["shard"].split("/")[1]) if row["shard"] else 0


def _shards_to_resubmit(division: list[dict[str, Any]]) -> list[str]:
    """Return the shards of a division that were never started, or ended unfinished."""
    count = _shard_count(division[0]) if division else 0
    fine = {row["shard"] for row in division if row["running"] or not row["left"]}
    names = [f"{number}/{count}" for number in range(1, count + 1)]
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
    for line in document["failures"][:MAX_SHOWN]:
        console.print(f"row {line.get('row')}: {line.get('error')}", markup=False)
    if len(document["failures"]) > MAX_SHOWN:
        console.print(f"and {len(document['failures']) - MAX_SHOWN} more failures")


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
