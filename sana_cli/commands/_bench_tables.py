"""What `sana bench` found, as tables for people."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def show(document: dict[str, Any], color: bool) -> None:
    from rich.console import Console

    console = Console(no_color=None if color else True, highlight=False)
    compared = {
        (row["model"], row["width"], row["height"]): row["ratios"]
        for row in document.get("compared", {"sizes": []})["sizes"]
    }
    for size in document["sizes"]:
        ratios = compared.get((size["model"], size["width"], size["height"]))
        _show_size(size, document, ratios, console)
        if size["against"] and "failed" not in size["against"]:
            _show_against(size["against"], console)
    _show_machine(document, console)


def _show_size(
    size: dict[str, Any],
    document: dict[str, Any],
    ratios: dict[str, float] | None,
    console: "Console",
) -> None:
    from rich.table import Table

    from sana_cli.units import gigabytes

    recipe, count = size["recipe"], document["count"]
    weights = ", random weights" if size["random_weights"] else ""
    if size["tokenizer"] != "its own":
        weights += " and tokenizer"
    console.print(f"[bold]{size['model']} at {size['width']}x{size['height']}[/bold]{weights}")
    images = "1 image" if count == 1 else f"{count} images"
    precisions = [recipe[f"{part}_dtype"] for part in ("text", "dit", "vae")]
    precisions += [recipe["quant"]] if "quant" in recipe else []
    console.print(
        f"{images}, {recipe['steps']} step{'s' * (recipe['steps'] > 1)} of {recipe['solver']},"
        f" guidance {recipe['guidance']:g}, in {' / '.join(dict.fromkeys(precisions))};"
        f" median of {document['runs']}",
        style="dim",
    )
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("phase", no_wrap=True)
    for title in ("time", "spread", "peak memory", "predicted", "floor", "reached"):
        table.add_column(title, justify="right", no_wrap=True)
    if ratios is not None:
        table.add_column("to before", justify="right", no_wrap=True)
    for name, phase in size["phases"].items():
        seconds = phase["seconds"]
        drawn = name == "load" and size["random_weights"]  # which is not loading
        cells = [
            name,
            "–" if drawn else _time(seconds["median"]),
            "–" if drawn or document["runs"] == 1 else _spread(seconds),
            gigabytes(phase["peak_bytes"]) if phase["peak_bytes"] is not None else "–",
            _time(phase["predicted_seconds"]) if phase.get("predicted_seconds") else "",
            _time(phase["floor_seconds"]) if "share" in phase else "",
            f"{phase['share']:.0%}" if "share" in phase else "",
        ]
        if ratios is not None:
            cells.append("" if drawn else f"{ratios[name]:.2f}" if name in ratios else "–")
        table.add_row(*cells, style="bold" if name == "total" else "")
        if name == "denoise":
            steps = recipe["steps"] * count
            floor = _time(phase["floor_seconds"] / steps) if "share" in phase else ""
            table.add_row("  a step", _time(size["step_seconds"]), "", "", "", floor, "")
    console.print(table)
    console.print(f"{size['images_per_minute']:.1f} images a minute, once loaded\n")


def _show_against(facts: dict[str, Any], console: "Console") -> None:
    from rich.table import Table

    from sana_cli.units import gigabytes

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("in turns", no_wrap=True)
    for title in ("sana", facts["with"], "times faster"):
        table.add_column(title, justify="right", no_wrap=True)
    for stage, both in facts["seconds"].items():
        times = [_time(both[who]["median"]) for who in ("sana", "diffusers")]
        table.add_row(
            stage, *times, f"{facts['ratio'][stage]:.2f}", style="bold" * (stage == "total")
        )
    console.print(table)
    likeness = "equal" if facts["psnr"] is None else f"{facts['psnr']:.1f} dB alike"
    memory = f"; its peak memory {gigabytes(facts['peak_bytes'])}" if facts["peak_bytes"] else ""
    console.print(f"images are {likeness}{memory}\n")


def _show_machine(document: dict[str, Any], console: "Console") -> None:
    from sana_cli.ui import print_fact

    machine, rates = document["machine"], document["rates"]
    driver = f", driver {machine['driver']}" if machine["driver"] else ""
    threads = machine["threads"]
    threads = f", {threads} thread{'' if threads == 1 else 's'}" * (machine["device"] == "cpu")
    print_fact(console, "device", f"{machine['device']}: {machine['device_name']}{driver}{threads}")
    products = ", ".join(
        f"{rate / 1e12:.3g} TFLOP/s in {dtype}" for dtype, rate in rates["flops_per_second"].items()
    )
    print_fact(console, "at best", f"copies {rates['bytes_per_second'] / 1e9:.3g} GB/s, {products}")
    triton = f", triton {document['triton']}" if document["triton"] else ""
    print_fact(console, "versions", f"sana {document['sana']}, torch {document['torch']}{triton}")
    print_fact(console, "kernels", machine["kernels"])
    for text in document["warnings"]:
        print_fact(console, "warning", text, "yellow")


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def _spread(seconds: dict[str, Any]) -> str:
    """Of all runs, about the median."""
    return f"{(seconds['most'] - seconds['least']) / seconds['median']:.0%}"
