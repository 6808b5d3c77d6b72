"""`sana generate`: prompts in, images out."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sana_cli.commands._defaults import apply_defaults, is_default, was_typed
from sana_cli.commands._options import (
    Json,
    Quiet,
    RunColor,
    Server,
    Verbose,
    with_options,
)
from sana_cli.commands._session import open_session
from sana_cli.errors import UsageError
from sana_cli.settings import FileOptions, RunOptions, Seeds, Settings, declared
from sana_cli.units import counted

if TYPE_CHECKING:
    from sana_cli.bench.forecast import Expected
    from sana_cli.commands._preview import TerminalPreview
    from sana_cli.images.names import Output
    from sana_cli.pipeline.events import Event, Failure, ImageDone
    from sana_cli.pipeline.plan import Plan
    from sana_cli.recipe import Recipe
    from sana_cli.session import DrawRequest, Session
    from sana_cli.ui import Console, StageBars

# Fields of a recipe that no option sets directly, and so nobody would expect to have changed.
UNTYPED = {
    *("revision", "flow_shift", "instruction", "text_dtype", "vae_dtype", "sums"),
    *("image", "mask", "control", "lora"),
}
PREVIEWS = 3  # of each image while it is denoised
STAGES = ("start", "load", "encode", "image", "denoise", "decode", "save")
# No prompt of its own is one of these.
FUNCTION_WORDS = frozenset(
    [
        "a",
        "an",
        "the",
        "of",
        "in",
        "on",
        "at",
        "by",
        "to",
        "with",
        "and",
        "or",
        "from",
        "for",
        "under",
        "over",
    ]
)


@with_options(Settings, Seeds, FileOptions, RunOptions)
def generate(
    context: typer.Context,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT", help="What to draw; [b]-[/b] reads lines from stdin."),
    ] = None,
    replay: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="IMAGE",
            help="Draw what this image's recipe says; other options and prompts override it.",
        ),
    ] = None,
    *,
    output: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--output",
            metavar="PATH",
            help="File, folder, template such as {slug}-{seed}.webp, or - for stdout."
            " [dim]default: {slug}-{seed}.png[/dim]",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print recipes and plan as JSON; load nothing.",
        ),
    ] = False,
    preview: Annotated[
        bool,
        typer.Option(
            "--preview/--no-preview",
            help="Show each image in the terminal as it forms; not with -q or --json, and never in"
            " a pipe.",
        ),
    ] = False,
    open_result: Annotated[
        bool,
        typer.Option(
            "--open", help="Open the image, or the folder of several, when they are saved."
        ),
    ] = False,
    yes: Annotated[bool, typer.Option("-y", "--yes", help="Do not ask before a download.")] = False,
    server: Server = None,
    json_output: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    color: RunColor = True,
    **asked: Any,
) -> None:
    """Draw one or more images and print their paths.

    [b]Examples[/b]

    [dim]sana generate "a red circle on a blue background" --model demo

    sana generate "a red fox in snow" --res 4096 --ar 16:9

    sana generate "a fox" "an owl" -n 4 -s 7 -o 'birds/{slug}-{seed}.webp'

    cat prompts.txt | sana generate - --json | jq -r '.images[].path'

    sana generate "a fox, oil painting" -m sana-sprint-0.6b --image fox.jpg --strength 0.5

    sana generate --from fox-7.png --steps 30

    sana generate "a fox" -o - > fox.png[/dim]
    """
    started = time.perf_counter()
    from sana_cli.images.names import check_quality, check_size, parse_output
    from sana_cli.recipe import parse_seeds
    from sana_cli.settings import check_text
    from sana_cli.ui import Console

    # What can be wrong with the call is found before anything heavy is imported.
    console = Console(quiet, verbose, color, asks=not yes)
    asked |= dict.fromkeys(apply_defaults(context, console))
    if not prompts and replay is None:
        raise UsageError("no PROMPT is given", 'say what to draw: sana generate "a red fox"')
    found = _recipe_in(replay, console) if replay is not None else {}
    if asked["seed"] is None and "seed" in found:
        asked["seed"] = str(found["seed"])
    seeds = parse_seeds(asked["seed"], asked["count"])
    check_text(output or "", "--output")
    target = parse_output(output, asked["format"])
    files = FileOptions(**{name: asked[name] for name in declared(FileOptions)})
    running = RunOptions(**{name: asked[name] for name in declared(RunOptions)})
    values = {name: asked[name] for name in declared(Settings)}
    if replay is not None:
        values = _replayed(found, values, context)
    texts = _read_prompts(prompts or []) or [values.pop("prompt", "")]
    settings = [Settings(**values | {"prompt": text}) for text in texts]
    check_quality(files.quality, {target.format})
    if target.to_stdout and not dry_run:
        _check_stdout(len(settings) * len(seeds), json_output, files.force)
    if open_result and (dry_run or target.to_stdout):
        other = "--dry-run" if dry_run else "-o -"
        raise UsageError(f"--open has no effect with {other}, which saves no file", "leave it out")
    if prompts and is_unquoted(prompts):
        text = f"{len(prompts)} prompts are drawn; quotes would make them one"
        console.warn(f'{text}: sana generate "{" ".join(prompts)[:80]}"')
    if server and dry_run:
        text = "--dry-run shows the plan of this machine, not of a --server"
        raise UsageError(text, 'leave one of them out, or add --server ""')
    # The process ends with this call, so nothing stays loaded.
    session = open_session(context, server, running, console, keep_loaded=False)
    request = session.request(settings, seeds, dry_run=dry_run)
    check_size(request.recipes[0], target.format)
    if files.metadata == "full" and target.format == "jpeg":
        # Better refused now than when the image is drawn.
        longest = max(request.recipes, key=lambda recipe: len(json.dumps(recipe.prompt)))
        session.metadata(longest).as_exif("jpeg")
    _announce(request, session.device, len(settings), console)
    _compare(request.recipes[0], found, console)
    plan = session.plan(request, predict=dry_run)
    expected = None if server else _expected_time(session, request, console)
    if dry_run:
        _print_plan(request, target, plan, expected, console)
        return
    terminal = _previewer(console, json_output) if preview else None
    rows = _draw(
        *(session, request, plan, expected, target, files),
        *(terminal, json_output, console, started),
    )
    if open_result and rows:
        _open([Path(row["path"]) for row in rows], console)


def is_unquoted(words: list[str]) -> bool:
    """Whether prompts look like one sentence whose quotes were forgotten."""
    if len(words) < 2 or "-" in words:
        return False
    single = [word for word in words if len(word.split()) == 1]
    return len(single) > 2 or any(word.lower() in FUNCTION_WORDS for word in single)


def _recipe_in(path: str, console: "Console") -> dict[str, Any]:
    """Read the recipe in an image; report what could not be read of it."""
    from sana_cli.images.metadata import recipe_of

    fields, notes = recipe_of(path)
    for text in notes:
        console.warn(f"{path}: {text}")
    return fields


def _replayed(
    recipe: dict[str, Any], values: dict[str, Any], context: typer.Context
) -> dict[str, Any]:
    """The settings of a recipe, with those that were typed in their place.

    Kept defaults rank below the recipe: they fill what it leaves open.
    """
    from sana_cli.replay import settings_of

    settings, _ = settings_of(recipe)
    typed = {name for name in values if was_typed(context, name)}
    for name, what in (
        *(("image", "an image"), ("mask", "a mask")),
        *(("control", "a control image"), ("lora", "a LoRA")),
    ):
        if recipe.get(name) and name not in typed:
            raise UsageError(
                f"the image was drawn with {what}, which is not inside it", f"add --{name} FILE"
            )
    if "model" in typed:  # another one has its own ways, and its own size
        for name in ("res", "solver", "steps", "guidance", "strength", "instruction"):
            settings.pop(name, None)
    if "ar" in typed:
        settings.pop("res", None)
    # A recipe that says nothing of one of these has still said it by the rest.
    said = {"negative"} | ({"ar", "fit"} if "res" in settings else set())
    said |= {"text_precision", "quant"} if "dtype" in settings else set()
    kept = {name for name in values if is_default(context, name)} - said
    settings = {name: values[name] for name in kept} | settings
    return settings | {name: values[name] for name in typed}


def _compare(recipe: "Recipe", found: dict[str, Any], console: "Console") -> None:
    """Warn of differences between this recipe and the one that was read."""
    new = recipe.as_dict()
    for name in UNTYPED & found.keys():
        if new.get(name) != found[name]:
            console.warn(f"{name} is {new.get(name)!r}, and was {found[name]!r} for the image")


def _announce(request: "DrawRequest", device: str, prompts: int, console: "Console") -> None:
    """Report every choice that was made, the user's and ours."""
    first, model = request.recipes[0], request.model
    if prompts > 1:
        console.info(f"{prompts} prompts, {len(request.recipes)} images")
    console.info(f"model {model.name} ({model.source}), licence {model.licence}")
    precisions = {"text": first.text_dtype, "dit": first.products, "vae": first.vae_dtype}
    same = len(set(precisions.values())) == 1
    precision = first.dit_dtype if same else ", ".join(f"{k} {v}" for k, v in precisions.items())
    precision += f" with {first.quant}" if first.quant else ""
    size = f"{first.width}x{first.height}"
    if (first.width, first.height) != (first.native_width, first.native_height):
        size += f" (drawn at {first.native_width}x{first.native_height})"
    seeds = sorted({recipe.seed for recipe in request.recipes})
    span = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"
    console.info(
        f"{size}, {span}, {first.steps} steps of {first.solver}, guidance {first.guidance:g},"
        f" instruction {'on' if first.instruction else 'off'}, on {device} in {precision}"
    )
    fitted = {"crop": "cropped", "pad": "padded", "stretch": "stretched"}
    if first.lora:
        for name, scale in request.lora_names():
            console.info(f"LoRA {name} at scale {scale:g}")
    for image in request.inputs.images():
        size = f"{image.width}x{image.height}" + (", turned by its EXIF" if image.turned else "")
        if image.role == "control":
            how = f"ControlNet {first.controlnet} at scale {first.control_scale:g}"
            console.info(f"control image {image.path} ({size}), {how}")
            continue
        if image.role != "init":
            console.info(f"mask {image.path} ({size}): {image.convention}")
            continue
        whole = first.image_fit == "stretch" and not (first.mask or first.outpaint)
        width, height = (
            (first.native_width, first.native_height) if whole else (first.width, first.height)
        )
        how = f"{fitted[first.image_fit or 'stretch']} to {width}x{height}"
        grown = f", grown by {first.outpaint}" if first.outpaint else ""
        console.info(f"from {image.path} ({size}){grown}, {how}, at strength {first.strength:g}")


