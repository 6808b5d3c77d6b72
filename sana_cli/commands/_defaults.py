"""Defaults of options from variables and files, for options that are not typed.

    --steps 30  >  SANA_STEPS=30  >  ./sana.toml  >  the user's config.toml  >  the built-in default

They become Click's `default_map`, so that an option's own type reads them, and
`context.get_parameter_source` tells them from what was typed.
"""

import math
import os
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from sana_cli import decoding
from sana_cli.errors import UsageError
from sana_cli.settings import declared, flag
from sana_cli.system.folders import config_file

if TYPE_CHECKING:
    from sana_cli.reporter import Reporter

PROJECT_FILE = Path("sana.toml")
VARIABLE = "SANA_"
PLACES = ("SANA_CONFIG", "SANA_CACHE_DIR", "SANA_DATA_DIR", "SANA_TOKEN")  # are not options

# Options that belong to one call and cannot be kept.
ONE_CALL = frozenset(
    {name for name, one in declared().items() if not one.option.kept}
    | {"prompts", "replay", "dry_run", "json_output", "help_all", "open_result", "yes"}
)
APPEARANCE = {"quiet", "verbose", "color", "preview"}  # which change no image


@dataclass(frozen=True)
class Setting:
    """A value as text, as parsed by its option, and its origin."""

    text: str
    value: Any
    origin: str


@dataclass(frozen=True)
class _Fault:
    """An invalid default. Click calls it for its value, which raises; help shows it as text."""

    error: UsageError

    def __call__(self) -> Any:
        raise self.error

    def __str__(self) -> str:
        return "unknown, as the configuration is faulty"


class Defaults:
    """The highest-ranking default for each option, and the faults of the sources."""

    def __init__(self, context: typer.Context) -> None:
        """Read the variables and both files. `context` is that of the whole command."""
        self.options = keepable_options(context.command)
        self.settings: dict[str, Setting] = {}
        self.faults: dict[str, UsageError] = {}  # of options, by their names
        self.broken: list[UsageError] = []  # of a whole file
        self.remarks: list[str] = []
        for origin, found in self._sources():
            for key, value in found.items():
                name = self._known(key, origin)
                if name is None:
                    continue
                self.settings.pop(name, None)
                self.faults.pop(name, None)
                try:
                    text = _text(value, self.options[name])
                    read = read_value(self.options[name], text, context)
                    self.settings[name] = Setting(text, read, origin)
                except ValueError as error:
                    place = key if key == origin else f"{origin}: {key}"
                    self.faults[name] = UsageError(
                        f"{place} is {value!r}: {error}",
                        "`sana generate --help` shows what it takes",
                    )

    def _sources(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the sources from the lowest rank to the highest."""
        for path in (config_file(), PROJECT_FILE):
            try:
                yield display_path(path), read_file(path)
            except UsageError as error:
                self.broken.append(error)
        for variable, text in sorted(os.environ.items()):
            if variable.startswith(VARIABLE) and variable not in PLACES and text:
                yield variable, {variable: text}

    def _known(self, key: str, origin: str) -> str | None:
        """Return the option of a key. An unknown key is a fault, an unknown variable a remark."""
        is_variable = key == origin
        name = key.removeprefix(VARIABLE).lower() if is_variable else key.replace("-", "_")
        if name in self.options:
            return name
        try:
            option_name(name, self.options)
        except UsageError as error:
            if not is_variable:
                self.broken.append(UsageError(f"{origin}: {error.message}", error.hint))
            elif error.hint and "did you mean" in error.hint or name in ONE_CALL:
                # Other variables may be for another program.
                self.remarks.append(f"{key} is not used: {error.message}")
        return None

    def defaults(self, command: Any, strict: bool = True) -> dict[str, Any]:
        """Click's `default_map` for a command and those below it.

        A fault is raised when a command looks up its option. So --help never fails, nor does
        `sana config`, which shows and repairs faults.
        """
        below = {
            name: self.defaults(sub, strict and name != "config")
            for name, sub in getattr(command, "commands", {}).items()
        }
        if "run" in below:  # as `sana batch FILE` leaves out
            below[""] = below["run"]
        mine: dict[str, Any] = {}
        for parameter in command.params:
            name = parameter.name
            # Skip an option of another meaning, such as --output of a batch.
            if name not in self.options or self.options[name].help != parameter.help:
                continue
            if strict and self.broken:
                mine[name] = _Fault(self.broken[0])
            elif strict and name in self.faults:
                mine[name] = _Fault(self.faults[name])
            elif name in self.settings:
                mine[name] = self.settings[name].text
        return mine | below

    def value(self, name: str) -> Any:
        """Return the value of an option; None if no valid one was found."""
        return self.settings[name].value if name in self.settings else None


def keepable_options(root: Any) -> dict[str, Any]:
    """Return the options of `sana generate` that may be kept, by name."""
    options = root.commands["generate"].params
    return {option.name: option for option in options if option.name not in ONE_CALL}


def option_name(key: str, options: Mapping[str, Any]) -> str:
    """Return the option's name for a key with - or _. UsageError with a suggestion otherwise."""
    name = key.replace("-", "_")
    if name in options:
        return name
    if name in ONE_CALL:
        raise UsageError(f"{key} cannot be kept: it belongs to one call", "type it where it counts")
    close = get_close_matches(name, options, n=1)
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(sorted(options))}"
    raise UsageError(f"unknown setting {key!r}", hint)


