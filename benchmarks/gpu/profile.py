"""The kernels of an image: their shares of the time, and of their lower bounds."""

import argparse
import importlib
import math
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.report import Report, Row
from benchmarks.gpu.subjects import LARGE, SMALL, described, wide


def profile(options: argparse.Namespace, report: Report) -> None:
    from sana_cli.bench.roofline import bandwidth, decoding, denoising, matrix_rate

    device = options.device
    dtype = wide(device)
    copies, products = bandwidth(device), matrix_rate(device, dtype)
    report.add("profile", bytes_per_second=copies, flops_per_second=products, dtype=dtype)
    models = ["demo"] if options.quick else [SMALL, LARGE]
    for model in models:
        with tempfile.TemporaryDirectory() as folder:
            steps = {"steps": 2 if options.quick else 20}
            recipe, files = described(model, None, device, Path(folder), dtype, steps)
            counted = {"denoise": denoising(recipe, files), "decode": decoding(recipe, files)}
            for stage, (seconds, rows) in profiled(recipe, files, device, copies, products).items():
                facts = {"model": model, "stage": stage, "steps": recipe.steps, "seconds": seconds}
                facts["busy_seconds"] = sum(row["seconds"] for row in rows)
                facts["floor_seconds"] = counted[stage].floor(products, copies)
                report.add("profile", **facts, kernels=rows[:40])


def profiled(
    recipe: Any, files: Any, device: str, copies: float, products: float
) -> dict[str, tuple[float, list[Row]]]:
    """Return the seconds and kernels of each stage of the second of two images.

    The first image pays for what is done once, such as capturing graphs.
    """
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as Profiler

    from sana_cli.pipeline.draw import ImageDone, Progress, draw
    from sana_cli.pipeline.plan import make_plan

    cuda = device.startswith("cuda")
    activities = [ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
    found: dict[str, tuple[float, list[Row]]] = {}
    running: Any = None
    began = 0.0
    with launches() as floors:
        recipes = [recipe, replace(recipe, seed=2)]
        # Transformer and decoder must fit in memory together, or the second image loads them anew.
        for event in draw(recipes, files, make_plan(recipes, files, device)):
            last = isinstance(event, Progress) and event.done == event.total
            if running is not None and last and isinstance(event, Progress):
                seconds = time.perf_counter() - began
                running.stop()
                found[event.stage] = seconds, shares(running, floors, copies, products, cuda)
                running = None
            first = isinstance(event, ImageDone) and event.index == 0
            if first or (last and isinstance(event, Progress) and event.stage == "denoise"):
                running = Profiler(activities=activities)
                running.start()
                began = time.perf_counter()
    return found


def shares(
    done: Any, floors: dict[str, list[tuple[int, int]]], copies: float, products: float, cuda: bool
) -> list[Row]:
    """Return calls, seconds and share of the time by kernel, the longest first.

    For the project's own kernels also the lower bound, and how close the time comes to it.
    """
    kind = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    rows: list[Row] = []
    for event in done.key_averages():
        seconds = (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6
        if event.device_type == kind and seconds:
            rows.append({"kernel": event.key[:120], "calls": event.count, "seconds": seconds})
    total = sum(row["seconds"] for row in rows)
    rows.sort(key=lambda row: -row["seconds"])
    for row in rows:
        row["share"] = row["seconds"] / total
        known = floors.get(row["kernel"])
        if known:
            each = [max(flops / products, size / copies) for flops, size in known]
            row["floor_seconds"] = row["calls"] * sum(each) / len(each)
            row["reached"] = row["floor_seconds"] / row["seconds"]
    return rows


@contextmanager
def launches() -> Iterator[dict[str, list[tuple[int, int]]]]:
    """Record (operations, bytes) of every launch by Triton kernel.

    Bytes count each tensor once; operations are those of matrix products with arguments m, n, k.
    """
    import pkgutil

    import sana_cli.kernels

    seen: dict[str, list[tuple[int, int]]] = defaultdict(list)
    changed = []
    for module in pkgutil.iter_modules(sana_cli.kernels.__path__, "sana_cli.kernels."):
        if not module.name.endswith("_triton"):
            continue
        try:
            found = importlib.import_module(module.name)
        except ImportError:  # no Triton here
            continue
        real = getattr(found, "launch", None)
        if real is None:
            continue

        def counted(kernel: Any, grid: Any, *given: Any, real: Any = real, **words: Any) -> None:
            tensors = {t.data_ptr(): t.nbytes for t in given if isinstance(t, Tensor)}
            named = dict(zip(kernel.arg_names, given, strict=False))
            sizes = [named.get(name) for name in ("m", "n", "k")]
            flops = 2 * math.prod(sizes) if all(isinstance(s, int) for s in sizes) else 0
            seen[kernel.__name__].append((flops, sum(tensors.values())))
            real(kernel, grid, *given, **words)

        found.launch = counted
        changed.append((found, real))
    try:
        yield seen
    finally:
        for found, real in changed:
            found.launch = real
