"""`sana doctor`: what is on this machine, what will run on it and how, and what to type next."""

import itertools
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sana_cli.commands._options import Color, Json, Quiet, Verbose

if TYPE_CHECKING:
    from rich.console import Console

    from sana_cli.ui import Console as UiConsole

HUB_VARIABLES = (
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "HF_HUB_DISABLE_XET",
    "HF_HUB_DISABLE_SYMLINKS",
    "HF_HUB_DOWNLOAD_TIMEOUT",
    "SANA_DATA_DIR",
)
DEMO = 'sana generate "a red circle on a blue background" --model demo'
COLORS = {  # as Rich calls them
    "standard": "16 colours",
    "windows": "16 colours",
    "256": "256 colours",
    "truecolor": "full colour",
}

Facts = dict[str, Any]


def doctor(
    check: Annotated[
        bool,
        typer.Option("--check", help="Also compile the kernels and check their results."),
    ] = False,
    json_output: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    color: Color = True,
) -> None:
    """Show what this machine has, how sana will run on it, and one command to run next.

    Nothing is fetched, and nothing is sent anywhere.
    """
    from sana_cli.ui import Console as UiConsole

    console = UiConsole(quiet, verbose, color)
    facts = examine(color, console)
    if check:
        facts["checks"] = _checks(console.info)
    if json_output:
        sys.stdout.write(json.dumps(facts, indent=2) + "\n")
        return
    _show(facts, color)


def examine(color: bool, console: "UiConsole") -> Facts:
    """Everything that can be found out without a network. What fails is None, and told."""
    from sana_cli import __version__
    from sana_cli.system import inventory

    def ask(name: str, question: Callable[..., Any], *about: Any) -> Any:
        try:
            return question(*about)
        except Exception as error:  # a broken driver, library or file may raise anything
            console.detail(f"{name}: {type(error).__name__}: {error}")
            return None

    facts: Facts = {"sana": __version__, "system": ask("system", inventory.system)}
    problems: list[str] = []
    try:
        facts["torch"] = inventory.torch_build()
    except Exception as error:
        facts["torch"] = None
        problems.append(f"torch cannot be imported: {' '.join(str(error).split())}")
    facts["cpu"] = ask("cpu", inventory.cpu)
    facts["memory"] = ask("memory", inventory.memory)
    facts["devices"], no_cuda = ask("devices", inventory.devices) or (None, None)
    facts["nvidia_driver"] = ask("driver", inventory.nvidia_driver)
    facts["kernels"] = ask("kernels", _kernels)
    facts["products"] = ask("products", _products)
    facts["bitsandbytes"] = inventory.installed("bitsandbytes")
    facts["hub"] = ask("hub", _hub)
    facts["text_cache"] = ask("text cache", _text_cache)
    facts["models"] = ask("models", _models)
    ask("times", _add_times, facts["models"] or [], console)
    facts["terminal"] = ask("terminal", _terminal, color)
    facts["problems"] = problems + list(_problems(facts, no_cuda))
    facts["next"] = _next(facts)
    return facts


def _kernels() -> Facts:
    """For the device that is taken unless another is asked for."""
    from sana_cli.kernels.dispatch import chosen_path
    from sana_cli.kernels.rows8 import chosen_products
    from sana_cli.system import inventory
    from sana_cli.system.devices import choose_device

    device = choose_device("auto")
    path, reason = chosen_path(device)
    triton = inventory.triton()
    fast, how = chosen_products(device)
    products = {"fast": fast, "reason": how}
    return {"path": path, "reason": reason, "triton": triton, "w8a8": products}


def _products() -> Facts | None:
    """How fast matrix products in float32 are on the CPU, by the way they are computed."""
    from sana_cli.pipeline import packing
    from sana_cli.system.folders import cache_folder

    rates = packing.rates(cache_folder())
    return rates and rates._asdict() | {"packs": rates.packs, "text": str(rates)}


