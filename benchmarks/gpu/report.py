"""A file of measured rows, and the table that is printed of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]

SPEED = ("bench", "w8a8", "caps", "competitor")  # whose rows are results of `sana bench`


class Report:
    """A JSON-lines file of measured rows."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "gpu.jsonl"

    def add(self, section: str, **facts: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"section": section, **facts}) + "\n")

    def rows(self, section: str | None = None) -> list[Row]:
        lines = self.path.read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        return [row for row in rows if section in (None, row["section"])]


def table(report: Report) -> None:
    """Print the results as tables on stdout."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, width=118)

    def show(title: str, columns: list[str], rows: list[list[str]]) -> None:
        if rows:
            sheet = Table(*columns, box=None, pad_edge=False)
            for row in rows:
                sheet.add_row(*row)
            console.print(title, style="bold")
            console.print(sheet)
            console.print()

    def number(value: Any, unit: str = "", digits: int = 1) -> str:
        return "-" if value is None else f"{value:.{digits}f}{unit}"

    for row in report.rows("about"):
        facts = row["facts"]["machine"]
        versions = f"torch {row['facts']['torch']}, triton {row['facts']['triton']}"
        console.print(f"{facts['device_name']}, driver {facts['driver']}, {versions}")
        console.print(f"kernels: {facts['kernels']}\n")
    show(
        "selfcheck: dB of a kernel's results to float64",
        ["kernel", "dtype", "dB", ""],
        [
            [row["operation"], row["dtype"], number(row.get("decibels")), row["fault"] or "ok"]
            for row in report.rows("selfcheck")
        ],
    )
    show(
        "likeness to diffusers: images of the bundled model",
        ["dtype", "dB", ""],
        [
            [row["dtype"], "equal" if row.get("psnr", 0) is None else number(row.get("psnr")),
             "ok" if row["ok"] else "; ".join(row.get("failed", ["WORSE"]))]
            for row in report.rows("likeness")
        ],
    )  # fmt: skip
    show(
        "kernels",
        ["tests", "result", "s"],
        [
            [row["tests"], str(row.get("result", row.get("failed"))), number(row.get("seconds"))]
            for row in report.rows("kernels")
        ],
    )
    show(
        "fused DiT: dB to the plain network in float32",
        ["model", "size", "dtype", "fused", "plain", ""],
        [
            [row["model"], row["size"], row["dtype"], number(row.get("snr")),
             number(row.get("plain_snr")), "ok" if row.get("ok") else row.get("failed", "WORSE")]
            for row in report.rows("fused_dit")
        ],
    )  # fmt: skip
    show(
        "strips: dB to an untiled decode in float32",
        ["side", "dtype", "strips", "untiled", "s", "peak GB", ""],
        [
            [str(row["side"]), row["dtype"], number(row.get("psnr")),
             number(row.get("untiled_psnr")), number(row["seconds"], "", 3),
             number(row["peak_bytes"] and row["peak_bytes"] / 1e9, "", 2),
             {True: "ok", False: "WORSE"}.get(row.get("ok"), "")]
            for row in report.rows("strips")
        ],
    )  # fmt: skip
    show(
        "a decode without a CUDA graph and with one: the same image",
        ["side", "ms", "with graph", "share of launches", "captured", "graph GB", ""],
        [
            [str(row["side"]), number(1e3 * row["seconds"], "", 2),
             number(1e3 * row["graph_seconds"], "", 2), f"{row['launch_share']:.0%}",
             "yes" if row["pays"] else "no", number(row["graph_bytes"] / 1e9, "", 2),
             "ok" if row["ok"] else row["error"] or "DIFFERENT"]
            for row in report.rows("graph")
        ],
    )  # fmt: skip
    speed, comparisons = [], []
    for row in report.rows("w8a8"):
        if "psnr" in row:
            likeness = ", ".join(f"{way} {value:.1f}" for way, value in row["psnr"].items())
            verdict = "ok" if row["ok"] else "WORSE"
            console.print(f"dB of the bundled model's images to float32: {likeness}: {verdict}\n")
    for row in [row for name in SPEED for row in report.rows(name) if "psnr" not in row]:
        if "result" not in row:
            speed.append([" ".join(row["words"]), "; ".join(row["failed"])])
            continue
        for size in row["result"]["sizes"]:
            speed.append(_speed(size, row, number))
            if size["against"]:
                comparisons.append(_comparison(size, number))
    show(
        "sana bench: seconds, share of the floor, peak memory (predicted) in GB",
        [
            "model",
            "size",
            "n",
            "encode",
            "step ms",
            "denoise",
            "decode",
            "total",
            "to predicted",
            "peak",
            "cap",
        ],
        speed,
    )
    show(
        "speed relative to diffusers: medians of pairs",
        ["model", "size", "with", "encode", "denoise", "decode", "total", "dB alike", "its GB"],
        comparisons,
    )
    for row in report.rows("profile"):
        if "kernels" in row:
            show(
                f"{row['model']}, {row['stage']} of an image: {1e3 * row['seconds']:.1f} ms, the"
                f" device busy for {1e3 * row['busy_seconds']:.1f}, floor"
                f" {1e3 * row['floor_seconds']:.1f}",
                ["kernel", "calls", "ms", "share", "of its floor"],
                [
                    [k["kernel"][:70], str(k["calls"]), number(1e3 * k["seconds"], "", 2),
                     f"{k['share']:.1%}", f"{k['reached']:.0%}" if "reached" in k else "-"]
                    for k in row["kernels"][:14]
                ],
            )  # fmt: skip
    show(
        "sections",
        ["section", "state", "s"],
        [[row["name"], row["state"], number(row["seconds"])] for row in report.rows("section")],
    )


def _speed(size: Row, row: Row, number: Callable[..., str]) -> list[str]:
    phases, predicted = size["phases"], size["predicted_peak_bytes"]
    median = {name: phase["seconds"]["median"] for name, phase in phases.items()}
    cells = [
        number(median[name], "", 3)
        + (f" ({phases[name]['share']:.0%})" if "share" in phases[name] else "")
        for name in ("denoise", "decode")
    ]
    peaks = " ".join(
        f"{phases[name]['peak_bytes'] / 1e9:.2f} ({predicted[name] / 1e9:.2f})"
        for name in ("denoise", "decode")
        if phases[name]["peak_bytes"] is not None
    )
    return [
        size["model"] + (" w8a8" if "quant" in size["recipe"] else ""),
        *(f"{size['width']}x{size['height']}", str(row["result"]["count"])),
        *(number(median["encode"], "", 3), number(1e3 * size["step_seconds"], "", 2), *cells),
        *(number(median["total"], "", 3), _to_predicted(phases)),
        *(peaks, number(row["cap"] and row["cap"] / 1e9)),
    ]


def _to_predicted(phases: Row) -> str:
    """How many times as long as predicted denoising and decoding took."""
    stages = [phases[name] for name in ("denoise", "decode")]
    if any(stage["predicted_seconds"] is None for stage in stages):
        return "-"
    took = sum(stage["seconds"]["median"] for stage in stages)
    return f"{took / sum(stage['predicted_seconds'] for stage in stages):.2f}"


def _comparison(size: Row, number: Callable[..., str]) -> list[str]:
    facts = size["against"]
    head = [size["model"], f"{size['width']}x{size['height']}", facts["with"]]
    if "failed" in facts:
        return [*head, facts["failed"][:60]]
    ratios = [number(facts["ratio"][name], "", 2) for name in ("encode", "denoise", "decode")]
    held = facts["peak_bytes"] and facts["peak_bytes"] / 1e9
    alike = "equal" if facts["psnr"] is None else number(facts["psnr"])
    return [*head, *ratios, number(facts["ratio"]["total"], "", 2), alike, number(held)]
