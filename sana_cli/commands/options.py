"""Options that several verbs share."""

from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Only results and errors.")]
Verbose = Annotated[
    bool, typer.Option("-v", "--verbose", help="Say more, with tracebacks for errors.")
]
Color = Annotated[bool, typer.Option("--color/--no-color", help="Colour on a terminal.")]
