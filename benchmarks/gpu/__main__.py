"""Check and measure everything on a GPU in less than nine minutes, and print a table at the end.

    python -m benchmarks.gpu --out runs/gpu                         on a CUDA GPU
    python -m benchmarks.gpu --out runs/gpu --device cpu --quick    try the script, in minutes

Runs from a checkout with `pip install -e .`; pytest, diffusers and bitsandbytes are used if
installed. No model has to be downloaded: the weights are random, in the released sizes. Every
section is a process with its own time limit, to which is added what earlier ones have left. What
matters most comes first; a section that fails is reported and the others still run. On the CPU the
kernels run in Triton's interpreter. Rows are appended to OUT/gpu.jsonl as they are measured, so
that an interrupted run loses nothing; OUT/gpu.log holds the output of the sections.

selfcheck   every kernel, compiled for this GPU, against the torch lines that define it
likeness    images of the bundled model against those of diffusers on this GPU
fused_dit   latents of the pipeline against the plain transformer in float32: signal to noise in dB
strips      images decoded in strips against an untiled decode in float32
graph       decodes through a CUDA graph beside those without one: the same image, and the times
bench       `sana bench` at 512² to 4096²: times beside predicted ones, and peaks of memory
w8a8        8 bits in the transformer: likeness to float32 and speed, beside bfloat16
caps        `sana bench` within 4 and 6 GB, which the GPU's allocator may not exceed
competitor  diffusers on the same weights, eager and compiled, alternating with sana
profile     the kernels of an image: their shares of the time, and of their lower bounds
kernels     the tests of the kernels, compiled by Triton for this GPU, in its precisions
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.gpu.fused_dit import fused_dit
from benchmarks.gpu.graph import graph
from benchmarks.gpu.kernels import kernels
from benchmarks.gpu.profile import profile
from benchmarks.gpu.report import Report, Row, table
from benchmarks.gpu.selfcheck import selfcheck
from benchmarks.gpu.speed import bench, caps, competitor, likeness
from benchmarks.gpu.strips import strips
from benchmarks.gpu.subjects import ROOT
from benchmarks.gpu.w8a8 import w8a8

CHECKS = {
    "selfcheck": selfcheck,
    "likeness": likeness,
    "fused_dit": fused_dit,
    "strips": strips,
    "graph": graph,
    "bench": bench,
    "w8a8": w8a8,
    "caps": caps,
    "competitor": competitor,
    "profile": profile,
    "kernels": kernels,
}
# Seconds, 535 in all.
SECTIONS = {
    "selfcheck": 70,
    "likeness": 35,
    "fused_dit": 60,
    "strips": 30,
    "graph": 15,
    "bench": 95,
    "w8a8": 50,
    "caps": 40,
    "competitor": 80,
    "profile": 30,
    "kernels": 30,
}
SLOWER = 5  # times the seconds for a rehearsal, which may share a slow CPU


def run_section(name: str, options: argparse.Namespace, report: Report, seconds: float) -> Row:
    command = [sys.executable, "-m", "benchmarks.gpu", "--section", name]
    command += ["--out", str(options.out.resolve()), "--device", options.device]
    command += ["--quick"] if options.quick else []
    began = time.perf_counter()
    with (options.out / "gpu.log").open("a", encoding="utf-8") as log:
        log.write(f"\n=== {name}\n")
        log.flush()
        child = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        try:
            code = child.wait(seconds)
            state = "done" if code == 0 else f"failed with exit code {code}"
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            state = f"stopped after {seconds:.0f} s"
    rows = report.rows(name)
    bad = [row for row in rows if row.get("ok") is False or "failed" in row]
    if state == "done" and bad:
        state = f"{len(bad)} of {len(rows)} rows failed"
    facts = {"state": state, "seconds": time.perf_counter() - began, "rows": len(rows)}
    report.add("section", name=name, **facts)
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="the bundled model, few steps")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    report = Report(options.out)
    if options.section:
        if options.device.startswith("cuda"):
            torch.cuda.set_device(torch.device(options.device).index or 0)
        # float32 is the reference here, so its products must not be rounded to tf32.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        CHECKS[options.section](options, report)
        return
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("CUDA is not available; --device cpu --quick tries the script")
    began, allowed = time.perf_counter(), 0
    report.path.unlink(missing_ok=True)
    from sana_cli.bench.phases import surroundings

    report.add("about", facts=surroundings(options.device))
    for name in options.only:
        allowed += SECTIONS[name] * (SLOWER if options.quick else 1)
        left = allowed - (time.perf_counter() - began)
        facts = run_section(name, options, report, left)
        sys.stderr.write(f"{name}: {facts['state']}, {facts['seconds']:.0f} s\n")
    table(report)


if __name__ == "__main__":
    main()