def _checks(tell: Callable[[str], None]) -> list[Facts]:
    """Check the kernels of the device that is taken unless another is asked for."""
    import torch

    from sana_cli.kernels import selfcheck
    from sana_cli.kernels.dispatch import fallback_reason
    from sana_cli.system.devices import choose_device

    device, dtypes = torch.device(choose_device("auto")), list(selfcheck.DTYPES)
    if selfcheck.interpreted():
        device, arch = torch.device("cpu"), "interpreter"
        dtypes.remove(torch.bfloat16)  # which it treats as integers
    elif reason := fallback_reason(device):
        tell(f"no kernel to check, as everything runs as plain torch: {reason}")
        return []
    else:
        arch = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    rows = []
    for dtype, eight in itertools.product(dtypes, (False, True)):
        name = selfcheck.name_of(dtype)
        tell(f"compiling and checking the kernels in {name}{' with 8-bit products' * eight}")
        for operation, outcome in selfcheck.examine(device, dtype, eight).items():
            error = outcome.decibels
            rows.append(
                {
                    "kernel": operation,
                    "dtype": name,
                    "arch": arch,
                    "decibels": error if error is not None and math.isfinite(error) else None,
                    "path": "torch" if outcome.fault else "triton",
                    "fault": outcome.fault,
                }
            )
    return rows


def _hub() -> Facts:
    from huggingface_hub.constants import HF_HUB_CACHE, HF_TOKEN_PATH

    from sana_cli.system import inventory
    from sana_cli.weights.fetch import no_network
    from sana_cli.weights.hub_cache import lock_path

    cache = Path(HF_HUB_CACHE)
    return {
        "cache": str(cache),
        "exists": cache.is_dir(),
        "free_bytes": inventory.free_bytes(cache),
        "used_bytes": _used_bytes(),
        "symlinks": inventory.makes_symlinks(cache),
        "offline": no_network(),
        "endpoint": _without_login(os.environ.get("HF_ENDPOINT")),
        "token": _has_token(Path(HF_TOKEN_PATH)),
        "variables": {name: os.environ[name] for name in HUB_VARIABLES if name in os.environ},
        "lock": str(lock_path()),
    }


