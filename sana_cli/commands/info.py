"""`sana info`: show the recipe in an image and the command that reproduces it; list the images of a
folder, the newest first; describe a LoRA.
"""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sana_cli.commands._options import Color, Json, Quiet, Verbose
from sana_cli.errors import SanaError, UsageError

if TYPE_CHECKING:
    from sana_cli.images.metadata import ImageMetadata
    from sana_cli.ui import Console

NEWEST = 20  # images of a folder that are listed


def info(
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE…",
            help="PNG, JPEG, WebP or AVIF files; folders of them; a LoRA's .safetensors.",
        ),
    ],
    command: Annotated[
        bool,
        typer.Option("--command", help="Print only the command that redraws each image."),
    ] = False,
    sheet: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Write a contact sheet of the images, or with .html a page with their recipes.",
        ),
    ] = None,
    json_output: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    color: Color = True,
) -> None:
    """Show the recipe inside an image, written by sana or another tool.

    [dim]Other tools: A1111, Civitai, ComfyUI, Draw Things, Easy Diffusion, Fooocus, Forge,
    InvokeAI, mflux, NovelAI, SD.Next, stable-diffusion.cpp, SwarmUI.[/dim]

    Of a folder, list the newest images, a line each. Of a LoRA file, show the container, the ranks
    and the models that it fits.

    [b]Examples[/b]

    [dim]sana info fox-7.png

    sana info --json fox-7.png | jq '.images[].recipe.seed'

    sana info --command fox-7.png | sh

    sana info .

    sana info --sheet sheet.webp jobs-images/

    sana info style.safetensors[/dim]
    """
    if command and json_output:
        raise UsageError("--command and --json both write to stdout", "leave one of them out")
    from sana_cli.images.metadata import read
    from sana_cli.replay import command_of
    from sana_cli.ui import Console

    console = Console(quiet, verbose, color)
    if sheet is not None:
        if command or json_output:
            given = "--command" if command else "--json"
            raise UsageError(f"{given} has no effect with --sheet", "leave one of them out")
        from sana_cli.sheet import check_sheet, images_in, write_sheet

        target = check_sheet(sheet)
        written = write_sheet(target, images_in(images, target), False, console)
        sys.stdout.write(f"{written}\n")
        return
    if command or json_output:
        images = [path for image in images for path in (_images_in(image) or [image])]
    rows: list[dict[str, Any]] = []
    loras: list[dict[str, Any]] = []
    code = 0
    for number, image in enumerate(images):
        try:
            if (listed := _images_in(image)) is not None:
                sys.stdout.write("\n" * bool(number))
                _list(image, listed, console, color)
                continue
            if image.lower().endswith(".safetensors"):
                loras.append(_lora(image, command))
                if not json_output:
                    sys.stdout.write("\n" * bool(number))
                    _show_lora(loras[-1], color)
                continue
            found = read(image)
            line, remarks = command_of(found.recipe) if "prompt" in found.recipe else (None, [])
            if command and line is None:
                raise SanaError(f"the recipe in {image[:200]} has no prompt", "write one yourself")
        except SanaError as error:
            if len(images) == 1 and not json_output:
                raise
            code = max(code, error.exit_code)
            console.error(error)
            rows.append({"path": image, "error": error.message})
            continue
        for note in found.notes + remarks * (command or json_output):
            console.warn(f"{image}: {note}" if len(images) > 1 else note)
        rows.append(_document(found, line, remarks))
        if command:
            sys.stdout.write(f"{line}\n")
        elif not json_output:
            if number:
                sys.stdout.write("\n")
            _show(found, line, remarks, verbose, color)
    if json_output:
        sys.stdout.write(
            json.dumps({"images": rows} | ({"loras": loras} if loras else {}), indent=2) + "\n"
        )
    if code:
        raise typer.Exit(code)


def _images_in(folder: str) -> list[str] | None:
    """The image files of a folder, the newest first; None if it is no folder.

    UsageError if it cannot be read.
    """
    from sana_cli.images.names import SUFFIXES

    if not os.path.isdir(folder):
        return None
    try:
        files = [Path(one.path) for one in os.scandir(folder) if one.is_file()]
    except OSError as error:
        raise UsageError(f"{folder} cannot be read: {error.strerror}") from None
    images = [path for path in files if path.suffix.lower() in SUFFIXES]
    return [str(path) for path in sorted(images, key=lambda path: -path.stat().st_mtime_ns)]


def _list(folder: str, images: list[str], console: "Console", color: bool) -> None:
    """Print a line for each of the newest images of a folder."""
    from rich.console import Console as RichConsole
    from rich.text import Text

    from sana_cli.images.metadata import read
    from sana_cli.ui import visible

    if not images:
        raise UsageError(f"{folder[:200]} holds no PNG, JPEG, WebP or AVIF", "name another folder")
    out = RichConsole(no_color=None if color else True, highlight=False)
    for image in images[:NEWEST]:
        try:
            found = read(image)
            recipe = found.recipe
            seed = f"seed {recipe['seed']}" if "seed" in recipe else ""
            facts = [f"{found.width}x{found.height}", recipe.get("model", found.tool or ""), seed]
            text = recipe.get("prompt", "(no prompt)")
        except SanaError as error:
            facts, text = [], error.message.removeprefix(f"{image[:200]} ")
        line = Text.assemble(
            (visible(image), "bold"),
            "  ",
            (visible(" ".join(", ".join(filter(None, facts)).split())), "dim"),
            "  ",
            visible(" ".join(text.split())),
        )
        line.no_wrap, line.overflow = out.is_terminal, "ellipsis"
        out.print(line, soft_wrap=not out.is_terminal)
    if len(images) > NEWEST:
        console.info(f"the newest {NEWEST} of {len(images)} images; --json has all")


