"""Options that several verbs share."""

from enum import StrEnum
from typing import Annotated

import typer

from sana_cli.commands._completion import model_or_folder

FILES, RUN = "Files", "Running"  # panels of --help

Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Only results and errors.")]
Verbose = Annotated[
    bool, typer.Option("-v", "--verbose", help="Say more, with tracebacks for errors.")
]
Color = Annotated[bool, typer.Option("--color/--no-color", help="Colour on a terminal.")]


class FitName(StrEnum):
    trained = "trained"
    exact = "exact"


class SolverName(StrEnum):
    flow_dpm = "flow-dpm"
    flow_euler = "flow-euler"
    scm = "scm"


class FormatName(StrEnum):
    png = "png"
    jpeg = "jpeg"
    webp = "webp"
    avif = "avif"


class MetadataKind(StrEnum):
    full = "full"
    none = "none"


class DTypeName(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class TextPrecisionName(StrEnum):
    auto = "auto"
    int8 = "int8"
    bf16 = "bf16"
    fp32 = "fp32"


# --- what to draw ------------------------------------------------------------------------------

Res = Annotated[
    str | None,
    typer.Option(
        "-r",
        "--res",
        metavar="SIZE",
        help="512, 1024, 2048, 4096, 1k, 2k, 4k, or an exact size such as 1280x720."
        " [dim]default: what the model draws; 1024 if none is named[/dim]",
    ),
]
Ar = Annotated[
    str | None,
    typer.Option("--ar", metavar="W:H", help="Aspect ratio, as in 16:9; not with an exact size."),
]
Fit = Annotated[
    FitName,
    typer.Option(
        "--fit",
        help="[b]trained[/b]: the nearest shape the model was trained on, resized and cropped"
        " to an exact size. [b]exact[/b]: the next multiples of 32, cropped.",
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "-m",
        "--model",
        metavar="NAME|FOLDER",
        autocompletion=model_or_folder,
        help="A model's name, a folder in the diffusers layout, or OWNER/NAME on the hub."
        " [dim]default: by --res[/dim]",
    ),
]
Negative = Annotated[
    str, typer.Option("--negative", metavar="TEXT", help="What to steer away from.")
]
Steps = Annotated[
    int | None,
    typer.Option(
        "--steps", metavar="N", help="Denoising steps. [dim]default: 20; 2 for Sprint[/dim]"
    ),
]
Guidance = Annotated[
    float | None,
    typer.Option(
        "-g",
        "--guidance",
        metavar="SCALE",
        help="How closely to follow the prompt; 1 is off, save for Sprint. [dim]default: 4.5[/dim]",
    ),
]
Solver = Annotated[
    SolverName | None,
    typer.Option(
        "--solver",
        help="How the flow is integrated; [b]scm[/b] is Sprint's, which takes no other."
        " [dim]default: flow-dpm, or scm[/dim]",
    ),
]
Image = Annotated[
    str | None,
    typer.Option(
        "--image", metavar="FILE", help="Start from this picture, not from noise; for Sprint."
    ),
]
Strength = Annotated[
    float | None,
    typer.Option(
        "--strength",
        metavar="0-1",
        help="How much of --image to replace. [dim]default: 0.6[/dim]",
    ),
]
Instruction = Annotated[
    bool | None,
    typer.Option(
        "--instruction/--no-instruction",
        help="Put the models' prompt-enhancing instruction before the prompt. [dim]default: on,"
        " but off for demo[/dim]",
    ),
]

# --- files -------------------------------------------------------------------------------------

Force = Annotated[
    bool,
    typer.Option(
        "-f", "--force", help="Overwrite; otherwise the name gets -2, -3, …", rich_help_panel=FILES
    ),
]
Format = Annotated[
    FormatName | None,
    typer.Option(
        "--format",
        help="[dim]default: by the output's suffix, else png[/dim]",
        rich_help_panel=FILES,
    ),
]
Quality = Annotated[
    int | None,
    typer.Option(
        "--quality", metavar="1-100", help="Of JPEG, WebP and AVIF.", rich_help_panel=FILES
    ),
]
Metadata = Annotated[
    MetadataKind,
    typer.Option(
        "--metadata", help="[b]none[/b] writes no recipe into the file.", rich_help_panel=FILES
    ),
]

# --- running -----------------------------------------------------------------------------------

Device = Annotated[
    str,
    typer.Option(
        "--device", metavar="NAME", help="auto, cpu, cuda, cuda:1 or mps.", rich_help_panel=RUN
    ),
]
DType = Annotated[
    DTypeName, typer.Option("--dtype", help="Precision of the networks.", rich_help_panel=RUN)
]
TextPrecision = Annotated[
    TextPrecisionName,
    typer.Option(
        "--text-precision",
        help="Precision of the text encoder, whatever --dtype says. [dim]auto: int8 for a"
        " large one on an NVIDIA GPU, else as the rest[/dim]",
        rich_help_panel=RUN,
    ),
]
Memory = Annotated[
    str,
    typer.Option(
        "--memory",
        metavar="SIZE",
        help="Stay under this much memory, as in 6GB, or refuse. [dim]auto: what is free[/dim]",
        rich_help_panel=RUN,
    ),
]
Cache = Annotated[
    bool,
    typer.Option(
        "--cache/--no-cache",
        help="Keep what the text encoder computes, and use it again.",
        rich_help_panel=RUN,
    ),
]
Offline = Annotated[
    bool,
    typer.Option(
        "--offline",
        help="Never use the network: weights that are not here are an error.",
        rich_help_panel=RUN,
    ),
]
RunQuiet = Annotated[
    bool,
    typer.Option("-q", "--quiet", help="Only results and errors.", rich_help_panel=RUN),
]
RunVerbose = Annotated[
    bool,
    typer.Option(
        "-v", "--verbose", help="Say more, with tracebacks for errors.", rich_help_panel=RUN
    ),
]
RunColor = Annotated[
    bool,
    typer.Option("--color/--no-color", help="Colour on a terminal.", rich_help_panel=RUN),
]
