"""`sana config`: show the defaults and their origins, and edit the user's file."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from sana_cli import decoding
from sana_cli.commands._defaults import (
    PROJECT_FILE,
    VARIABLE,
    Defaults,
    display_path,
    option_name,
    read_file,
    read_value,
)
from sana_cli.commands._help import Command, Group
from sana_cli.commands._options import Color, Json, Quiet, Verbose, plain
from sana_cli.errors import SanaError, UsageError
from sana_cli.system import disk
from sana_cli.system.folders import cache_folder, config_file, used_bytes

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    help="Show and keep default values of options.",
)


@app.command(cls=Command)
def show(
    context: typer.Context,
    json_output: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    color: Color = True,
) -> None:
    """Show every setting with its value and origin, and where files are kept.

    Typed options take precedence, then variables such as SANA_STEPS, ./sana.toml, the user's file,
    and last the built-in defaults.
    """
    from sana_cli.ui import Console

    defaults: Defaults = context.obj["defaults"]
    faults = [*defaults.broken, *defaults.faults.values()]
    document = {
        "settings": {
            name: {"value": plain(value), "origin": origin}
            for name, value, origin in _rows(defaults)
        },
        "places": _places(),
        "problems": [error.message for error in faults],
    }
    if json_output:
        sys.stdout.write(json.dumps(document, indent=2) + "\n")
    else:
        _print(document, color)
    console = Console(quiet, verbose, color)
    for text in defaults.remarks:
        console.warn(text)
    for error in faults[1:]:
        console.error(error)
    if faults:
        raise faults[0]


@app.command(cls=Command)
def path() -> None:
    """Print the path of the user's file, which need not exist; SANA_CONFIG moves it."""
    sys.stdout.write(f"{config_file()}\n")


@app.command("set", cls=Command)
def set_value(
    context: typer.Context,
    key: Annotated[str, typer.Argument(metavar="KEY", help="As `sana config show` calls it.")],
    text: Annotated[
        str | None, typer.Argument(metavar="VALUE", help="As the option takes it.")
    ] = None,
    unset: Annotated[
        bool, typer.Option("--unset", help="Remove the key from the user's file.")
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    color: Color = True,
) -> None:
    """Keep a value in the user's file; other keys and comments stay as they are.

    [b]Examples[/b]

    [dim]sana config set model demo

    sana config set text-precision int8

    sana config set steps --unset[/dim]
    """
    from sana_cli.ui import Console

    defaults: Defaults = context.obj["defaults"]
    if unset == (text is not None):
        raise UsageError("a key is given either a VALUE or --unset", f"sana config set {key} VALUE")
    console = Console(quiet, verbose, color)
    name = option_name(key, defaults.options)
    if text is None:
        was_there = _edit(name, None)
        console.info(f"{name} is {'removed from' if was_there else 'not in'} {config_file()}")
        return
    try:
        value = read_value(defaults.options[name], text, context)
    except ValueError as error:
        raise UsageError(
            f"{key} cannot be {text!r}: {error}", "`sana generate --help` shows what it takes"
        ) from None
    _check(name, value)
    _edit(name, plain(value))
    console.info(f"{name} = {text} in {config_file()}")
    higher = defaults.settings.get(name)
    if higher and higher.origin != display_path(config_file()):
        console.warn(f"{higher.origin} has the higher rank here: {name} is {higher.text}")


def _rows(defaults: Defaults) -> list[tuple[str, Any, str]]:
    rows = []
    for name, option in defaults.options.items():
        if name in defaults.settings:
            setting = defaults.settings[name]
            rows.append((name, setting.value, setting.origin))
        else:
            rows.append((name, option.default, "invalid" if name in defaults.faults else "default"))
    return rows


def _places() -> dict[str, Any]:
    from huggingface_hub.constants import HF_HUB_CACHE

    from sana_cli.weights.hub_cache import lock_path

    user, cache = config_file(), cache_folder()
    return {
        "user_file": {"path": str(user), "exists": user.is_file()},
        "project_file": {"path": str(PROJECT_FILE.absolute()), "exists": PROJECT_FILE.is_file()},
        "cache": {"path": str(cache), "bytes": used_bytes(cache)},
        "lock": {"path": str(lock_path()), "exists": lock_path().is_file()},
        "hub_cache": {"path": str(HF_HUB_CACHE), "exists": os.path.isdir(HF_HUB_CACHE)},
    }


def _print(document: dict[str, Any], color: bool) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from sana_cli.ui import visible
    from sana_cli.units import gigabytes

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("key", no_wrap=True)
    table.add_column("value", overflow="fold")
    table.add_column("origin", overflow="fold")
    for name, row in document["settings"].items():
        style = "dim" if row["origin"] == "default" else ""
        value = "-" if row["value"] is None else json.dumps(row["value"], ensure_ascii=False)
        if isinstance(row["value"], str) and row["value"]:
            value = row["value"]
        table.add_row(*(Text(visible(text), style) for text in (name, value, row["origin"])))
    console = Console(no_color=None if color else True, highlight=False)
    # Paths may be copied: without a terminal they are neither wrapped nor cut.
    console.print(table, width=None if console.is_terminal else 10_000)
    console.print()
    for name, facts in document["places"].items():
        state = gigabytes(facts["bytes"]) if "bytes" in facts else ""
        state = state or ("" if facts["exists"] else "not there")
        line = Text.assemble((f"{name.replace('_', ' '):<14}", "dim"), visible(facts["path"]))
        console.print(line.append(f"  {state}" if state else "", "dim"), soft_wrap=True)


def _check(name: str, value: Any) -> None:
    """Check what an option's type alone does not. UsageError."""
    from sana_cli.settings import check_text, check_value, declared
    from sana_cli.shapes import parse_aspect, parse_resolution
    from sana_cli.system.devices import check_device_name
    from sana_cli.units import parse_memory

    if name in declared():
        check_value(declared()[name], value)
    if name == "negative":
        check_text(value, "--negative")
    checks = {
        "res": parse_resolution,
        "ar": parse_aspect,
        "memory": parse_memory,
        "device": check_device_name,
    }
    if name in checks:
        checks[name](value)


def _edit(name: str, value: Any) -> bool:
    """Write a value to the user's file, or remove its key; return whether the key was there."""
    import tomlkit

    # A symbolic link, common for files under version control, is kept.
    file = Path(os.path.realpath(config_file()))
    read_file(file)  # for its better error messages
    if file.exists() and not file.is_file():  # such as /dev/null
        raise UsageError(f"{file} is not a file", f"{VARIABLE}CONFIG=FILE keeps settings elsewhere")
    document = tomlkit.parse(decoding.text(file.read_bytes()) if file.is_file() else "")
    keys = [key for key in document if key.replace("-", "_") == name]
    if value is None:
        for key in keys:
            del document[key]
    else:
        document[keys[-1] if keys else name] = value
    if value is not None or keys:
        _write(file, tomlkit.dumps(document))
    return bool(keys)


def _write(file: Path, text: str) -> None:
    """Write atomically: a reader sees the old file or the new one."""
    try:
        disk.replace(file, text.encode(), keep_mode=True)
    except OSError as error:
        if error.errno in disk.FULL:
            raise
        raise SanaError(
            f"{file} cannot be written: {error.strerror}",
            f"{VARIABLE}CONFIG=FILE keeps settings elsewhere",
        ) from None