def read_file(path: Path) -> dict[str, Any]:
    """Read the values of a TOML file; empty if it does not exist. UsageError if it is invalid."""
    try:
        return tomllib.loads(decoding.text(path.read_bytes()))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except tomllib.TOMLDecodeError as error:
        raise UsageError(
            f"{display_path(path)} is not valid TOML: {error}", "correct that line"
        ) from None
    except decoding.NotText as error:
        raise UsageError(f"{display_path(path)}: {error}", error.hint) from None
    except (ValueError, RecursionError) as error:  # numbers too long, arrays too deep
        raise UsageError(
            f"{display_path(path)} cannot be read: {error}", "write it again"
        ) from None
    except OSError as error:
        reason = error.strerror
        raise UsageError(
            f"{display_path(path)} cannot be read: {reason}", "make it readable"
        ) from None


def read_value(parameter: Any, text: str, context: typer.Context) -> Any:
    """Parse text as the value of an option. ValueError with the option's message."""
    try:
        value = parameter.process_value(context, text)
    except typer.BadParameter as error:
        raise ValueError(error.message.rstrip(".")) from None
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("it is not finite")
    return value


def display_path(path: Path) -> str:
    return str(path) if path.is_absolute() else f"./{path}"


def origins(settings: Mapping[str, Setting]) -> str:
    """`{"steps": …, "model": …}` -> "from ./sana.toml: model, steps"."""
    names: dict[str, list[str]] = {}
    for name, setting in settings.items():
        names.setdefault(setting.origin, []).append(flag(name)[2:])
    return "; ".join(f"from {origin}: {', '.join(sorted(n))}" for origin, n in names.items())


def _text(value: Any, parameter: Any) -> str:
    """Convert a TOML value to option text. ValueError if it has no such form."""
    if isinstance(value, bool):
        if not parameter.is_flag:
            raise ValueError("it is not a switch")
        return "true" if value else "false"
    if not isinstance(value, str | int | float):
        raise ValueError("one string or number is wanted")
    return str(value)


# --- of one call -------------------------------------------------------------------------------


def was_typed(context: typer.Context, name: str) -> bool:
    return _source(context, name) == "COMMANDLINE"


def is_default(context: typer.Context, name: str) -> bool:
    """Whether a value comes from a variable or a file."""
    return _source(context, name) == "DEFAULT_MAP"


def _source(context: typer.Context, name: str) -> str | None:
    source = context.get_parameter_source(name)
    return source.name if source else None


def apply_defaults(context: typer.Context, reporter: "Reporter") -> set[str]:
    """Report which defaults this call uses; return those that contradict what was typed.

    Typed options take precedence, also over a contradicting default of another option: the caller
    ignores those defaults.
    """
    defaults: Defaults = context.obj["defaults"]
    for text in defaults.remarks:
        reporter.warn(text)
    found = {name for name in defaults.settings if is_default(context, name)}
    ignored = found & _contradicted(context)
    used = {name: defaults.settings[name] for name in sorted(found - ignored - APPEARANCE)}
    if used:
        reporter.info(origins(used))
    if ignored:
        names = ", ".join(flag(name)[2:] for name in sorted(ignored))
        reporter.info(f"ignored for this call: {names}")
    context.obj["used"] = used
    return ignored


def _contradicted(context: typer.Context) -> set[str]:
    from sana_cli.images.names import SUFFIXES

    values = context.params
    names: set[str] = set()
    if "output" not in values:  # a verb that writes no images
        return names
    file = os.path.basename(values["output"] or "")  # no suffix of a folder, which ends in /
    implied = SUFFIXES.get(os.path.splitext(file)[1].lower())
    if was_typed(context, "output") and implied:
        names.add("format")
    if was_typed(context, "res") and "x" in values["res"].lower():
        names.add("ar")
    if (implied or values["format"] or "png") == "png":
        names.add("quality")
    return names