def _expected_time(
    session: "Session", request: "DrawRequest", console: "Console"
) -> "Expected | None":
    """Tell about how long the images will take, if that is known or can be predicted."""
    from sana_cli.bench.forecast import Forecaster

    expected = Forecaster.of(session).expected(request.recipes, request.files)
    if expected is not None:
        console.info(str(expected))
    return expected


def _print_plan(
    request: "DrawRequest",
    target: "Output",
    plan: "Plan",
    expected: "Expected | None",
    console: "Console",
) -> None:
    from sana_cli.units import gigabytes
    from sana_cli.weights.hub_cache import source_parts

    model, recipes = request.model, request.recipes
    missing = [source for source in model.sources if source_parts(source) is None]
    missing_bytes = sum(source.bytes for source in missing)
    if missing:
        size = gigabytes(missing_bytes)
        console.info(f"would fetch {size} first: sana models pull {model.name}")
    weights = [path for part in request.files.parts.values() for path in part.files]
    paths = [] if target.to_stdout else [target.path(r, i) for i, r in enumerate(recipes, 1)]
    document = {
        "device": plan.device,
        "plan": plan.choices(),
        "memory_bytes": plan.budget,
        "peak_bytes": plan.peaks,
        "expected_time": expected and expected.as_dict(),
        "weights": [str(path) for path in weights],
        "weight_bytes": sum(path.stat().st_size for path in weights)
        or sum(source.bytes for source in model.sources),
        "download_bytes": missing_bytes,
        "paths": [str(path) for path in paths],
        "recipes": [recipe.as_dict() for recipe in recipes],
    }
    sys.stdout.write(json.dumps(document, indent=2) + "\n")


