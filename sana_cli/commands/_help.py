"""The layout of --help, for 80 columns: everyday options, and all of them with --help-all.

As in most command lines, the last of two values of an option counts; two input images are refused.
"""

from typing import Any

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup

from sana_cli.errors import UsageError
from sana_cli.settings import DRAWING, FILES, RUNNING, Settings, declared

MORE = (DRAWING, FILES, RUNNING)  # panels that only --help-all shows
ALL = "sana.help_all"  # in a context's `meta`: whether they are shown
EXAMPLES = "[b]Examples[/b]"  # the heading in a command's help
NAMES = 24  # columns of the names of options, with the space around them


class Command(TyperCommand):
    """A command with our layout of --help."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """UsageError for a second input image of a kind, which some would expect to be added."""
        _, _, given = self.make_parser(ctx).parse_args(args=list(args))
        names = [parameter.name for parameter in given]
        for name, one in declared(Settings).items():
            if one.option.upload and names.count(name) > 1:
                raise UsageError(f"--{name} is given twice", f"an image has one --{name}")
        return super().parse_args(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        _print_help(self, ctx)


class Group(TyperGroup):
    """A group of commands with our layout of --help."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        _print_help(self, ctx)


def show_all(context: typer.Context, wanted: bool) -> None:
    """Print the help with every option, and exit, if it is wanted."""
    if wanted and not context.resilient_parsing:
        context.meta[ALL] = True
        context.get_help()
        raise typer.Exit


def _print_help(command: Any, context: Any) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    console.print(Text(" ".join(command.get_usage(context).split())))
    paragraphs, examples = _parts(command.help or "")
    for text in paragraphs:
        console.print(f"\n{text}")
    if examples:
        console.print(f"\n{EXAMPLES}")
    for line in examples:  # to be copied, so the terminal wraps them
        console.print(f"  {line}", soft_wrap=True)
    panels: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
    if isinstance(command, TyperGroup):
        commands = command.commands.items()
        panels = {"Commands": [(name, _parts(one.help or "")[0][0]) for name, one in commands]}
    for parameter in command.get_params(context):
        panel = _panel(parameter)
        if panel not in MORE or context.meta.get(ALL):
            row = _names(parameter), _text(parameter, context)
            panels.setdefault(panel, []).append(row)
    for panel, rows in panels.items():
        if not rows:
            continue
        console.print(f"\n[bold]{panel}[/bold]")
        for names, text in rows:
            _print_row(console, names, text)


def _print_row(console: Any, names: str, text: str) -> None:
    """Print names, and beside them or from the next line on the text, which wraps."""
    from rich.markup import escape
    from rich.padding import Padding
    from rich.table import Table

    if len(names) > NAMES - 3:
        console.print(f"  {escape(names)}", style="bold", soft_wrap=True)
        console.print(Padding(text, (0, 0, 0, NAMES)))
        return
    grid = Table.grid()
    grid.add_column(width=NAMES, no_wrap=True)
    grid.add_column()
    grid.add_row(f"  [bold]{escape(names)}[/bold]", text)
    console.print(grid)


def _panel(parameter: Any) -> str:
    given = getattr(parameter, "rich_help_panel", None)
    return given or ("Arguments" if isinstance(parameter, TyperArgument) else "Options")


def _names(parameter: Any) -> str:
    """`-m, --model NAME`; of a switch with a --no- form `--[no-]color`."""
    if isinstance(parameter, TyperArgument):
        return str(parameter.metavar).strip("[]")
    short = [name for name in parameter.opts if not name.startswith("--")]
    long = [name for name in parameter.opts if name.startswith("--")]
    if parameter.secondary_opts:
        long = [f"--[no-]{name[2:]}" for name in long]
    words = ", ".join(short + long)
    return words if parameter.is_flag else f"{words} {parameter.metavar or ''}".rstrip()


def _text(parameter: Any, context: Any) -> str:
    """The help of a parameter, with the default that is kept, or one that it does not describe."""
    from rich.markup import escape

    text: str = parameter.help or ""
    default = parameter.get_default(context, call=False)
    if default != parameter.default:
        return f"{text} [dim]kept: {escape(str(default))}[/dim]"
    if getattr(parameter, "is_flag", False) or "[dim]" in text or default in (None, "", []):
        return text
    return f"{text} [dim]default: {escape(str(getattr(default, 'value', default)))}[/dim]"


def _parts(text: str) -> tuple[list[str], list[str]]:
    """The paragraphs of a command's help, each as one line, and its examples."""
    lines = [" ".join(part.split()) for part in text.strip().split("\n\n")]
    end = lines.index(EXAMPLES) if EXAMPLES in lines else len(lines)
    examples = "\n".join(lines[end + 1 :]).removeprefix("[dim]").removesuffix("[/dim]")
    return lines[:end], examples.splitlines()
