"""From a cold process to a saved picture: `sana` beside a minimal diffusers script.

    python benchmarks/startup.py --runs 7 --save benchmarks/startup.json

The two take turns, so that a machine whose speed drifts slows both; medians are reported.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "a red circle on a blue background"
DIFFUSERS = f"""
import torch
from diffusers import SanaPipeline
pipe = SanaPipeline.from_pretrained({str(ROOT / "sana_cli" / "demo")!r}, torch_dtype=torch.float32)
image = pipe({PROMPT!r}, height=512, width=512, use_resolution_binning=False,
             complex_human_instruction=None,
             generator=torch.Generator("cpu").manual_seed(1)).images[0]
image.save("picture.png")
"""
SANA = str(Path(sys.executable).with_name("sana"))
PAIRS = {
    "help": ([SANA, "--help"], [sys.executable, "-c", "import typer, rich"]),
    "picture": (
        [
            SANA,
            "generate",
            PROMPT,
            "-m",
            "demo",
            "-s",
            "1",
            "--device",
            "cpu",
            "-q",
            "-f",
            "--no-cache",
        ],
        [sys.executable, "-c", DIFFUSERS],
    ),
}


def measure(command: list[str], folder: str) -> tuple[float, int]:
    """(wall seconds, peak resident bytes) of one process."""
    began = time.perf_counter()
    child = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert child.stderr
    complaint = child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - began
    child.stderr.close()
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(complaint.decode())
    return seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    report: dict = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    with tempfile.TemporaryDirectory() as folder:
        for name, pair in PAIRS.items():
            for command in pair:  # warm the file cache
                measure(command, folder)
            rows = [[measure(command, folder) for command in pair] for _ in range(options.runs)]
            ours, theirs = zip(*rows, strict=True)
            ratios = [b[0] / a[0] for a, b in rows]
            report[name] = {
                "runs": options.runs,
                "seconds": statistics.median(s for s, _ in ours),
                "other_seconds": statistics.median(s for s, _ in theirs),
                "times_faster": statistics.median(ratios),
                "peak_bytes": statistics.median(b for _, b in ours),
                "other_peak_bytes": statistics.median(b for _, b in theirs),
                "raw": rows,
            }
    text = json.dumps(report, indent=1)
    if options.save:
        options.save.write_text(text + "\n")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
