"""Every option, declared once.

A field of one of the classes below is an option everywhere: of the command line, as a column of a
batch, as a key of `sana config` and a `SANA_*` variable, as a field of a request to `sana serve`,
and as an argument in Python; its bounds
and choices also check what is read from an image. To add an option, add a field here and the code
that uses it.
"""

import types
import typing
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

from sana_cli.errors import UsageError
from sana_cli.units import parse_memory

LONGEST_PROMPT = 20_000  # characters; the models read 300 tokens of them
EVERYDAY = None  # the options that --help shows; the panels below it are shown by --help-all
DRAWING, FILES, RUNNING = "Drawing", "Files", "Running"


@dataclass(frozen=True)
class Option:
    """The declaration of an option, beside its name, type and default."""

    help: str
    flag: str | None = None  # a short one, such as "-r"
    metavar: str | None = None
    choices: tuple[str, ...] = ()
    bounds: tuple[float, float] | None = None  # both inclusive
    panel: str | None = DRAWING  # of --help
    off: bool = True  # whether a switch has a --no- form
    column: bool = True  # may be set by a row of a batch
    kept: bool = True  # may be kept by `sana config` and SANA_* variables
    at_load: bool = False  # decides what is loaded: an argument of `Pipeline`, not of `generate`
    http: bool = True  # may be set by a request to `sana serve`
    upload: bool = False  # names an image file, which a request sends instead
    complete: str | None = None  # what the shell completes: "model"

    @property
    def words(self) -> tuple[str, ...]:
        """What the value of an upload may be instead of a file."""
        return tuple(word for word in (self.metavar or "").split("|") if word.islower())


def option(default: Any, **declared: Any) -> Any:
    """Declare a field as an option."""
    return field(default=default, metadata={"option": Option(**declared)})


