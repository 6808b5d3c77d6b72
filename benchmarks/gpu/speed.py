"""`sana bench` at 512² to 4096², alone and beside diffusers."""

import argparse
import json
import subprocess
import sys

from benchmarks.gpu.report import Report, Row
from benchmarks.gpu.subjects import LARGE, ROOT, SMALL

CAPPED = """
import sys, torch
cap = float(sys.argv.pop(1))
torch.cuda.set_per_process_memory_fraction(cap / torch.cuda.mem_get_info()[1])
from sana_cli.app import main
main()
"""


def bench(options: argparse.Namespace, report: Report) -> None:
    common = ["--device", options.device, "--random-weights"]
    if options.quick:
        calls = [(["-m", "demo", "--res", "128,256", "--steps", "2", "--runs", "2"], None)]
    else:
        calls = [
            (["-m", SMALL, "--res", "512,1024"], None),
            (["-m", LARGE, "--res", "1024"], None),
            (["-m", LARGE, "--res", "4096", "--runs", "2"], None),
            (["-m", LARGE, "--res", "4096", "--runs", "1", "--memory", "6GB"], 6e9),
            (["-m", SMALL, "--res", "2048,4096", "--runs", "2"], None),
            (["-m", LARGE, "--res", "512,2048", "--runs", "2"], None),
            (["-m", SMALL, "--res", "512,1024", "--count", "8", "--runs", "2"], None),
            (["-m", "sana-sprint-0.6b"], None),
        ]
    for words, cap in calls:
        report.add("bench", **measured([*words, *common], cap))


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
