"""The fields of a request: OpenAI's names, the common extensions, and every declared option.

An option of `sana_cli.settings` is a field unless its declaration says otherwise. Unknown fields
and values are errors.
"""

import re
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model

from sana_cli.errors import UsageError
from sana_cli.images.names import check_format, check_quality
from sana_cli.recipe import parse_seeds
from sana_cli.server.errors import ApiError, of
from sana_cli.settings import (
    LONGEST_PROMPT,
    Declared,
    FileOptions,
    Seeds,
    Settings,
    check_value,
    declared,
    flag,
    is_path,
)
from sana_cli.weights.catalogue import known_components

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

MAX_IMAGES = 10  # of one request
COMPONENTS = ("vae", "controlnet")
MAX_PARTIAL = 3  # previews of one image
MAX_LORAS, LONGEST_NAME = 8, 200  # of one request; characters
# Other names of options: OpenAI's, and those that other servers have made common.
ALIASES = {
    "n": "count",
    "size": "res",
    "output_format": "format",
    "output_compression": "quality",
    "negative_prompt": "negative",
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
}
# OpenAI's `quality`, as a multiple of the steps that a model takes by itself.
EFFORT = {"low": 0.5, "medium": 1, "standard": 1, "high": 2, "hd": 2}


@dataclass(frozen=True)
class Asked:
    """A request, read. `names` are the fields that gave options, where they have another name."""

    settings: dict[str, Any]  # fields of Settings
    seeds: list[int]
    files: FileOptions
    format: str
    effort: float | None
    response_format: str
    stream: bool
    previews: int
    progress: bool
    dry_run: bool
    names: dict[str, str]


def by_name() -> dict[str, Declared]:
    """The declared options that a request may set, by their names: none that names a file.

    A model, a LoRA, an autoencoder or a ControlNet is one of those that are known by a name.
    """
    known = declared(Settings, Seeds, FileOptions)
    allowed = ("model", "lora", *COMPONENTS)  # `Service` checks the first two
    return {
        n: one for n, one in known.items() if one.option.http and (n in allowed or not is_path(one))
    }


@cache
def uploads() -> tuple[str, ...]:
    """The options whose value is an image that the request carries."""
    return tuple(n for n, one in declared(Settings).items() if one.option.upload)


# What OpenAI's API has and no option here is.
PROTOCOL: dict[str, Any] = {
    "quality": (
        Literal["auto", "low", "medium", "high", "standard", "hd"] | None,
        Field(None, description="Half, once or twice the steps that the model takes by itself."),
    ),
    "background": (
        Literal["auto", "opaque"] | None,
        Field(None, description="Images here are opaque."),
    ),
    "moderation": (
        Literal["auto", "low"] | None,
        Field(None, description="Without effect: there is none here."),
    ),
    "user": (str | None, Field(None, description="Without effect.")),
    "response_format": (
        Literal["b64_json", "url"] | None,
        Field(None, description="`url` is one of this server, while it remembers the image."),
    ),
    "stream": (bool | None, Field(None, description="Answer with server-sent events.")),
    "partial_images": (
        int | None,
        Field(None, ge=0, le=MAX_PARTIAL, description="Previews of each image in the stream."),
    ),
    "progress": (bool | None, Field(None, description="Every step as an event of the stream.")),
    "dry_run": (bool | None, Field(None, description="Answer with the recipes; draw nothing.")),
}


@cache
def request_model() -> type[BaseModel]:
    """The body of a request for images, as OpenAPI describes it."""
    known: dict[str, Any] = {
        "prompt": (
            str,
            Field(..., min_length=1, max_length=LONGEST_PROMPT, description="What to draw."),
        )
    }
    options = declared(Settings, Seeds, FileOptions)
    for name, one in by_name().items():
        known[name] = _field(one)
    for name in uploads():
        if words := options[name].option.words:
            kind: Any = Literal[words]
            known[name] = (kind | None, Field(None, description=_help(options[name])))
    for alias, name in ALIASES.items():
        known[alias] = _field(options[name])
    return create_model("ImageRequest", __config__=ConfigDict(extra="forbid"), **(known | PROTOCOL))