@dataclass(frozen=True)
class Settings:
    """The settings of an image, except its seed. None leaves the choice to the model.

    UsageError for a value that no model takes.
    """

    prompt: str
    res: str | None = option(
        None,
        panel=EVERYDAY,
        flag="-r",
        metavar="SIZE",
        help="512, 1024, 2048, 4096, 1k, 2k, 4k, or an exact size such as 1280x720."
        " [dim]default: what the model draws; 1024 if none is named[/dim]",
    )
    ar: str | None = option(
        None,
        metavar="W:H",
        help="Aspect ratio, as in 16:9; not with an exact size.",
        panel=EVERYDAY,
    )
    fit: str = option(
        "trained",
        choices=("trained", "exact"),
        help="[b]trained[/b]: the nearest shape the model was trained on, resized and cropped"
        " to an exact size. [b]exact[/b]: the next multiples of 32, cropped.",
    )
    model: str | None = option(
        None,
        panel=EVERYDAY,
        flag="-m",
        metavar="NAME|FOLDER",
        complete="model",
        at_load=True,
        help="A model's name, a folder in the diffusers layout, a transformer's .safetensors file,"
        " or OWNER/NAME on the hub. [dim]default: by --res[/dim]",
    )
    negative: str = option("", metavar="TEXT", help="What to steer away from.", panel=EVERYDAY)
    steps: int | None = option(
        None,
        panel=EVERYDAY,
        metavar="N",
        bounds=(1, 1000),
        help="Denoising steps. [dim]default: 20; 2 for Sprint[/dim]",
    )
    guidance: float | None = option(
        None,
        panel=EVERYDAY,
        flag="-g",
        metavar="SCALE",
        bounds=(0, 100),
        help="How closely to follow the prompt; 1 is off, save for Sprint. [dim]default: 4.5[/dim]",
    )
    solver: str | None = option(
        None,
        choices=("flow-dpm", "flow-euler", "scm"),
        help="How the flow is integrated; [b]scm[/b] is Sprint's, which takes no other."
        " [dim]default: flow-dpm, or scm[/dim]",
    )
    image: str | None = option(
        None,
        panel=EVERYDAY,
        metavar="FILE",
        kept=False,  # kept, it would start every image from the same one
        upload=True,
        help="Start from this image, not from noise.",
    )
    strength: float | None = option(
        None,
        panel=EVERYDAY,
        metavar="0-1",
        bounds=(0.01, 1),
        kept=False,  # it means nothing without an image
        help="Share of the steps that are run, and so how much of --image is replaced. Low values"
        " already change much: 0.5 begins at 75 % noise with the 1K models (flow shift 3), at"
        " 86 % with the 4K model (6). [dim]default: 0.6; 1 with --mask or --outpaint[/dim]",
    )
    image_fit: str | None = option(
        None,
        choices=("crop", "pad", "stretch"),
        kept=False,  # it means nothing without an image
        help="How --image is brought to the size that is drawn. [dim]default: crop[/dim]",
    )
    mask: str | None = option(
        None,
        panel=EVERYDAY,
        metavar="FILE|alpha",
        kept=False,
        upload=True,
        help="Repaint --image only where this image is white, or transparent if it has an alpha"
        " channel; [b]alpha[/b] takes that of --image itself.",
    )
    outpaint: str | None = option(
        None,
        metavar="L,T,R,B",
        kept=False,
        help="Grow the canvas of --image by so many pixels on each side, and paint them.",
    )
    lora: tuple[str, ...] = option(
        (),
        panel=EVERYDAY,
        metavar="FILE|REPO[/FILE][:SCALE]",
        kept=False,  # a list has no form in variables and one-line settings
        help="Add a LoRA, at a scale if not 1; may be repeated. OWNER/NAME is one on the hub.",
    )
    control: str | None = option(
        None,
        metavar="FILE",
        kept=False,
        upload=True,
        help="An image that the ControlNet follows, of the kind it was trained on, such as edges.",
    )
    control_scale: float | None = option(
        None,
        metavar="SCALE",
        bounds=(0, 10),
        kept=False,
        help="How closely to follow --control. [dim]default: 1[/dim]",
    )
    controlnet: str | None = option(
        None,
        metavar="NAME|FOLDER",
        kept=False,
        help="The ControlNet for --control. [dim]default: the one known for the model[/dim]",
    )
    pag: float | None = option(
        None,
        metavar="SCALE",
        bounds=(0, 100),
        help="Perturbed-attention guidance, which sharpens structure; 2 to 3 is usual. Each step"
        " takes longer, by one more pass from --pag-layer on. [dim]default: off[/dim]",
    )
    pag_layer: int | None = option(
        None,
        metavar="N",
        bounds=(0, 1000),
        kept=False,  # it means nothing without --pag
        help="Layer whose self-attention --pag perturbs. [dim]default: 8[/dim]",
    )
    pag_adaptive: float | None = option(
        None,
        metavar="RATE",
        bounds=(0, 100),
        kept=False,
        help="What --pag loses with every timestep below 1000. [dim]default: 0[/dim]",
    )
    instruction: bool | None = option(
        None,
        help="Put the models' prompt-enhancing instruction before the prompt. [dim]default: on,"
        " but off for demo[/dim]",
    )
    vae: str | None = option(
        None,
        metavar="NAME|FOLDER",
        at_load=True,
        help="Another autoencoder of the same latents, such as [b]lite[/b]."
        " [dim]default: the model's own[/dim]",
    )
    dtype: str = option(
        "auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        panel=RUNNING,
        at_load=True,
        help="Precision of the networks.",
    )
    quant: str = option(
        "none",
        choices=("none", "w8a8"),
        panel=RUNNING,
        at_load=True,
        help="[b]w8a8[/b]: the transformer's large matrix products in 8 bits, which changes the"
        " image slightly. `sana doctor` tells whether it is faster here.",
    )
    text_precision: str = option(
        "auto",
        choices=("auto", "int8", "bf16", "fp32"),
        panel=RUNNING,
        at_load=True,
        help="Precision of the text encoder, whatever --dtype says. [dim]auto: int8 for a"
        " large one on a small NVIDIA GPU, else as the rest[/dim]",
    )

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise UsageError("a prompt is empty", 'say what to draw: sana generate "a red fox"')
        check_text(self.prompt, "a prompt")
        check_text(self.negative, "--negative")
        check(self)
        if not self.pag:
            for name in ("pag_layer", "pag_adaptive"):
                if getattr(self, name) is not None:
                    raise UsageError(f"{flag(name)} has no effect without --pag", "add --pag 3")
        if self.control is None:
            for name in ("control_scale", "controlnet"):
                if getattr(self, name) is not None:
                    raise UsageError(
                        f"{flag(name)} has no effect without --control", "add --control FILE"
                    )
        if self.image is None:
            for name in ("strength", "image_fit", "mask", "outpaint"):
                fits_control = name == "image_fit" and self.control is not None
                if getattr(self, name) is not None and not fits_control:
                    raise UsageError(
                        f"{flag(name)} has no effect without --image", "add --image FILE"
                    )


@dataclass(frozen=True)
class Seeds:
    """The images to draw of a prompt. Both are text, as they are typed; see `parse_seeds`."""

    count: int | None = option(
        None,
        panel=EVERYDAY,
        flag="-n",
        metavar="N",
        kept=False,  # scripts read one path
        help="Images of each prompt: seeds s, s+1, …",
    )
    seed: str | None = option(
        None,
        panel=EVERYDAY,
        flag="-s",
        metavar="SEED",
        kept=False,  # kept, it would draw the same image every time
        help="A seed (7), a list (1,5,9) or a range (1..8). [dim]default: random, and printed; in a"
        " batch a hash of the job[/dim]",
    )


