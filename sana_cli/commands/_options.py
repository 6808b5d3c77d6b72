"""Convert declared options to Typer's, and declare those of the command line alone."""

import functools
import inspect
from collections.abc import Callable
from enum import Enum, StrEnum
from typing import Annotated, Any

import typer

from sana_cli.commands._completion import model_or_folder
from sana_cli.commands._help import show_all
from sana_cli.settings import RUNNING, Declared, declared, flag

COMPLETIONS = {"model": model_or_folder}

Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Only results and errors.")]
Verbose = Annotated[
    bool, typer.Option("-v", "--verbose", help="Say more, with tracebacks for errors.")
]
HelpAll = Annotated[
    bool,
    typer.Option("--help-all", callback=show_all, is_eager=True, help="Show every option."),
]
Color = Annotated[bool, typer.Option("--color/--no-color", help="Colour on a terminal.")]


def with_options(
    *groups: type, only: frozenset[str] | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add the options declared in some groups to a command, or `only` some of them.

    In --help they are listed after its positional parameters and before its keyword-only ones;
    --help-all comes last.
    The command receives them by name through `**`, a choice as plain text.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        known = declared(*groups)
        taken = {n: one for n, one in known.items() if only is None or n in only}
        own = inspect.signature(command, eval_str=True).parameters.values()
        first = [p for p in own if p.kind is p.POSITIONAL_OR_KEYWORD]
        last = [p for p in own if p.kind is p.KEYWORD_ONLY]
        middle = [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=_default(one), annotation=_typed(one)
            )
            for name, one in taken.items()
        ]

        last.append(
            inspect.Parameter(
                "help_all", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=HelpAll
            )
        )

        @functools.wraps(command)
        def run(*arguments: Any, **values: Any) -> None:
            del values["help_all"]
            chosen = {name: plain(values.pop(name)) for name in taken}
            command(*arguments, **values, **chosen)

        del run.__wrapped__  # its signature is not the command's
        run.__signature__ = inspect.Signature([*first, *middle, *last])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in (*first, *middle, *last)}
        return run

    return decorate


def plain(value: Any) -> Any:
    """Return the text of a choice, any other value unchanged."""
    if isinstance(value, list):
        return tuple(map(plain, value))
    return value.value if isinstance(value, Enum) else value


@functools.cache
def _enum(name: str, choices: tuple[str, ...]) -> Any:
    """Create the enum by which Typer lists and checks choices."""
    return StrEnum(name, {choice.replace("-", "_"): choice for choice in choices})


def _default(one: Declared) -> Any:
    if one.repeated:
        return list(one.default)
    if one.option.choices and one.default is not None:
        return _enum(one.name, one.option.choices)(one.default)
    return one.default


def _typed(one: Declared) -> Any:
    option = one.option
    kind: Any = _enum(one.name, option.choices) if option.choices else one.kind
    words = [option.flag] if option.flag else []
    name = flag(one.name)
    words.append(f"{name}/--no-{name[2:]}" if one.kind is bool and option.off else name)
    described = typer.Option(
        *words,
        metavar=option.metavar or "|".join(option.choices) or None,
        help=option.help,
        rich_help_panel=option.panel,
        autocompletion=COMPLETIONS.get(option.complete or ""),
    )
    if one.repeated:
        return Annotated[list[kind], described]
    return Annotated[kind | None if one.optional else kind, described]


# --- of the command line alone -----------------------------------------------------------------

RunColor = Annotated[
    bool, typer.Option("--color/--no-color", help="Colour on a terminal.", rich_help_panel=RUNNING)
]
Server = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Let this `sana serve` draw; its token, if it has one, is in SANA_TOKEN.",
        rich_help_panel=RUNNING,
    ),
]
