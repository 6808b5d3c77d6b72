"""The `sana` command: its verbs, and the conversion of errors to messages and exit codes.

0 done · 1 other failure · 2 usage · 3 a batch with failures · 4 not enough memory · 5 model missing
· 6 not enough disk · 7 bad image · 130 interrupted · 141 its reader left · 143 terminated
"""

import atexit
import errno
import functools
import gc
import os
import re
import sys
from contextlib import suppress
from typing import Annotated, Any

import typer

from sana_cli import __version__
from sana_cli.commands import batch, bench, config, doctor, generate, info, models, serve
from sana_cli.commands._defaults import Defaults, origins
from sana_cli.commands._help import Command, Group
from sana_cli.errors import DiskFull, NotEnoughMemory, SanaError, UsageError
from sana_cli.system.signals import exit_at_once

GENERATE = 'to draw: sana generate "a red fox"; sana --help lists the commands'
DASHED = 'before a prompt that begins with a dash put --: sana generate -- "-a red fox"'
READER_LEFT = 141  # what the shell reports for a writer whose reader left
# Options of other image generators, and of diffusers.
ELSEWHERE = {
    **dict.fromkeys(("-W", "-H", "-w", "--width", "--height", "--size"), "--res 1280x720"),
    **dict.fromkeys(("-p", "--prompt"), 'the first word: sana generate "a red fox"'),
    **dict.fromkeys(("--cfg", "--cfg-scale", "--scale", "--guidance-scale"), "--guidance 4.5"),
    **dict.fromkeys(("--sampler", "--scheduler", "--sampling-method"), "--solver flow-dpm"),
    **dict.fromkeys(("--num-inference-steps", "--sampling-steps"), "--steps 20"),
    **dict.fromkeys(("--num", "--num-images", "--batch-size", "--batch-count"), "--count 4"),
    **dict.fromkeys(("--neg", "--negative-prompt"), "--negative TEXT"),
    **dict.fromkeys(("--out", "--outdir", "--output-dir"), "--output FILE or FOLDER/"),
    **dict.fromkeys(("--aspect", "--aspect-ratio"), "--ar 16:9"),
    **dict.fromkeys(("--init-image", "--init-img"), "--image FILE"),
}

app = typer.Typer(
    cls=Group,
    name="sana",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
)
app.command(cls=Command)(generate.generate)
app.add_typer(batch.app, name="batch")
app.command(cls=Command)(serve.serve)
app.command(cls=Command)(bench.bench)
app.command(cls=Command)(info.info)
app.command(cls=Command)(doctor.doctor)
app.add_typer(models.app, name="models")
app.add_typer(config.app, name="config")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sana {__version__}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Draw images from text with the Sana models, from the shell.

    [dim]sana generate "a red circle on a blue background" --model demo[/dim]
    """
    context.obj["defaults"] = defaults = Defaults(context)
    context.default_map = defaults.defaults(context.command)


@functools.cache
def command() -> Any:
    """Return the command line as Click's tree of commands, built once in a process."""
    return typer.main.get_command(app)


def main() -> None:
    atexit.register(_skip_last_collection)
    _open_closed_streams()
    _configure_streams()
    found: dict[str, Any] = {}  # facts about the call, for error messages
    try:
        with exit_at_once():
            code = command()(standalone_mode=False, obj=found)
            sys.stdout.flush()  # at its end Python would print an error in its own words
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        code = READER_LEFT
    except SystemExit as end:  # Rich ends a command so when the reader of its tables left
        code = READER_LEFT if isinstance(end.__context__, BrokenPipeError) else end.code
    except Exception as error:
        code = _report(error, found)
    _drop_unwritten()
    sys.exit(code if isinstance(code, int) else 0)


def _drop_unwritten() -> None:
    """Forget what a stream cannot take, as on a full disk or without a reader, or Python would try
    again at its end and make the exit code 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _skip_last_collection() -> None:
    """Keep Python's end from looking for garbage among the objects of the imports: 0.4 s."""
    if "triton" not in sys.modules:  # its C++ prints what was not freed
        gc.freeze()


