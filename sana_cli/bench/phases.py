"""How long each phase of drawing takes here, how much memory it holds, and how near it is to what
this machine could do.

`sana bench --json` and `--save` write one document:

schema      1
sana, torch, triton    versions, null where there is none
machine     os, cpu, cores, threads, device, device_name, driver, power (see `inventory.power`; of
            an NVIDIA GPU see `inventory.nvidia_state`), kernels ("triton", or "torch" and why)
rates       bytes_per_second of a copy; flops_per_second of matrix products, by precision: the
            best of what was measured before the runs of each size and after the last
runs, warmup, count    of this call; `count` images are drawn in every run
warnings    what may have spoiled the numbers
sizes       for every size asked for:
  model, width, height, random_weights, tokenizer ("its own" or "made up"), recipe, plan
  predicted_peak_bytes    of tensors, by stage, as predicted by the plan
  phases    load (of random weights the time to draw them), encode, denoise, decode, save, and
            total, the sum of the last four:
    seconds        median, least, most, each (of the runs); all images of a run together
    peak_bytes     the most memory held during the phase: allocated on a CUDA device; elsewhere
                   resident in the process, with its libraries; null where the system tells neither
    floor_seconds, flops, bytes, share    of denoise and decode: see `roofline`; share is floor /
                   median. Not of denoise with --quant, whose products have two precisions
    predicted_seconds    of encode, denoise and decode, see `forecast`; null where nothing is
                   predicted
  step_seconds         of denoise, for one step of one image
  images_per_minute    with the weights loaded: 60 · count / total
  remarks              what the pipeline said on the way
  against              see `against`, null if nothing was measured
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from sana_cli import __version__
from sana_cli.bench.roofline import Work, bandwidth, decoding, denoising, matrix_rate
from sana_cli.images.files import encode
from sana_cli.kernels.dispatch import fallback_reason
from sana_cli.pipeline.events import Event, Failure, ImageDone, Notice, Progress
from sana_cli.pipeline.plan import Plan
from sana_cli.recipe import Recipe
from sana_cli.session import DrawRequest, Session
from sana_cli.system import inventory
from sana_cli.system.devices import release_unused_memory
from sana_cli.system.disk import save
from sana_cli.weights.model_files import ModelFiles

SCHEMA = 1
PHASES = ("load", "encode", "denoise", "decode", "save")
Facts = dict[str, Any]


def surroundings(device: str) -> Facts:
    """Describe what the numbers depend on beside the model: versions and the machine."""
    cpu, why = inventory.cpu(), fallback_reason(torch.device(device))
    facts: Facts = {
        "os": inventory.system()["os"],
        "cpu": cpu["name"],
        "cores": cpu["cores"],
        "threads": torch.get_num_threads(),
        "device": device,
        "device_name": cpu["name"],
        "driver": inventory.nvidia_driver(),
        "power": inventory.power(),
        "kernels": "triton" if why is None else f"torch: {why}",
    }
    if device.startswith("cuda"):
        facts["device_name"] = torch.cuda.get_device_name(device)
        facts["power"]["gpu"] = inventory.nvidia_state(torch.device(device).index or 0)
    return {
        "schema": SCHEMA,
        "sana": __version__,
        "torch": torch.__version__,
        "triton": inventory.triton(),
        "machine": facts,
    }


def rates(device: str, precisions: set[str]) -> Facts:
    """Measure the best rates of the device, in about a second."""
    return {
        "bytes_per_second": bandwidth(device),
        "flops_per_second": {p: matrix_rate(device, p) for p in sorted(precisions)},
    }


def best(seen: list[Facts]) -> tuple[Facts, float]:
    """Return the best of several measurements of the rates, and their largest ratio."""
    copies = [one["bytes_per_second"] for one in seen]
    products = {
        d: [one["flops_per_second"][d] for one in seen] for d in seen[0]["flops_per_second"]
    }
    apart = max(max(values) / min(values) for values in (copies, *products.values()))
    found = {d: max(values) for d, values in products.items()}
    return {"bytes_per_second": max(copies), "flops_per_second": found}, apart


class Meter:
    """Peak memory since the last reading, on a CUDA device or resident in this process."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.look()

    def look(self) -> int | None:
        """Return the peak in bytes and reset it; None where the system has no such counter."""
        if self.device.startswith("cuda"):
            peak = torch.cuda.max_memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            return peak
        try:
            lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM
        except OSError:
            return None
        high = next((line.split()[1] for line in lines if line.startswith("VmHWM")), None)
        return int(high) * 1024 if high else None