def _field(one: Declared) -> tuple[Any, Any]:
    kind: Any = one.kind
    bounds: dict[str, Any] = {}
    if one.option.choices:
        kind = Literal[one.option.choices]
    elif one.name in COMPONENTS:
        kind = Literal[tuple(known_components(one.name))]
    elif one.name in ("res", "seed"):
        kind = str | int
    elif one.option.bounds:
        least, most = one.option.bounds
        bounds = {"ge": kind(least) if least == kind(least) else least, "le": kind(most)}
    if one.name == "count":
        bounds = {"ge": 1, "le": MAX_IMAGES}
    if one.kind is float:
        bounds["allow_inf_nan"] = False
    if kind in (int, float):
        kind = Annotated[kind, BeforeValidator(_no_switch)]
    if one.name == "lora":
        text = "NAME[:SCALE] of each LoRA, as in GET /v1/loras."
        kind = Annotated[str, Field(max_length=LONGEST_NAME)]
        return (tuple[kind, ...] | None, Field(None, max_length=MAX_LORAS, description=text))
    return (Annotated[kind, Field(**bounds)] | None, Field(None, description=_help(one)))


def _no_switch(value: Any) -> Any:
    """Refuse true and false as numbers, which Python takes for 1 and 0."""
    if isinstance(value, bool):
        raise ValueError("a number is wanted")
    return value


def _help(one: Declared) -> str:
    """The help of an option, without the colours of a terminal."""
    return re.sub(r"\[/?b\]", "`", re.sub(r"\[/?dim\]", "", one.option.help))


def parse(values: "Mapping[str, Any]") -> BaseModel:
    """Check the fields of a form or a document. ApiError for what is wrong."""
    try:
        return request_model().model_validate(values)
    except ValidationError as error:
        raise invalid(error.errors(include_url=False, include_input=False)) from None


def invalid(errors: "Sequence[Any]") -> ApiError:
    """The first of pydantic's complaints."""
    first = errors[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    name = place[0] if place else None
    if first["type"] == "extra_forbidden":
        if name in uploads():
            text = f"{name} is an image: send it as a file to /v1/images/edits"
            return ApiError(400, text, param=name, code="invalid_value")
        close = get_close_matches(name or "", known_names(), n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        text = ascii(name)[1:-1][:80]
        return ApiError(400, f"unknown field {text!r}{hint}", param=text, code="unknown_parameter")
    if first["type"] == "missing":
        return ApiError(400, f"{name or 'the body'} is missing", param=name, code="missing")
    if first["type"] == "json_invalid":
        return ApiError(400, "the body is not valid JSON", code="invalid_json")
    message = f"{name}: {first['msg']}" if name else first["msg"]
    return ApiError(400, message, param=name, code="invalid_value")


def known_names() -> list[str]:
    return [*request_model().model_fields, *uploads()]


def read(body: BaseModel) -> Asked:
    """What a checked body asks for. UsageError for what no model takes."""
    given = {name: value for name, value in body if value is not None}
    options, names = declared(Settings, Seeds, FileOptions), {}
    values = {name: given[name] for name in (*by_name(), *uploads()) if name in given}
    for alias, name in ALIASES.items():
        if alias in given:
            if name in values:
                raise UsageError(f"--{alias} and {flag(name)} are the same", "leave one out")
            if alias == "size" and given[alias] == "auto":
                continue
            values[name], names[name] = given[alias], alias
    for name in ("res", "seed"):
        if name in values:
            values[name] = str(values[name])
    for name, value in values.items():
        check_value(options[name], value)
    check_format(values.get("format", "png"))
    effort = EFFORT.get(given.get("quality", "auto"))
    if effort is not None and "steps" in values:
        raise UsageError("--quality and --steps both say how many steps", "leave one out")
    stream = given.get("stream", False)
    for name in ("partial_images", "progress"):
        if given.get(name) and not stream:
            raise UsageError(f"--{name} has no effect without --stream", "add stream: true")
    if stream and given.get("response_format") == "url":
        raise UsageError("--response_format is b64_json in a stream", "leave it out")
    seeds = parse_seeds(values.get("seed"), values.get("count"))
    if len(seeds) > MAX_IMAGES:
        raise UsageError(f"--seed names more than {MAX_IMAGES} images", "ask for fewer")
    files = {one.name: values[one.name] for one in fields(FileOptions) if one.name in values}
    format = files.get("format", "png")
    if format == "png" and files.get("quality") == 100:
        del files["quality"]  # as OpenAI's own default
    check_quality(files.get("quality"), {format})
    return Asked(
        settings={n: v for n, v in values.items() if n in declared(Settings)}
        | {"prompt": given["prompt"]},
        seeds=seeds,
        files=FileOptions(**files),
        format=format,
        effort=effort,
        response_format=given.get("response_format", "b64_json"),
        stream=stream,
        previews=given.get("partial_images", 0),
        progress=given.get("progress", False),
        dry_run=given.get("dry_run", False),
        names=names,
    )


def read_or_refuse(body: BaseModel) -> Asked:
    """`read`, with ApiError."""
    try:
        return read(body)
    except UsageError as error:
        names = {one: alias for alias, one in ALIASES.items() if getattr(body, alias) is not None}
        raise of(error, names) from None