def _draw(
    session: "Session",
    request: "DrawRequest",
    plan: "Plan",
    expected: "Expected | None",
    target: "Output",
    files: FileOptions,
    preview: "TerminalPreview | None",
    json_output: bool,
    console: "Console",
    started: float,
) -> list[dict[str, Any]]:
    """Draw, show progress, and write every image as it is finished; return a row for each."""
    from sana_cli.system.signals import exit_by_exception
    from sana_cli.ui import STAGES as UI_STAGES
    from sana_cli.ui import StageBars

    seconds = {stage: 0.0 for stage in STAGES if stage != "image" or len(request.inputs)}
    seconds["start"] = time.perf_counter() - started
    peaks: dict[str, int] = {}
    rows: list[dict[str, Any]] = []
    failures: list[Failure] = []
    written: set[Path] = set()
    try:
        with exit_by_exception(), StageBars(console, UI_STAGES) as bars:
            events = session.draw(request, plan, PREVIEWS if preview else 0)
            for image in _watched(events, seconds, peaks, failures, bars, console, preview):
                if preview is not None:
                    with bars.paused():
                        preview.show(image.pixels)
                began = time.perf_counter()
                recipe = request.recipes[image.index]
                path = _save(image, recipe, session, target, files, written)
                seconds["save"] += time.perf_counter() - began
                if path is None:
                    continue
                size = {"width": recipe.width, "height": recipe.height}
                row = {"path": str(path), "seed": recipe.seed, **size, "model": recipe.model}
                rows.append(row | {"recipe": recipe.as_dict()})
                if not json_output:
                    bars.result(str(path))
    except SystemExit:  # Ctrl-C, or a request to end
        count = f"{len(rows)} of {counted(len(request.recipes), 'image')}"
        last = f", the last in {rows[-1]['path']}" if rows else ""
        console.warn(f"interrupted; saved {count}{last}")
        raise
    total = time.perf_counter() - started
    seconds |= {"other": max(0.0, total - sum(seconds.values())), "total": total}
    if json_output:
        rounded = {stage: round(value, 4) for stage, value in seconds.items()}
        document = {
            "images": rows,
            "seconds": rounded,
            "peak_bytes": peaks,
            "expected_time": expected and expected.as_dict(),
        }
        sys.stdout.write(json.dumps(document) + "\n")
    console.detail(", ".join(f"{stage} {value:.2f} s" for stage, value in seconds.items()))
    if failures:  # the others are drawn and saved
        raise failures[0].error
    return rows


