"""The tests of the kernels, compiled by Triton for this GPU, in its precisions."""

import argparse
import importlib.util
import subprocess
import sys
import time

from benchmarks.gpu.report import Report
from benchmarks.gpu.subjects import ROOT

TESTS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("tests/kernels/test_*.py"))
QUICK = ["tests/kernels/test_rows8.py"]


def kernels(options: argparse.Namespace, report: Report) -> None:
    if not TESTS:
        report.add("kernels", failed="tests/kernels is missing")
    # In Triton's interpreter they take minutes; the shortest file shows that they can be run.
    for test in TESTS if options.device.startswith("cuda") else QUICK:
        # Warnings of other versions of a library do not concern the kernels.
        words = ["-q", "--maxfail=20", "-o", "filterwarnings=default", "-p", "no:cacheprovider"]
        words += ["-m", ""] if options.device.startswith("cuda") else []
        if importlib.util.find_spec("xdist"):  # most of the time is compilation
            words += ["-n", "8"]
        command = [sys.executable, "-m", "pytest", *words, test]
        began = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        sys.stderr.write(done.stdout + done.stderr)
        last = (done.stdout.splitlines() or done.stderr.splitlines() or ["no output"])[-1]
        facts = {"tests": test, "result": last.strip("= "), "seconds": time.perf_counter() - began}
        report.add("kernels", ok=done.returncode == 0, **facts)
