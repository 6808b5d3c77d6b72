"""`sana serve`: the models stay loaded behind OpenAI's Images API and a page."""

import io
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import IO, Annotated, Any, cast

import typer

from sana_cli.commands._defaults import apply_defaults
from sana_cli.commands._options import Quiet, RunColor, Verbose, with_options
from sana_cli.errors import UsageError
from sana_cli.settings import RunOptions, Settings, declared

PORT = 7262
TOKEN_VARIABLE = "SANA_TOKEN"
SHORTEST_TOKEN = 16  # characters
ACCESS = "Access"  # panel of --help


@with_options(Settings, RunOptions, only=frozenset({"model", *declared(RunOptions)}))
def serve(
    context: typer.Context,
    host: Annotated[
        str,
        typer.Option(
            metavar="ADDRESS",
            help="Where to listen. Any but this machine's own needs a token.",
            rich_help_panel=ACCESS,
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(metavar="N", min=0, max=65535, help="Port to listen on; 0: any free one.")
    ] = PORT,
    keep_alive: Annotated[
        str,
        typer.Option(
            metavar="TIME",
            help="Release the networks after this long without work: 5m, 90s, 0 or forever.",
        ),
    ] = "5m",
    queue: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            max=10_000,
            help="Requests that may wait; further ones are answered with status 429.",
        ),
    ] = 64,
    *,
    loras: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Requests may name the LoRAs (*.safetensors) in this folder."
        ),
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Its first line is the token; without a file SANA_TOKEN is. [dim]default: none on"
            " this machine's own address; else one is made and printed[/dim]",
            rich_help_panel=ACCESS,
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Another host name by which clients reach it, as behind a proxy; repeatable.",
            rich_help_panel=ACCESS,
        ),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL",
            help="A web site whose pages may send requests (CORS); repeatable.",
            rich_help_panel=ACCESS,
        ),
    ] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    color: RunColor = True,
    **asked: Any,
) -> None:
    """Keep the models loaded, and draw for others: programs, the shell, a browser.

    The URL is printed once it answers; it is a page for people and, with /v1, the base URL of
    OpenAI's clients. Ctrl-C and SIGTERM finish the image under way (exit codes 130 and 0).

    [b]Examples[/b]

    [dim]sana serve -m demo

    sana generate "a red star" --server http://127.0.0.1:7262

    SANA_TOKEN=$(cat token) sana serve --host 0.0.0.0 --allow-host images.example.org[/dim]
    """
    import socket

    from sana_cli.session import Session
    from sana_cli.ui import Console
    from sana_cli.units import parse_duration, parse_memory
    from sana_cli.weights.catalogue import choose_model

    console = Console(quiet, verbose, color)
    console.rich.file = cast(IO[str], _Log(sys.stderr))
    asked |= dict.fromkeys(apply_defaults(context, console))
    seconds = parse_duration(keep_alive, "--keep-alive")
    running = RunOptions(**{name: asked[name] for name in declared(RunOptions)})
    from sana_cli.server.security import is_loopback, listen

    # What can be wrong with the call is found before anything heavy is imported.
    token, made = _token(token_file, needed=not is_loopback(host))
    if asked["model"] is not None:
        choose_model(asked["model"], None)
    if loras is not None and not loras.is_dir():
        raise UsageError(f"--loras {loras} is not a folder", "name the one that holds the files")
    listener = listen(host, port)
    session = Session(
        device=running.device,
        memory=parse_memory(running.memory),
        cache=running.cache,
        offline=running.offline,
        reporter=console,
    )
    _open(session, asked["model"], console)

    from sana_cli.server.app import create_app, unforeseen
    from sana_cli.server.app import serve as run
    from sana_cli.server.jobs import JobQueue
    from sana_cli.server.loras import LoraFolder
    from sana_cli.server.metrics import Metrics
    from sana_cli.server.service import Service

    metrics = Metrics()
    drawing = JobQueue(
        session,
        most_waiting=queue,
        keep_alive=seconds,
        watch=metrics.watch,
        ended=lambda state: metrics.jobs.labels(state).inc(),
        report=lambda error: console.warn(unforeseen(error)),
    )
    service = Service(session, drawing, asked["model"], metrics, loras=LoraFolder(loras))

    hosts = [*(allow_host or []), host, socket.gethostname()]
    app = create_app(service, console, token=token, hosts=hosts, origins=allow_origin or [])
    shown = f"[{host}]" if ":" in host else host
    url = f"http://{shown}:{listener.getsockname()[1]}"

    def ready() -> None:
        if made:
            Console(color=color).line(f"token: {token}")  # which must not be lost
        console.info(f"serving on {session.device}; docs at {url}/docs")
        sys.stdout.write(f"{url}\n")
        sys.stdout.flush()

    code = run(app, service, listener, console, ready)
    raise typer.Exit(code)


class _Log(io.TextIOBase):
    """A stream that loses the lines that it cannot write, as to a reader that left or a full disk:
    an exception would end the thread that draws."""

    def __init__(self, stream: IO[str]) -> None:
        self.stream = stream

    def isatty(self) -> bool:
        return self.stream.isatty()

    def write(self, text: str) -> int:
        with suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self.stream.flush()


def _open(session: Any, model: str | None, console: Any) -> None:
    """Find the device and fetch the default model; later, a request fetches nothing."""
    from sana_cli.weights.catalogue import choose_model

    if model is not None:
        found = choose_model(model, None)
        console.info(f"model {found.name} ({found.source}), licence {found.licence}")
        session.open(found)
    session.offline = True
    session.device  # noqa: B018 - better found wrong now


def _token(file: Path | None, needed: bool) -> tuple[str | None, bool]:
    """The token, and whether it was made just now. UsageError for one that can be guessed."""
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise UsageError(f"--token-file {file} cannot be read: {reason}") from None
        token, origin = (lines[0].strip() if lines else ""), f"--token-file {file}"
    else:
        token, origin = os.environ.get(TOKEN_VARIABLE, "").strip(), TOKEN_VARIABLE
        if not token:
            import secrets

            return (secrets.token_urlsafe(32), True) if needed else (None, False)
    if len(token) < SHORTEST_TOKEN or not token.isascii() or " " in token:
        raise UsageError(
            f"{origin} holds no token of {SHORTEST_TOKEN} or more ASCII characters",
            'make one: python -c "import secrets; print(secrets.token_urlsafe(32))"',
        )
    return token, False