def _open(paths: list[Path], console: "Console") -> None:
    """Open an image, or the folder of several, in the program that the desktop has for it."""
    shown = paths[0] if len(paths) == 1 else paths[0].resolve().parent
    if typer.launch(str(shown)):
        console.warn(f"{shown} cannot be opened: this machine has no program for it")


def _watched(
    events: "Iterator[Event]",
    seconds: dict[str, float],
    peaks: dict[str, int],
    failures: "list[Failure]",
    bars: "StageBars",
    console: "Console",
    preview: "TerminalPreview | None",
) -> "Iterator[ImageDone]":
    """Yield the images among the events; account for and show all others."""
    from sana_cli.pipeline.events import Failure, ImageDone, Notice, Preview, Progress

    for event in events:
        if isinstance(event, Notice):
            (console.warn if event.warning else console.detail)(event.text)
            if preview is not None:
                preview.leave()
        elif isinstance(event, Preview):
            if preview is not None:
                with bars.paused():
                    preview.estimate(event.pixels)
        elif isinstance(event, Failure):
            failures.append(event)
        elif isinstance(event, Progress):
            seconds[event.stage] += event.seconds
            bars.show(event)
            if event.peak_bytes:
                peaks[event.stage] = event.peak_bytes
        elif isinstance(event, ImageDone):
            yield event


def _save(
    image: "ImageDone",
    recipe: "Recipe",
    session: "Session",
    target: "Output",
    files: FileOptions,
    written: set[Path],
) -> Path | None:
    """Write an image to its file, or to stdout; its path."""
    from sana_cli.system.disk import save
    from sana_cli.ui import write_stdout

    data = session.encode(image, recipe, target.format, files)
    if target.to_stdout:
        write_stdout(data)
        return None
    path = target.path(recipe, image.index + 1)
    # --force replaces what was there before, never another image of this run.
    path = save(path, data, files.force and path not in written)
    written.add(path)
    return path


def _previewer(console: "Console", json_output: bool) -> "TerminalPreview | None":
    """What shows images in the terminal, if that can be."""
    from sana_cli.commands._preview import TerminalPreview, fault

    why_not = "--json is for programs" if json_output else fault(console.rich)
    if why_not:
        console.info(f"no preview: {why_not}")
    return None if why_not or console.quiet else TerminalPreview(console.rich)


def _read_prompts(words: list[str]) -> list[str]:
    """Prompts from the command line, with `-` replaced by the lines of stdin."""
    from sana_cli.decoding import without_marks

    texts: list[str] = []
    if words.count("-") > 1:
        raise UsageError("stdin can be read only once", "give a single -")
    for word in words:
        texts += _stdin_lines() if word == "-" else [without_marks(word)]
    return texts


def _stdin_lines() -> list[str]:
    from sana_cli.decoding import NotText, decode, lines

    try:
        found = [decode(line).strip() for line in lines([sys.stdin.buffer.read()])]
    except NotText as error:
        raise UsageError(f"stdin: {error}", f"pipe one prompt a line; {error.hint}") from None
    if not any(found):
        raise UsageError("stdin holds no prompt", "pipe one prompt a line into sana")
    return list(filter(None, found))


def _check_stdout(images: int, json_output: bool, force: bool) -> None:
    if images > 1:
        raise UsageError("-o - writes one image", "ask for one, or use -o FOLDER/")
    if force:
        raise UsageError("--force has no effect with -o -", "leave it out")
    if json_output:
        raise UsageError("-o - and --json both write to stdout", "leave one of them out")
    if sys.stdout.isatty():
        raise UsageError("-o - would write an image to the terminal", "redirect it: > image.png")