@dataclass(frozen=True)
class FileOptions:
    """Options of the image file."""

    force: bool = option(
        False,
        panel=EVERYDAY,
        flag="-f",
        off=False,
        column=False,
        http=False,
        kept=False,  # kept, it would overwrite files unexpectedly
        help="Overwrite; otherwise the name gets -2, -3, …",
    )
    format: str | None = option(
        None,
        panel=EVERYDAY,
        choices=("png", "jpeg", "webp", "avif"),
        column=False,
        http=False,
        help="[dim]default: by the output's suffix, else png[/dim]",
    )
    quality: int | None = option(
        None,
        metavar="1-100",
        bounds=(1, 100),
        panel=FILES,
        column=False,
        http=False,
        help="Quality of JPEG, WebP and AVIF. [dim]default: 92, 90, 80[/dim]",
    )
    metadata: str = option(
        "full",
        choices=("full", "none"),
        panel=FILES,
        column=False,
        help="[b]none[/b] writes no recipe into the file.",
    )


@dataclass(frozen=True)
class RunOptions:
    """The device, memory and precision limits of a run. UsageError for invalid values."""

    device: str = option(
        "auto",
        metavar="NAME",
        panel=RUNNING,
        column=False,
        http=False,
        at_load=True,
        help="auto, cpu, cuda, cuda:1 or mps.",
    )
    memory: str = option(
        "auto",
        metavar="SIZE",
        panel=RUNNING,
        column=False,
        http=False,
        at_load=True,
        help="Stay under this much memory, as in 6GB, or refuse. [dim]auto: what is free[/dim]",
    )
    cache: bool = option(
        True,
        panel=RUNNING,
        column=False,
        http=False,
        at_load=True,
        help="Keep what the text encoder computes, and 8-bit weights, and use them again.",
    )
    offline: bool = option(
        False,
        panel=RUNNING,
        off=False,
        column=False,
        http=False,
        at_load=True,
        help="Never use the network: weights that are not here are an error.",
    )

    def __post_init__(self) -> None:
        check(self)
        parse_memory(self.memory)


GROUPS = (Settings, Seeds, FileOptions, RunOptions)


@dataclass(frozen=True)
class Declared:
    """A complete declaration: an option with the name, type and default of its field."""

    name: str
    kind: type  # str, int, float or bool; of each value, if it is repeated
    optional: bool  # whether None leaves the choice to others
    repeated: bool  # whether several values may be given
    default: Any
    option: Option


def declared(*groups: type) -> dict[str, Declared]:
    """Return the options of some groups, or of all, in order."""
    found = (_declared(one) for group in groups or GROUPS for one in fields(group))
    return {one.name: one for one in found if one is not None}


def _declared(one: "Field[Any]") -> Declared | None:
    if "option" not in one.metadata:
        return None
    optional = isinstance(one.type, types.UnionType)
    repeated = typing.get_origin(one.type) is tuple
    inner = [kind for kind in typing.get_args(one.type) if kind not in (type(None), ...)]
    kind = inner[0] if inner else None
    default = None if one.default is MISSING else one.default
    kind = kind or typing.cast(type, one.type)
    return Declared(one.name, kind, optional, repeated, default, one.metadata["option"])


def is_path(one: Declared) -> bool:
    """Whether a value may name a file or a folder of this machine."""
    metavar = one.option.metavar or ""
    return one.option.upload or "FILE" in metavar or "FOLDER" in metavar


def choices(name: str) -> tuple[str, ...]:
    """Return the choices of an option; empty if it has none."""
    return declared()[name].option.choices


def bounds(name: str) -> tuple[float, float]:
    """Return the minimum and maximum of a numeric option."""
    found = declared()[name].option.bounds
    assert found is not None, f"{name} is declared without bounds"
    return found


def check(group: Any) -> None:
    """Check all values of a group against their choices and bounds; UsageError."""
    for name, one in declared(type(group)).items():
        check_value(one, getattr(group, name))


def check_value(one: Declared, value: Any) -> None:
    """Check a value against the choices and bounds of an option; UsageError."""
    if value is None:
        return
    if one.option.choices and value not in one.option.choices:
        known = ", ".join(one.option.choices)
        raise UsageError(f"{flag(one.name)} {value!r} is not one of {known}")
    if one.option.bounds is not None:
        least, most = one.option.bounds
        if not least <= value <= most:
            raise UsageError(f"{flag(one.name)} {value} is not between {least:g} and {most:g}")


def flag(name: str) -> str:
    """`text_precision` -> `--text-precision`."""
    return f"--{name.replace('_', '-')}"


def check_text(text: str, what: str) -> None:
    """Check that text is valid UTF-8, without NUL and not too long; UsageError."""
    if "\0" in text or len(text) > LONGEST_PROMPT:
        limit = f"is longer than {LONGEST_PROMPT} characters or holds a NUL"
        raise UsageError(f"{what} {limit}", "shorten it")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{what} is not valid UTF-8 text") from None
