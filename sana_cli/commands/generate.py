"""`sana generate`: prompts in, pictures out."""

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sana_cli.commands import _options as options
from sana_cli.commands._options import (
    FILES,
    RUN,
    DTypeName,
    FitName,
    MetadataKind,
    TextPrecisionName,
)
from sana_cli.commands._standing import is_standing, take_up, was_typed
from sana_cli.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from sana_cli.images.names import Output
    from sana_cli.pipeline.draw import Images
    from sana_cli.pipeline.plan import Plan
    from sana_cli.recipe import Recipe
    from sana_cli.resolve import Choice
    from sana_cli.ui import Talk
    from sana_cli.weights.catalogue import Model
    from sana_cli.weights.model_files import ModelFiles

    Preview = Callable[..., None]  # of pixels, on a console

# Of a recipe what no option sets directly, and so nobody would expect to have changed.
UNTYPED = {"revision", "flow_shift", "instruction", "image", "text_dtype", "vae_dtype"}
STAGES = ("load", "encode", "image", "denoise", "decode", "save")


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
            help="Draw what this picture's recipe says; other options and prompts override it.",
        ),
    ] = None,
    res: options.Res = None,
    ar: options.Ar = None,
    fit: options.Fit = FitName.trained,
    model: options.Model = None,
    count: Annotated[
        int | None,
        typer.Option("-n", "--count", metavar="N", help="Pictures a prompt: seeds s, s+1, …"),
    ] = None,
    seed: Annotated[
        str | None,
        typer.Option(
            "-s",
            "--seed",
            metavar="SEED",
            help="7, 1,5,9 or 1..8. [dim]default: random, printed[/dim]",
        ),
    ] = None,
    negative: options.Negative = "",
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    solver: options.Solver = None,
    image: options.Image = None,
    strength: options.Strength = None,
    instruction: options.Instruction = None,
    output: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--output",
            metavar="PATH",
            help="File, folder, template such as {slug}-{seed}.webp, or - for stdout."
            " [dim]default: {slug}-{seed}.png[/dim]",
            rich_help_panel=FILES,
        ),
    ] = None,
    force: options.Force = False,
    format: options.Format = None,
    quality: options.Quality = None,
    metadata: options.Metadata = MetadataKind.full,
    device: options.Device = "auto",
    dtype: options.DType = DTypeName.auto,
    memory: options.Memory = "auto",
    text_precision: options.TextPrecision = TextPrecisionName.auto,
    cache: options.Cache = True,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print recipes and plan as JSON; load nothing.", rich_help_panel=RUN
        ),
    ] = False,
    offline: options.Offline = False,
    preview: Annotated[
        bool,
        typer.Option(
            "--preview/--no-preview",
            help="Show each picture in the terminal; not with -q or --json, and never in a pipe.",
            rich_help_panel=RUN,
        ),
    ] = False,
    json_output: Annotated[
        bool, typer.Option("--json", help="One JSON document on stdout.", rich_help_panel=RUN)
    ] = False,
    quiet: options.RunQuiet = False,
    verbose: options.RunVerbose = False,
    color: options.RunColor = True,
) -> None:
    """Draw one or more pictures and print their paths.

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
    from sana_cli.resolve import choose
    from sana_cli.settings import Settings, check_text
    from sana_cli.ui import Talk
    from sana_cli.units import parse_memory
    from sana_cli.weights.fetch import open_chosen

    # What can be wrong with the call is found before anything heavy is imported.
    talk = Talk(quiet, verbose, color)
    aside = take_up(context, talk)
    ar = None if "ar" in aside else ar
    format = None if "format" in aside else format
    quality = None if "quality" in aside else quality
    if not prompts and replay is None:
        raise UsageError("no PROMPT is given", 'say what to draw: sana generate "a red fox"')
    found = _recipe_in(replay, talk) if replay is not None else {}
    if seed is None and "seed" in found:
        seed = str(found["seed"])
    seeds = parse_seeds(seed, count)
    check_text(output or "", "--output")
    target = parse_output(output, format.value if format else None)
    limit = parse_memory(memory)
    values: dict[str, Any] = {
        "negative": negative,
        "model": model,
        "res": res,
        "ar": ar,
        "fit": fit.value,
        "steps": steps,
        "guidance": guidance,
        "solver": solver.value if solver else None,
        "image": image,
        "strength": strength,
        "instruction": instruction,
        "dtype": dtype.value,
        "text_precision": text_precision.value,
    }
    if replay is not None:
        values = _replayed(found, values, context)
    texts = _read_prompts(prompts or []) or [values.pop("prompt", "")]
    asked = [Settings(**values | {"prompt": text}) for text in texts]
    check_quality(quality, {target.format})
    if target.to_stdout and not dry_run:
        _check_stdout(len(asked) * len(seeds), json_output, force)
    choices = [choose(settings) for settings in asked]
    first = choices[0]
    files = open_chosen(first.model, talk, offline, dry_run)

    from sana_cli.kernels.dispatch import chosen_path
    from sana_cli.pipeline.plan import make_plan
    from sana_cli.system.devices import choose_device
    from sana_cli.system.folders import cache_folder

    where = choose_device(device)
    recipes = [choice.recipe(files, where, one) for choice in choices for one in seeds]
    check_size(recipes[0], target.format)
    if metadata is MetadataKind.full and target.format == "jpeg":
        _check_fits_jpeg(recipes, where)
    _announce(talk, first.model, recipes, where)
    talk.detail("kernels: {} path, as {}".format(*chosen_path(where)))
    _compare(recipes[0], found, talk)
    if first.source is not None:
        _announce_image(talk, first, recipes[0])
    for text in first.sampling(files).warnings:
        talk.warn(text)
    plan = make_plan(recipes, files, where, limit, rehearsed=dry_run)
    for text in plan.words():
        talk.say(text)
    if dry_run:
        _print_plan(recipes, target, plan, first.model, files, talk)
    else:
        encoding = (metadata is MetadataKind.full, quality, force)
        show = _previewer(talk, json_output) if preview else None
        kept = cache_folder() if cache else None
        sources = {first.source.digest: first.source.pixels} if first.source else {}
        seen = json_output, show
        _draw(recipes, files, sources, plan, kept, target, encoding, seen, talk, started)


def _recipe_in(path: str, talk: "Talk") -> dict[str, Any]:
    """The fields of a picture's recipe, with what could not be read of it said aloud."""
    from sana_cli.images.metadata import recipe_of

    fields, notes = recipe_of(path)
    for text in notes:
        talk.warn(f"{path}: {text}")
    return fields


