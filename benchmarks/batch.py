"""Pictures a minute of the bundled model: `sana batch` beside a shell loop and a diffusers loop.

    OMP_NUM_THREADS=1 python benchmarks/batch.py --save benchmarks/batch.json
    OMP_NUM_THREADS=1 python benchmarks/batch.py --side 512 --save benchmarks/batch-512.json

The three take turns, each drawing the same prompts; every round is one process for `sana batch`
and for diffusers (whose start is not counted: it is a loop in a process that is already up), and a
process a picture for the shell loop. Nothing is found in a cache.
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
SANA = str(Path(sys.executable).with_name("sana"))
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "pink", "brown", "black", "cyan")
SHAPES = (
    "circle",
    "square",
    "triangle",
    "star",
    "ring",
    "cross",
    "heart",
    "hexagon",
    "disc",
    "box",
)
PROMPTS = [f"a {colour} {shape} on a white background" for colour in COLOURS for shape in SHAPES]
DIFFUSERS = f"""
import sys, time, torch
from diffusers import SanaPipeline
side = int(sys.argv[1])
pipe = SanaPipeline.from_pretrained({str(ROOT / "sana_cli" / "demo")!r}, torch_dtype=torch.float32)
pipe.set_progress_bar_config(disable=True)
def draw(i, prompt):
    pipe(prompt, height=side, width=side, use_resolution_binning=False,
         complex_human_instruction=None,
         generator=torch.Generator("cpu").manual_seed(i)).images[0].save(f"{{i}}.png")
draw(0, "a warm-up")
began = time.perf_counter()
for i, prompt in enumerate(sys.stdin.read().splitlines()):
    draw(i, prompt)
print(time.perf_counter() - began)
"""


def batch(prompts: list[str], folder: str, side: int) -> float:
    Path(folder, "prompts.txt").write_text("\n".join(prompts))
    words = [
        "batch",
        "prompts.txt",
        "-m",
        "demo",
        "--res",
        str(side),
        "--device",
        "cpu",
        "--no-cache",
        "-o",
        "out",
        "-q",
    ]
    began = time.perf_counter()
    subprocess.run([SANA, *words], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def loop(prompts: list[str], folder: str, side: int) -> float:
    began = time.perf_counter()
    for prompt in prompts:
        words = ["generate", prompt, "-m", "demo", "--res", str(side), "--device", "cpu"]
        subprocess.run(
            [SANA, *words, "--no-cache", "-q"], cwd=folder, check=True, stdout=subprocess.DEVNULL
        )
    return time.perf_counter() - began


def diffusers(prompts: list[str], folder: str, side: int) -> float:
    done = subprocess.run(
        [sys.executable, "-c", DIFFUSERS, str(side)],
        **{"cwd": folder, "check": True, "capture_output": True, "text": True},
        input="\n".join(prompts),
    )
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--pictures", type=int, default=100, help="of one batch")
    parser.add_argument("--sample", type=int, default=20, help="of one round of the two loops")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    ways = {"batch": batch, "shell loop": loop, "diffusers loop": diffusers}
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(options.rounds):
        for way, draw in ways.items():
            prompts = PROMPTS[: options.pictures if way == "batch" else options.sample]
            with tempfile.TemporaryDirectory() as folder:
                rates[way].append(60 * len(prompts) / draw(prompts, folder, options.side))
    report = {
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "side": options.side,
        "pictures": options.pictures,
        "sample": options.sample,
        "pictures_a_minute": {way: statistics.median(values) for way, values in rates.items()},
        "times_the_shell_loop": statistics.median(
            a / b for a, b in zip(rates["batch"], rates["shell loop"], strict=True)
        ),
        "times_the_diffusers_loop": statistics.median(
            a / b for a, b in zip(rates["batch"], rates["diffusers loop"], strict=True)
        ),
        "raw": rates,
    }
    text = json.dumps(report, indent=1)
    if options.save:
        options.save.write_text(text + "\n")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