def _open_closed_streams() -> None:
    """Open the null device for each closed standard stream, so that no file gets its number."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)
            if descriptor != number:
                os.dup2(descriptor, number)
                os.close(descriptor)
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115


def _configure_streams() -> None:
    """Make every character printable, and ignore a terminal width of zero.

    A character that stdout's code page lacks is printed as a question mark; in UTF-8 a file name
    that is not text is printed as its bytes.
    """
    if sys.stdout.errors in ("strict", "surrogateescape"):  # set by Python, not by the user
        is_utf8 = sys.stdout.encoding.lower().replace("-", "").startswith("utf8")
        errors = "surrogateescape" if is_utf8 else "replace"
        sys.stdout.reconfigure(errors=errors)  # type: ignore[union-attr]
    for name in ("COLUMNS", "LINES", "TERMINAL_WIDTH"):  # of Rich, and of Typer's help
        if os.environ.get(name, "").isdigit() and not int(os.environ[name]):
            del os.environ[name]


def _report(error: Exception, found: dict[str, Any]) -> int:
    """Print any error as one line and a hint, with --verbose also its traceback."""
    from sana_cli.ui import Console

    defaults: Defaults | None = found.get("defaults")
    verbose = any(word in ("-v", "--verbose") for word in sys.argv[1:])
    verbose = verbose or bool(defaults and defaults.value("verbose"))
    color = not (defaults and defaults.value("color") is False) or "--color" in sys.argv
    if verbose:
        import traceback

        with suppress(OSError):  # whoever would read it has left; the exit code remains
            traceback.print_exc()
    if type(error).__name__ == "NoArgsIsHelpError":  # the help is on the screen
        return UsageError.exit_code
    if hasattr(error, "format_message"):  # Typer's own usage errors, whichever Click it carries
        context = getattr(error, "ctx", None)
        message = error.format_message()
        # An unknown command is probably a prompt typed without `generate`.
        lost = message.startswith("No such command") and context and context.parent is None
        option = getattr(error, "option_name", "")
        here = ELSEWHERE.get(option)
        hint = f"here that is {here}" if here else GENERATE if lost else _help_of(context)
        error = UsageError(message, DASHED if option and _is_dashed_prompt(option) else hint)
    elif isinstance(error, UsageError) and error.message.startswith("no PROMPT"):
        error = UsageError(error.message, DASHED if _is_dashed_prompt("") else error.hint)
    if not isinstance(error, SanaError):
        error = _unexpected(error, verbose)
    if isinstance(error, UsageError):
        error = _with_origin(error, found)
    with suppress(OSError, SystemExit):  # Rich ends the program where the reader has left
        Console(color=color and "--no-color" not in sys.argv).error(error)
    return error.exit_code


def _is_dashed_prompt(option: str) -> bool:
    """Whether a prompt with spaces was parsed as options, of which `option` does not exist.

    Without `option`: as existing ones, such as the -s of "-s of fog".
    """
    typed = [word.partition("=")[0] for word in sys.argv]
    if option:
        return " " in option or (option not in typed and any(re.match("-.* ", w) for w in typed))
    pairs = zip(typed, typed[1:], strict=False)
    return any(re.match("-.* ", word) and not before.startswith("-") for before, word in pairs)


def _with_origin(error: UsageError, found: dict[str, Any]) -> UsageError:
    """Add the origin of each option in the message that was not typed."""
    words = {word.replace("-", "_") for word in re.findall(r"--([a-z-]+)", error.message)}
    blamed = {name: s for name, s in found.get("used", {}).items() if name in words}
    message = f"{error.message} ({origins(blamed)})" if blamed else error.message
    return UsageError(message, error.hint)


def _help_of(context: typer.Context | None) -> str:
    return f"{context.command_path if context else 'sana'} --help shows every option"


def _unexpected(error: Exception, verbose: bool) -> SanaError:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull("no space left to write the result", "free some, or write elsewhere")
    from sana_cli.system.devices import is_out_of_memory

    if isinstance(error, MemoryError) or ("torch" in sys.modules and is_out_of_memory(error)):
        return NotEnoughMemory("not enough memory", "ask for fewer pixels, or use --device cpu")
    hint = "this is a bug, please report the lines above" if verbose else "--verbose shows more"
    return SanaError(f"{type(error).__name__}: {error}", hint)