def _replayed(
    recipe: dict[str, Any], values: dict[str, Any], context: typer.Context
) -> dict[str, Any]:
    """The settings of a recipe, with those that were typed in their place.

    Standing choices are below the recipe: they fill what it leaves open.
    """
    from sana_cli.replay import settings_of

    settings, _ = settings_of(recipe)
    typed = {name for name in values if was_typed(context, name)}
    if "image" in recipe and recipe["image"] and "image" not in typed:
        raise UsageError(
            "the picture was drawn from another one, which is not inside it", "add --image FILE"
        )
    if "model" in typed:  # another one has its own ways, and its own size
        for name in ("res", "solver", "steps", "guidance", "strength", "instruction"):
            settings.pop(name, None)
    if "ar" in typed:
        settings.pop("res", None)
    # A recipe that says nothing of one of these has still said it by the rest.
    said = {"negative"} | ({"ar", "fit"} if "res" in settings else set())
    said |= {"text_precision"} if "dtype" in settings else set()
    standing = {name for name in values if is_standing(context, name)} - said
    settings = {name: values[name] for name in standing} | settings
    return settings | {name: values[name] for name in typed}


def _compare(recipe: "Recipe", found: dict[str, Any], talk: "Talk") -> None:
    """Say in what the picture to be drawn is not the one that its recipe was taken from."""
    new = recipe.as_dict()
    for name in UNTYPED & found.keys():
        if new[name] != found[name]:
            talk.warn(f"{name} is {new[name]!r}, and was {found[name]!r} for the picture")


