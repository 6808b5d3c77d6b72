"""The session of a command: on this machine, or on a server."""

import os
from typing import TYPE_CHECKING

import typer

from sana_cli.commands._defaults import is_default, was_typed
from sana_cli.errors import UsageError
from sana_cli.settings import RunOptions, declared, flag
from sana_cli.units import parse_memory

if TYPE_CHECKING:
    from sana_cli.session import Session
    from sana_cli.ui import Console


def open_session(
    context: typer.Context,
    server: str | None,
    running: RunOptions,
    console: "Console",
    *,
    keep_loaded: bool = True,
    on_ray: bool = False,
) -> "Session":
    """Open the session of a command, which is closed when the command ends.

    With `on_ray` it is that of a driver, which draws nothing: the options are those of the actors.
    UsageError for options that are the server's to choose.
    """
    if server:
        for name in declared(RunOptions):
            if was_typed(context, name):
                text = f"{flag(name)} has no effect with --server, which has its own"
                raise UsageError(text, "give it to `sana serve`, or leave it out")
        kept = [flag(name)[2:] for name in declared(RunOptions) if is_default(context, name)]
        if kept:
            console.info(f"ignored, as the server has its own: {', '.join(kept)}")
        from sana_cli.remote import RemoteSession

        token = os.environ.get("SANA_TOKEN", "").strip() or None
        remote = RemoteSession(server, token, console)
        console.info(f"drawn by the server at {remote.url}")
        return context.with_resource(remote)
    from sana_cli.session import Session

    kind = Session
    if on_ray:
        from sana_cli.batch.on_ray import DriverSession

        kind = DriverSession
    session = kind(
        device="cpu" if on_ray else running.device,
        memory=parse_memory(running.memory),
        cache=running.cache,
        offline=running.offline,
        keep_loaded=keep_loaded,
        reporter=console,
    )
    return context.with_resource(session)