@dataclass
class BenchRun:
    """One drawing of all the images: seconds and peak bytes by phase."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    peaks: dict[str, int | None] = field(default_factory=dict)
    images: list[Any] = field(default_factory=list)  # uint8 (height, width, 3) each
    notices: list[str] = field(default_factory=list)

    @property
    def total(self) -> float:
        """Seconds of everything but loading."""
        return sum(self.seconds[phase] for phase in PHASES[1:])


def measure(
    session: Session,
    request: DrawRequest,
    plan: Plan,
    folder: Path,
    watch: Callable[[Event], None] = lambda event: None,
) -> BenchRun:
    """Draw the images of a request and save them in `folder` as PNG.

    What the pipeline does between two of its events belongs to the later one. SanaError if an
    image fails.
    """
    run, meter = BenchRun(), Meter(plan.device)

    def took(phase: str, seconds: float) -> None:
        run.seconds[phase] += seconds
        peak, before = meter.look(), run.peaks.get(phase)
        run.peaks[phase] = max(peak, before or 0) if peak is not None else None

    release_unused_memory(plan.device)
    meter.look()
    for event in session.draw(request, plan):
        watch(event)
        match event:
            case Progress(stage, _, _, seconds):
                took(stage, seconds)
            case ImageDone(index, pixels):
                began = perf_counter()
                metadata = session.metadata(request.recipes[index])
                data = encode(pixels, "png", None, metadata)
                save(folder / f"{index}.png", data, force=True)
                took("save", perf_counter() - began)
                run.images.append(pixels)
            case Failure(_, error):
                raise error
            case Notice(text):
                run.notices.append(text)
    return run


def summary(
    runs: list[BenchRun],
    recipes: list[Recipe],
    files: ModelFiles,
    rates: Facts,
    predicted: dict[str, float] | None,
) -> Facts:
    """Summarise the runs: phases, seconds per step, images per minute.

    `predicted` are the seconds of a text, a step and a decode.
    """
    recipe, count = recipes[0], len(recipes)
    phases: Facts = {}
    for phase in PHASES:
        seconds = spread([run.seconds[phase] for run in runs])
        peaks = [peak for run in runs if (peak := run.peaks.get(phase)) is not None]
        phases[phase] = {"seconds": seconds, "peak_bytes": max(peaks, default=None)}
    works = [("decode", decoding(recipe, files), recipe.vae_dtype)]
    if recipe.quant is None:
        works.append(("denoise", denoising(recipe, files), recipe.products))
    for phase, work, dtype in works:
        phases[phase] |= _floor(work, count, rates, dtype, phases[phase]["seconds"]["median"])
    for phase, stage, units in (
        ("encode", "encode", 1),
        ("denoise", "step", count * recipe.steps),
        ("decode", "decode", count),
    ):
        phases[phase]["predicted_seconds"] = predicted and units * predicted[stage]
    total = spread([run.total for run in runs])
    known = [row["peak_bytes"] for row in phases.values() if row["peak_bytes"] is not None]
    phases["total"] = {"seconds": total, "peak_bytes": max(known, default=None)}
    return {
        "phases": phases,
        "step_seconds": phases["denoise"]["seconds"]["median"] / (recipe.steps * count),
        "images_per_minute": 60 * count / total["median"],
        "remarks": list(dict.fromkeys(text for run in runs for text in run.notices)),
    }


def _floor(work: Work, count: int, rates: Facts, dtype: str, seconds: float) -> Facts:
    floor = count * work.floor(rates["flops_per_second"][dtype], rates["bytes_per_second"])
    return {
        "flops": count * work.flops,
        "bytes": count * work.bytes,
        "floor_seconds": floor,
        "share": floor / seconds,
    }


def spread(values: list[float]) -> Facts:
    return {
        "median": statistics.median(values),
        "least": min(values),
        "most": max(values),
        "each": values,
    }