def _lora(path: str, command: bool) -> dict[str, Any]:
    """Describe a LoRA. UsageError where a command line was asked for: a LoRA has none."""
    from sana_cli.weights.lora import describe

    if command:
        raise UsageError(f"{path[:200]} is not an image: it has no command", "leave out --command")
    return describe(Path(path))


def _show_lora(row: dict[str, Any], color: bool) -> None:
    from rich.console import Console
    from rich.text import Text

    from sana_cli.ui import print_fact, visible

    console = Console(no_color=None if color else True, highlight=False)
    console.print(Text(visible(row["path"]), "bold"), soft_wrap=not console.is_terminal)
    numbers = {name: ", ".join(f"{n:g}" for n in row[name]) for name in ("ranks", "alphas")}
    blocks, width = row["blocks"], row["width"]
    facts = {
        "kind": f"{row['kind']}, {row['container']} names",
        "rank": numbers["ranks"],
        "alpha": numbers["alphas"],
        "modules": f"{row['modules']} in {len(blocks)} blocks"
        + (f" of width {width}" if width else ""),
        "fits": ", ".join(row["fits"]),
        "made for": row["base_model"] or "",
        "sha256": row["sha256"],
    }
    for name, value in facts.items():
        if value:
            print_fact(console, name, value)


def _document(found: "ImageMetadata", line: str | None, remarks: list[str]) -> dict[str, Any]:
    return {
        "path": found.path,
        "format": found.format,
        "width": found.width,
        "height": found.height,
        "source": found.source,
        "tool": found.tool,
        "recipe": found.recipe,
        "made": found.made,
        "not_understood": found.not_understood,
        "notes": found.notes + remarks,
        "command": line,
    }


def _show(
    found: "ImageMetadata", line: str | None, remarks: list[str], verbose: bool, color: bool
) -> None:
    from rich.console import Console
    from rich.text import Text

    from sana_cli.ui import print_fact, visible

    console = Console(no_color=None if color else True, highlight=False)
    prompt = found.recipe.get("prompt", "(no prompt)")
    console.print(Text(visible(prompt), "bold"), soft_wrap=not console.is_terminal)
    for name, value in _facts(found, verbose):
        print_fact(console, name, value)
    for remark in remarks:
        print_fact(console, "", remark, "yellow")
    if line is not None:
        print_fact(console, "redraw", line, one_line=True)


def _facts(found: "ImageMetadata", verbose: bool) -> list[tuple[str, str]]:
    """Return names and values of the known fields, the most useful first."""
    recipe, rows = found.recipe, []
    if recipe.get("negative"):
        rows.append(("negative", recipe["negative"]))
    if "model" in recipe:
        revision = recipe.get("revision")
        short = revision if verbose or not revision else revision[:12]
        rows.append(("model", recipe["model"] + (f", revision {short}" if short else "")))
    if "seed" in recipe:
        rows.append(("seed", str(recipe["seed"])))
    rows.append(("size", _size(found)))
    sampling = [
        f"{recipe['steps']} steps" if "steps" in recipe else "",
        recipe.get("solver", ""),
        f"guidance {recipe['guidance']:g}" if "guidance" in recipe else "",
        f"flow shift {recipe['flow_shift']:g}" if recipe.get("flow_shift") is not None else "",
    ]
    rows.append(("sampling", ", ".join(filter(None, sampling))))
    if recipe.get("image"):
        strength = recipe.get("strength")
        how = f", strength {strength:g}" if strength is not None else ""
        rows.append(("started from", f"an image, SHA-256 {recipe['image']}{how}"))
    if "instruction" in recipe:
        text = recipe["instruction"]
        rows.append(("instruction", text if text and verbose else "on" if text else "off"))
    parts = ("text", "dit", "vae")
    precisions = {part: recipe.get(f"{part}_dtype", "unknown") for part in parts}
    if len(set(precisions.values())) > 1:
        rows.append(("precision", ", ".join(f"{k} {v}" for k, v in precisions.items())))
    elif "dit_dtype" in recipe:
        rows.append(("precision", recipe["dit_dtype"]))
    if recipe.get("quant"):
        rows.append(("quantised", f"the transformer's products, {recipe['quant']}"))
    if recipe.get("sums"):
        rows.append(("sums", f"over 64 channels in {recipe['sums']}"))
    made = [f"{k} {found.made[k]}" for k in ("sana", "torch") if k in found.made]
    made += [f"on {found.made['device']}"] if "device" in found.made else []
    made += [found.tool] if found.tool and not made else []
    rows.append(("made by", ", ".join(made)))
    rows.append(("file", f"{found.path}, {found.format}"))
    return [(name, value) for name, value in rows if value]


def _size(found: "ImageMetadata") -> str:
    recipe = found.recipe
    size = f"{found.width}x{found.height}"
    native = (recipe.get("native_width"), recipe.get("native_height"))
    if None not in native and native != (recipe.get("width"), recipe.get("height")):
        size += f" (drawn at {native[0]}x{native[1]})"
    return size