def _has_token(file: Path) -> bool:
    """Whether a token is given or stored. The hub's own client may renew it over the network."""
    given = (os.environ.get(name, "").strip() for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"))
    return any(given) or (file.is_file() and bool(file.read_text(encoding="utf-8").strip()))


def _without_login(address: str | None) -> str | None:
    return re.sub(r"//[^/@]*@", "//", address) if address else None


def _used_bytes() -> int | None:
    """Of the cache, what belongs to the models of `weights.toml`; None if the lock is broken."""
    from sana_cli.errors import SanaError
    from sana_cli.weights.catalogue import known_models
    from sana_cli.weights.hub_cache import stored_files

    sources = {source for model in known_models().values() for source in model.sources}
    try:
        paths = {path.resolve() for source in sources for path in stored_files(source).values()}
    except SanaError:
        return None
    return sum(path.stat().st_size for path in paths)


def _text_cache() -> Facts:
    from sana_cli.system.folders import cache_folder, used_bytes

    folder = cache_folder()
    return {"folder": str(folder), "used_bytes": used_bytes(folder)}


def _models() -> list[Facts]:
    from sana_cli.commands.models import described

    return described()


def _add_times(rows: list[Facts], console: "UiConsole") -> None:
    """Add to each model that fits about how long an image takes with its own settings."""
    from sana_cli.bench.forecast import Forecaster
    from sana_cli.resolve import Inputs
    from sana_cli.session import Session
    from sana_cli.settings import Settings

    for row in rows:
        row["expected_time"] = None
    session = Session(offline=True, reporter=console)
    forecaster = Forecaster(session.device, None, session.cache_folder(), console.detail)
    for row in rows:
        if row["fits"] in ("yes", "tight"):
            resolution = session.resolve(Settings("a fox", model=row["name"]), Inputs())
            files = session.open(resolution.model, dry_run=True)
            recipe = resolution.recipe(files, session.device, 1)
            expected = forecaster.expected([recipe], files, measure=True)
            row["expected_time"] = expected and expected.as_dict()


def _terminal(color: bool) -> Facts:
    from rich.console import Console

    from sana_cli.system.inventory import image_protocol

    console = Console(no_color=None if color else True)
    protocol, reason = image_protocol(os.environ, console.is_terminal)
    return {
        "is_terminal": console.is_terminal,
        "color": None if console.no_color else console.color_system,
        "width": console.width if console.is_terminal else None,
        "pictures": protocol,
        "pictures_reason": reason,
    }


def _problems(facts: Facts, no_cuda: str | None) -> Iterator[str]:
    from sana_cli.system.inventory import spills_into_ram

    torch, hub = facts["torch"], facts["hub"]
    has_cuda = any(row["device"].startswith("cuda") for row in facts["devices"] or [])
    if facts["nvidia_driver"] and torch and not has_cuda:
        if torch["build"] == "CPU":
            where = ", as pip installs it on Windows" if sys.platform == "win32" else ""
            yield (
                f"there is an NVIDIA driver, but this torch is built for the CPU only{where};"
                " install torch with CUDA first: https://pytorch.org/get-started/locally/"
            )
        else:
            reason = no_cuda or "it does not say why"
            yield f"there is an NVIDIA driver, but torch finds no GPU: {reason}"
    if has_cuda and facts["system"] and spills_into_ram(facts["system"]):
        yield (
            "under Windows a full GPU spills into RAM and crawls instead of failing;"
            " the driver's setting is called Sysmem Fallback Policy"
        )
    if hub is None:
        yield "the Hugging Face cache cannot be examined; -v says why"
    elif hub["symlinks"] is False:
        yield "the cache's file system has no symbolic links: two revisions share no files"
    if facts["models"] is None or (hub and hub["used_bytes"] is None):
        yield "which models are here cannot be told: is the lock file broken?"


def _next(facts: Facts) -> Facts:
    """One command, by what is here and what fits."""
    if facts["torch"] is None:
        return {
            "command": 'python -m pip install --force-reinstall "torch>=2.9,<2.14"',
            "reason": "nothing runs without torch",
        }
    rows = [row for row in facts["models"] or [] if row["bytes"] and row["fits"] != "no"]
    here = next((row["name"] for row in rows if row["cached"]), None)
    if here is not None:
        return {
            "command": f'sana generate "a red fox in snow" --model {here}',
            "reason": "its weights are on this machine",
        }
    if not facts["devices"]:
        return {"command": DEMO, "reason": "released models are slow without a GPU; demo is not"}
    if facts["hub"] is None or facts["hub"]["offline"]:
        return {"command": DEMO, "reason": "no weights are here, and the network is forbidden"}
    wanted = next((row for row in rows if row["side"] == 1024), None)
    room = facts["hub"]["free_bytes"]
    if wanted is None or (room is not None and room < 1.1 * wanted["missing_bytes"]):
        return {"command": DEMO, "reason": "the cache's disk has no room for released weights"}
    return {
        "command": f"sana models pull {wanted['name']}",
        "reason": "it is what `sana generate` draws with unless told otherwise",
    }


# --- for people --------------------------------------------------------------------------------


def _show(facts: Facts, color: bool) -> None:
    from rich.console import Console

    from sana_cli.ui import print_fact

    console = Console(no_color=None if color else True, highlight=False)
    for name, value in _lines(facts):
        print_fact(console, name, value)
    for problem in facts["problems"]:
        print_fact(console, "problem", problem, "yellow")
    if facts.get("checks"):
        _show_checks(console, facts["checks"])
    print_fact(console, "next", facts["next"]["command"], "bold", one_line=True)
    print_fact(console, "", facts["next"]["reason"])


def _show_checks(console: "Console", rows: list[Facts]) -> None:
    from rich.table import Table

    table = Table("kernel", "dtype", "arch", box=None, pad_edge=False)
    table.add_column("dB to torch", justify="right")
    table.add_column("path")
    for row in rows:
        exact = "exact" if row["fault"] is None else "-"
        error = exact if row["decibels"] is None else f"{row['decibels']:.0f}"
        path = row["path"] + (f": {row['fault']}" if row["fault"] else "")
        table.add_row(row["kernel"], row["dtype"], row["arch"], error, path)
    console.print(table)


def _lines(facts: Facts) -> Iterator[tuple[str, str]]:
    system, torch, cpu, memory = (facts[name] for name in ("system", "torch", "cpu", "memory"))
    yield "sana", facts["sana"]
    if system:
        yield "system", f"{system['os']} on {system['machine']}, Python {system['python']}"
    if torch:
        yield "torch", f"{torch['version']}, built for {torch['build']}"
    if cpu:
        sets = ", ".join(cpu["instructions"] or [cpu["kernels"]])
        yield "cpu", f"{cpu['name'] or 'unknown'}, {_count(cpu['cores'], 'core')}; {sets}"
    if memory:
        limit = f"; this process may use {_size(memory['limit_bytes'])}"
        limit += f", {_size(memory['limit_free_bytes'])} free"
        yield (
            "memory",
            f"{_size(memory['total_bytes'])}, {_size(memory['available_bytes'])} free"
            + (limit if memory["limit_bytes"] else ""),
        )
    for row in facts["devices"] or []:
        capability = f", compute capability {row['capability']}" if row["capability"] else ""
        yield (
            row["device"],
            f"{row['name']}, {_size(row['total_bytes'])}, {_size(row['free_bytes'])} free"
            f"{capability}, {'bfloat16' if row['bfloat16'] else 'no bfloat16'}",
        )
    if facts["devices"] == []:
        yield "gpu", "none that torch can use; everything runs on the CPU, in float32"
    if facts["nvidia_driver"]:
        yield "driver", f"NVIDIA {facts['nvidia_driver']}"
    if kernels := facts["kernels"]:
        triton = f"Triton {kernels['triton']}" if kernels["triton"] else "Triton is not installed"
        yield "kernels", f"{kernels['path']} path: {kernels['reason']} ({triton})"
        products = kernels["w8a8"]
        speed = "fast products" if products["fast"] else "no faster than none"
        yield "w8a8", f"{speed}: {products['reason']}"
    if products := facts["products"]:
        yield "products", products["text"]
    yield "8 bits", f"bitsandbytes {facts['bitsandbytes'] or 'is not installed'}"
    yield from _hub_lines(facts["hub"])
    if texts := facts["text_cache"]:
        yield "texts", f"{texts['folder']}, {_size(texts['used_bytes'])}; may be deleted"
    if facts["models"] is not None:
        names = ", ".join(row["name"] for row in facts["models"] if row["cached"])
        yield "models", f"{names}; `sana models list` shows all {len(facts['models'])}"
        sides = {row["side"]: row["fits"] for row in reversed(facts["models"]) if row["bytes"]}
        fitting = [
            f"{side}²" + (" in small pieces" if sides[side] == "tight" else "")
            for side in sorted(sides)
            if sides[side] != "no"
        ]
        if any(sides.values()):  # without torch none is known
            yield "fits", ", ".join(fitting) or "no released model"
        yield from _time_lines(facts["models"])
    terminal = facts["terminal"]
    if terminal:
        kind = COLORS.get(terminal["color"], "no colour")
        kind += f", {terminal['width']} columns" if terminal["width"] else ""
        pictures = f"{terminal['pictures'] or 'none'}: {terminal['pictures_reason']}"
        yield "terminal", f"{kind}, pictures {pictures}"


def _time_lines(rows: list[Facts]) -> Iterator[tuple[str, str]]:
    """For the bundled model, and the first of each size."""
    from sana_cli.bench.forecast import Expected

    first = {row["side"]: row for row in reversed(rows) if row["bytes"]}
    named = [row for row in rows if not row["bytes"]]
    named += [first[side] for side in sorted(first)]
    title = "time"
    for row in named:
        if row["expected_time"]:
            yield title, f"{row['name']}: {Expected(**row['expected_time'])}"
            title = ""


def _hub_lines(hub: Facts | None) -> Iterator[tuple[str, str]]:
    if hub is None:
        return
    new = "" if hub["exists"] else " (not there yet)"
    yield "cache", f"{hub['cache']}{new}"
    links = {True: "symbolic links", False: "no symbolic links", None: "not writable"}
    used, free = _size(hub["used_bytes"]), _size(hub["free_bytes"])
    yield "", f"{used} of it is sana's, {free} free, {links[hub['symlinks']]}"
    yield "lock", hub["lock"]
    network = "forbidden" if hub["offline"] else "allowed"
    mirror = f", from {hub['endpoint']}" if hub["endpoint"] else ""
    yield "hub", f"{network}{mirror}, {'a token is stored' if hub['token'] else 'no token'}"
    if hub["variables"]:
        yield "", ", ".join(f"{name}={value}" for name, value in hub["variables"].items())


def _size(count: int | None) -> str:
    if count is None:
        return "unknown"
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.0f} MB"


def _count(number: int | None, what: str) -> str:
    return f"{number or 'unknown'} {what}{'' if number == 1 else 's'}"