def _announce(talk: "Talk", chosen: "Model", recipes: list["Recipe"], where: str) -> None:
    """Every choice that was made, the user's and ours, in two lines."""
    first = recipes[0]
    talk.say(f"model {chosen.name} ({chosen.source}), licence {chosen.licence}")
    precisions = {"text": first.text_dtype, "dit": first.dit_dtype, "vae": first.vae_dtype}
    same = len(set(precisions.values())) == 1
    precision = first.dit_dtype if same else ", ".join(f"{k} {v}" for k, v in precisions.items())
    size = f"{first.width}x{first.height}"
    if (first.width, first.height) != (first.native_width, first.native_height):
        size += f" (drawn at {first.native_width}x{first.native_height})"
    seeds = sorted({recipe.seed for recipe in recipes})
    span = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"
    talk.say(
        f"{size}, {span}, {first.steps} steps of {first.solver}, guidance {first.guidance:g},"
        f" instruction {'on' if first.instruction else 'off'}, on {where} in {precision}"
    )


def _announce_image(talk: "Talk", choice: "Choice", recipe: "Recipe") -> None:
    assert choice.source is not None
    height, width = choice.source.pixels.shape[:2]
    talk.say(
        f"from {choice.settings.image} ({width}x{height}), stretched to {recipe.native_width}x"
        f"{recipe.native_height}, at strength {recipe.strength:g}"
    )


def _print_plan(
    recipes: list["Recipe"],
    target: "Output",
    plan: "Plan",
    chosen: "Model",
    files: "ModelFiles",
    talk: "Talk",
) -> None:
    from sana_cli.units import gigabytes
    from sana_cli.weights.hub_cache import source_parts

    missing = [source for source in chosen.sources if source_parts(source) is None]
    lacking = sum(source.bytes for source in missing)
    if missing:
        talk.say(f"would fetch {gigabytes(lacking)} first: sana models pull {chosen.name}")
    weights = [path for part in files.parts.values() for path in part.files]
    document = {
        "device": plan.device,
        "plan": {
            "halves_together": plan.together,
            "rows_at_once": plan.rows,
            "strip_bytes": plan.strip_bytes,
            "networks_together": plan.resident,
        },
        "memory_bytes": plan.budget,
        "peak_bytes": plan.peaks,
        "weights": [str(path) for path in weights],
        "weight_bytes": sum(path.stat().st_size for path in weights)
        or sum(source.bytes for source in chosen.sources),
        "download_bytes": lacking,
        "paths": []
        if target.to_stdout
        else [str(target.path(r, i)) for i, r in enumerate(recipes, 1)],
        "recipes": [recipe.as_dict() for recipe in recipes],
    }
    sys.stdout.write(json.dumps(document, indent=2) + "\n")


