"""`sana bench` at 512² to 4096²: alone, within little memory, and beside diffusers."""

import argparse
import json
import subprocess
import sys

from benchmarks.gpu.report import Report, Row
from benchmarks.gpu.subjects import LARGE, ROOT, SMALL

# PSNR of an image to that of diffusers, in dB. In bfloat16 both are as far from float32's.
LEAST = {"float32": 50.0, "bfloat16": 30.0}
CAPPED = """
import sys, torch
cap = float(sys.argv.pop(1))
if torch.cuda.is_available():
    torch.cuda.set_per_process_memory_fraction(cap / torch.cuda.mem_get_info()[1])
from sana_cli.app import main
main()
"""


def bench(options: argparse.Namespace, report: Report) -> None:
    common = ["--device", options.device, "--random-weights"]
    if options.quick:
        calls = [["-m", "demo", "--res", "128,256", "--steps", "2", "--runs", "2"]]
    else:
        calls = [
            ["-m", SMALL, "--res", "512,1024"],
            ["-m", LARGE, "--res", "1024"],
            ["-m", LARGE, "--res", "4096", "--runs", "2"],
            ["-m", SMALL, "--res", "2048,4096", "--runs", "2"],
            ["-m", LARGE, "--res", "512,2048", "--runs", "2"],
            ["-m", SMALL, "--res", "512,1024", "--count", "8", "--runs", "2"],
            ["-m", "sana-sprint-0.6b"],
        ]
    for words in calls:
        report.add("bench", **measured([*words, *common]))


def caps(options: argparse.Namespace, report: Report) -> None:
    common = ["--device", options.device, "--random-weights", "--runs", "1", "--warmup", "0"]
    if options.quick:
        calls = [(["-m", "demo", "--res", "256", "--steps", "2"], 2e9)]
    else:
        calls = [
            (["-m", SMALL, "--res", "1024"], 4e9),
            (["-m", LARGE, "--res", "1024"], 6e9),
            (["-m", LARGE, "--res", "4096", "--steps", "4"], 6e9),
        ]
    for words, cap in calls:
        row = measured([*words, *common, "--memory", f"{cap / 1e9:g}GB"], cap)
        if "result" in row:
            total = row["result"]["sizes"][0]["phases"]["total"]
            row["ok"] = total["peak_bytes"] is None or total["peak_bytes"] <= cap
        report.add("caps", **row)


def likeness(options: argparse.Namespace, report: Report) -> None:
    """Images of the bundled model beside those that diffusers draws on the same device."""
    words = ["-m", "demo", "--device", options.device, "--against", "diffusers"]
    words += ["--runs", "1", "--warmup", "0", "--res", "256"]
    words += ["--steps", "2" if options.quick else "20"]
    for dtype, least in LEAST.items():
        row = measured([*words, "--dtype", dtype])
        if "result" in row:
            against = row.pop("result")["sizes"][0]["against"]
            row["psnr"] = against.get("psnr")
            if "failed" in against:
                row |= {"ok": False, "failed": [against["failed"]]}
            elif row["psnr"] is not None and row["psnr"] < least:
                row["ok"] = False
        report.add("likeness", dtype=dtype, **row)


def competitor(options: argparse.Namespace, report: Report) -> None:
    common = ["--device", options.device, "--random-weights"]
    eager, compiled = ["--against", "diffusers"], ["--against", "diffusers-compiled"]
    if options.quick:
        calls = [["-m", "demo", "--steps", "2", "--runs", "1", *eager]]
    else:
        calls = [
            ["-m", SMALL, "--res", "1024", *eager],
            ["-m", LARGE, "--res", "1024", "--runs", "2", *eager],
            ["-m", SMALL, "--res", "1024", *compiled],
            ["-m", LARGE, "--res", "4096", "--runs", "1", *eager],
            ["-m", SMALL, "--res", "512", *eager],
            ["-m", LARGE, "--res", "1024", "--runs", "2", *compiled],
        ]
    for words in calls:
        report.add("competitor", **measured([*words, *common]))


def measured(words: list[str], cap: float | None = None) -> Row:
    """Return the result of `sana bench`, or why it failed; `cap` limits GPU memory, in bytes."""
    start = ["-c", CAPPED, str(cap)] if cap else ["-m", "sana_cli"]
    command = [sys.executable, *start, "bench", *words, "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    sys.stderr.write(f"sana bench {' '.join(words)}\n{done.stderr}")
    facts: Row = {"words": words, "cap": cap, "ok": done.returncode == 0}
    try:
        facts["result"] = json.loads(done.stdout)
    except ValueError:
        facts["failed"] = (done.stderr.strip().splitlines() or ["no output"])[-2:]
    return facts