def _draw(
    recipes: list["Recipe"],
    files: "ModelFiles",
    sources: "Images",
    plan: "Plan",
    cache: Path | None,
    target: "Output",
    encoding: tuple[bool, int | None, bool],
    seen: "tuple[bool, Preview | None]",
    talk: "Talk",
    started: float,
) -> None:
    import torch

    from sana_cli.images import files as images
    from sana_cli.images.metadata import Record
    from sana_cli.pipeline.draw import Failure, Progress, Remark, draw
    from sana_cli.system.signals import leaving_in_order
    from sana_cli.ui import Bars, write_stdout

    with_recipe, quality, force = encoding
    json_output, show = seen
    seconds = dict.fromkeys((stage for stage in STAGES if stage != "image" or sources), 0.0)
    peaks: dict[str, int] = {}
    rows: list[dict[str, Any]] = []
    written: set[Path] = set()
    failures: list[Failure] = []
    with leaving_in_order(), Bars(talk, STAGES[1:5]) as bars:
        for event in draw(recipes, files, plan, images=sources, cache=cache):
            if isinstance(event, Remark):
                (talk.warn if event.warning else talk.detail)(event.text)
                continue
            if isinstance(event, Failure):
                failures.append(event)
                continue
            if isinstance(event, Progress):
                seconds[event.stage] += event.seconds
                if event.stage in bars.tasks:
                    bars.update(event.stage, event.done, event.total)
                if event.peak_bytes:
                    peaks[event.stage] = event.peak_bytes
                continue
            recipe = recipes[event.index]
            if show is not None:
                with bars.aside():
                    show(event.pixels, talk.console)
            began = time.perf_counter()
            record = Record(recipe, plan.device, torch.__version__) if with_recipe else None
            data = images.encode(event.pixels, target.format, quality, record)
            if target.to_stdout:
                write_stdout(data)
                continue
            path = target.path(recipe, event.index + 1)
            # --force replaces what was there before, never another picture of this run.
            path = images.write(path, data, force and path not in written)
            written.add(path)
            seconds["save"] += time.perf_counter() - began
            size = {"width": recipe.width, "height": recipe.height}
            row = {"path": str(path), "seed": recipe.seed, **size, "model": recipe.model}
            rows.append(row | {"recipe": recipe.as_dict()})
            if not json_output:
                bars.result(str(path))
    seconds["total"] = time.perf_counter() - started
    if json_output:
        rounded = {stage: round(value, 4) for stage, value in seconds.items()}
        document = {"images": rows, "seconds": rounded, "peak_bytes": peaks}
        sys.stdout.write(json.dumps(document) + "\n")
    talk.detail(", ".join(f"{stage} {value:.2f} s" for stage, value in seconds.items()))
    if failures:  # the others are drawn and saved
        raise failures[0].error


def _previewer(talk: "Talk", json_output: bool) -> "Preview | None":
    """What shows a picture in the terminal, if that can be."""
    from sana_cli.images.terminal_preview import fault, show

    why_not = "--json is for programs" if json_output else fault(talk.console)
    if why_not:
        talk.say(f"no preview: {why_not}")
    return None if why_not or talk.quiet else show


def _read_prompts(words: list[str]) -> list[str]:
    """Prompts from the command line, with `-` replaced by the lines of stdin."""
    texts: list[str] = []
    if words.count("-") > 1:
        raise UsageError("stdin can be read only once", "give a single -")
    for word in words:
        texts += _stdin_lines() if word == "-" else [word]
    return texts


def _stdin_lines() -> list[str]:
    try:
        content = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError:
        raise UsageError("stdin is not UTF-8 text", "pipe one prompt a line into sana") from None
    lines = [line.strip() for line in content.splitlines() if line.strip()]
    if not lines:
        raise UsageError("stdin holds no prompt", "pipe one prompt a line into sana")
    return lines


def _check_fits_jpeg(recipes: list["Recipe"], where: str) -> None:
    """Better refused now than when the picture is drawn."""
    import torch

    from sana_cli.images.metadata import Record

    longest = max(recipes, key=lambda recipe: len(json.dumps(recipe.prompt)))
    Record(longest, where, torch.__version__).as_exif("jpeg")


def _check_stdout(pictures: int, json_output: bool, force: bool) -> None:
    if pictures > 1:
        raise UsageError("-o - writes one picture", "ask for one, or use -o FOLDER/")
    if force:
        raise UsageError("--force has no effect with -o -", "leave it out")
    if json_output:
        raise UsageError("-o - and --json both write to stdout", "leave one of them out")
    if sys.stdout.isatty():
        raise UsageError("-o - would write an image to the terminal", "redirect it: > picture.png")
