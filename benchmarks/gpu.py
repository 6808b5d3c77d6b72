"""Everything to be known of a GPU, in one go of less than nine minutes; the table comes last.

    python benchmarks/gpu.py --out runs/gpu                     on a CUDA card
    python benchmarks/gpu.py --out runs/gpu --device cpu --quick    that it works, in a minute

From a checkout with `pip install -e .`; pytest, diffusers and bitsandbytes are used where they are.
No weights are needed: they are drawn at random in the released sizes. Every section is a process
of its own with a limit of its own, the ones that tell right from wrong first; what fails is told
and the rest goes on. Rows are added to OUT/gpu.jsonl as they are measured, so that a limit from
outside loses nothing; OUT/gpu.log holds what the sections say.

kernels   the tests of the kernels, compiled by Triton for this card, in its precisions
engine    latents of the pipeline against the plain transformer in float32: signal to noise in dB
strips    pictures of the decoder in strips against the whole map at once in float32
bench     `sana bench` at 512² to 4096², with peak memory beside what the plan foretold; and a run
          that may not take more than 6 GB of the card
against   diffusers on the same weights, eager and compiled, turn and turn about
profile   the kernels of a picture: their shares, and their distance from their own floors
"""

import argparse
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
# Seconds; what a section leaves over, the later ones may use.
SECTIONS = {"kernels": 100, "engine": 70, "strips": 40, "bench": 130, "against": 130, "profile": 50}
TESTS = ("tests/test_kernels.py", "tests/test_decoder_kernels.py")
PROMPT = "a red circle on a blue background"
LOSS = 3.0  # dB that the engine may have less than the plain network in the same precision
SMALL, LARGE = "sana-0.6b-1024", "sana-1.6b-1024"

CAPPED = """
import sys, torch
cap = float(sys.argv.pop(1))
torch.cuda.set_per_process_memory_fraction(cap / torch.cuda.mem_get_info()[1])
from sana_cli.app import main
main()
"""

Row = dict[str, Any]


class Report:
    """Rows, as they come, in a file."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "gpu.jsonl"

    def add(self, section: str, **facts: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"section": section, **facts}) + "\n")

    def rows(self, section: str | None = None) -> list[Row]:
        lines = self.path.read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        return [row for row in rows if section in (None, row["section"])]


# --- kernels -----------------------------------------------------------------------------------


def kernels(options: argparse.Namespace, report: Report) -> None:
    for test in TESTS:
        if not (ROOT / test).exists():
            report.add("kernels", tests=test, failed="there are no such tests")
            continue
        # What other versions of a library warn of is no fault of a kernel.
        words = ["-q", "--maxfail=20", "-o", "filterwarnings=default"]
        if importlib.util.find_spec("xdist"):  # compiling is what takes the time
            words += ["-n", "8"]
        command = [sys.executable, "-m", "pytest", *words, test]
        began = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        sys.stderr.write(done.stdout + done.stderr)
        last = (done.stdout.splitlines() or done.stderr.splitlines() or ["nothing was said"])[-1]
        facts = {"tests": test, "said": last.strip("= "), "seconds": time.perf_counter() - began}
        report.add("kernels", ok=done.returncode == 0, **facts)


# --- engine ------------------------------------------------------------------------------------


def engine(options: argparse.Namespace, report: Report) -> None:
    cases: list[tuple[str, str, dict[str, Any]]]
    if options.quick:
        cases = [("demo", "256x256", {}), ("demo", "128x160", {"negative": "green"})]
    else:
        cases = [
            (SMALL, "1024x1024", {}),
            (SMALL, "992x416", {"negative": "dull colours"}),
            (LARGE, "1024x1024", {}),
            (LARGE, "1024x1024", {"guidance": 1.0}),
            ("sana-sprint-0.6b", "1024x1024", {}),
            ("sana-1.6b-4k", "2048x1024", {}),
        ]
    dtypes = ["float32"] if options.device == "cpu" else ["bfloat16", "float16"]
    for model, size, settings in cases:
        for dtype in dtypes if model in (SMALL, "demo") else dtypes[:1]:
            try:
                facts = likeness(model, size, dtype, settings, options.device)
            except Exception as error:
                facts = {"failed": f"{type(error).__name__}: {error}"[:300]}
            report.add("engine", model=model, size=size, dtype=dtype, **settings, **facts)


@torch.inference_mode()
def likeness(
    model: str, size: str, dtype: str, settings: dict[str, Any], device: str
) -> dict[str, Any]:
    """Signal to noise of the latents after two steps, in dB, the plain network in float32 being
    the truth: of the pipeline, and of the plain network in the precision of the pipeline."""
    from sana_cli.pipeline import stages
    from sana_cli.pipeline.guidance import is_guided
    from sana_cli.pipeline.plan import Plan
    from sana_cli.pipeline.stages import Failure, draw
    from sana_cli.pipeline.text_encoder import TextEncoder

    with tempfile.TemporaryDirectory() as folder:
        recipe, files = described(model, size, device, Path(folder), dtype, settings)
        encoder = TextEncoder(files.parts, recipe.text_dtype, device)
        texts = [encoder.encode(recipe.prompt, recipe.instruction)]
        if is_guided(recipe, files):
            texts.insert(0, encoder.encode(recipe.negative))
        del encoder
        truth = plain(recipe, files, texts, device, torch.float32)
        narrow = plain(recipe, files, texts, device, getattr(torch, recipe.dit_dtype))
        seen: list[Tensor] = []
        decode = stages.decode

        def note(decoder: nn.Module, latent: Tensor, **words: Any) -> Any:
            seen.append(latent.float().cpu() * files.vae.scaling_factor)
            return decode(decoder, latent, **words)

        stages.decode = note
        try:
            # The latent is narrowed before it is decoded; here it is not.
            for event in draw([replace(recipe, vae_dtype="float32")], files, Plan(device)):
                if isinstance(event, Failure):
                    raise event.error
        finally:
            stages.decode = decode
    ours, theirs = snr(seen[0], truth), snr(narrow, truth)
    return {"snr": ours, "plain_snr": theirs, "ok": ours >= min(theirs - LOSS, 100)}


def plain(recipe: Any, files: Any, texts: list[Tensor], device: str, dtype: torch.dtype) -> Tensor:
    """Latents float32 (1, 32, h, w) on the CPU, by the network as `dit.py` writes it down."""
    from sana_cli.models.dit import DiT
    from sana_cli.pipeline.solver import SOLVERS, advance
    from sana_cli.weights.checkpoint import load_weights, on_meta

    part = files.parts["transformer"]
    dit = on_meta(DiT, files.dit, part.config)
    load_weights(dit, part.weights, dtype)
    dit.to(device)
    shape = (1, files.dit.in_channels, recipe.native_height // 32, recipe.native_width // 32)
    generator = torch.Generator("cpu").manual_seed(recipe.seed)
    sample, previous = torch.randn(shape, generator=generator).to(device), None
    captions = [dit.project_text(text.to(device, dtype)) for text in texts]
    told = None
    if files.is_sprint:
        told = torch.full((1,), recipe.guidance, dtype=texts[0].dtype, device=device)
        told = told * files.dit.guidance_embeds_scale
    solver = SOLVERS[recipe.solver]
    schedule = solver.schedule(recipe.steps, recipe.flow_shift)
    unit = 1.0 if files.is_sprint else files.dit.timestep_scale
    for step in range(recipe.steps):
        at = torch.full((1,), schedule.timesteps[step] * unit, device=device)
        halves = [dit(sample.to(dtype), at, caption, None, told).float() for caption in captions]
        velocity = halves[-1]
        if len(halves) == 2:
            velocity = halves[0] + recipe.guidance * (halves[1] - halves[0])
        fresh = torch.randn(shape, generator=generator).to(device) if solver.stochastic else None
        update = solver.update(schedule, step)
        sample, previous = advance(update, sample, velocity, previous, fresh)
    return sample.float().cpu()


def described(
    model: str,
    size: str | None,
    device: str,
    folder: Path,
    dtype: str = "auto",
    settings: dict[str, Any] | None = None,
) -> tuple[Any, Any]:
    """A recipe and files of a model: the bundled one's own, else with random weights."""
    from sana_cli.bench.random_weights import random_model
    from sana_cli.jobs.resolve import choose
    from sana_cli.settings import Settings
    from sana_cli.weights.hub_cache import find_parts
    from sana_cli.weights.model_files import open_model

    words = {"steps": 2, "dtype": dtype, "text_precision": "auto"} | (settings or {})
    choice = choose(Settings(PROMPT, model=model, res=size, fit="exact", **words))
    found = find_parts(choice.model)
    if model == "demo" and found:
        files = open_model(found)
    else:
        files = random_model(choice.model, found, folder, device)
    recipe = choice.recipe(files, device, 1)
    return replace(recipe, text_dtype=wide(device)), files


def wide(device: str) -> str:
    from sana_cli.machine.device import wide_dtype

    return wide_dtype(device)


def snr(x: Tensor, truth: Tensor) -> float:
    """dB."""
    x, truth = x.double().cpu(), truth.double().cpu()
    noise = (x - truth).square().sum()
    return float(10 * torch.log10(truth.square().sum() / noise)) if noise else math.inf


# --- strips ------------------------------------------------------------------------------------


@torch.inference_mode()
def strips(options: argparse.Namespace, report: Report) -> None:
    from sana_cli.machine.device import give_back
    from sana_cli.models.dc_ae import DCAE
    from sana_cli.models.strips.autoencoder import decode
    from sana_cli.models.strips.subpixel import fold
    from sana_cli.weights.checkpoint import load_weights, on_meta

    device = options.device
    with tempfile.TemporaryDirectory() as folder:
        _, files = described("demo" if options.quick else SMALL, None, device, Path(folder))
        part = files.parts["vae"]

        def decoder(dtype: torch.dtype, folded: bool) -> Any:
            network = on_meta(DCAE, files.vae, part.config).decoder
            load_weights(network, part.weights, None, only="decoder.")
            if folded:
                fold(network)
            return network.to(device, dtype, memory_format=torch.channels_last)

        def whole(network: Any, z: Tensor) -> Tensor:
            image = network(z.to(device, network.norm_out.weight.dtype)).float()
            return image.mul(0.5).add(0.5).clamp(0, 1).mul(255).round()[0].movedim(0, -1).cpu()

        for side in (128, 256) if options.quick else (512, 1024, 2048, 4096):
            shape = (1, 32, side // 32, side // 32)
            generator = torch.Generator().manual_seed(7)
            z = torch.randn(shape, generator=generator) / files.vae.scaling_factor
            truth = whole(decoder(torch.float32, False), z) if side < 4096 else None
            for dtype in (torch.bfloat16, torch.float32):
                network = decoder(dtype, True)
                decode(network, z.to(device))
                give_back(device)
                facts: Row = {"side": side, "dtype": str(dtype).removeprefix("torch.")}
                with peak(device) as held:
                    began = time.perf_counter()
                    picture = decode(network, z.to(device)).pixels
                    facts["seconds"] = time.perf_counter() - began
                facts["peak_bytes"] = held()
                if truth is not None:
                    facts["psnr"] = psnr(picture.float(), truth)
                    if dtype != torch.float32:
                        facts["untiled_psnr"] = psnr(whole(decoder(dtype, False), z), truth)
                    like = facts.get("untiled_psnr", 60.0)
                    facts["ok"] = facts["psnr"] >= like - LOSS
                report.add("strips", **facts)


@contextmanager
def peak(device: str) -> Iterator[Callable[[], int | None]]:
    """Of the memory that is allocated on a CUDA device."""
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    yield lambda: torch.cuda.max_memory_allocated() if cuda else None


def psnr(one: Tensor, other: Tensor) -> float:
    """Of pictures in 0 to 255, dB."""
    error = float((one.double() - other.double()).square().mean())
    return 10 * math.log10(255**2 / error) if error else math.inf


# --- bench -------------------------------------------------------------------------------------


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


def measured(words: list[str], cap: float | None = None) -> Row:
    """What `sana bench` tells, or why it does not; `cap` bytes of the card may be taken."""
    start = ["-c", CAPPED, str(cap)] if cap else ["-m", "sana_cli"]
    command = [sys.executable, *start, "bench", *words, "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    sys.stderr.write(f"sana bench {' '.join(words)}\n{done.stderr}")
    facts: Row = {"words": words, "cap": cap, "ok": done.returncode == 0}
    try:
        facts["result"] = json.loads(done.stdout)
    except ValueError:
        facts["failed"] = (done.stderr.strip().splitlines() or ["nothing was said"])[-2:]
    return facts


def against(options: argparse.Namespace, report: Report) -> None:
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
        report.add("against", **measured([*words, *common]))


# --- profile -----------------------------------------------------------------------------------


def profile(options: argparse.Namespace, report: Report) -> None:
    from sana_cli.bench.roofline import bandwidth, decoding, denoising, matrix_rate

    device = options.device
    dtype = wide(device)
    copies, products = bandwidth(device), matrix_rate(device, getattr(torch, dtype))
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
    """By stage the seconds and the kernels of the second of two pictures: what is made once, as
    graphs, was made for the first."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as Profiler

    from sana_cli.pipeline.plan import Plan
    from sana_cli.pipeline.stages import Picture, Progress, draw

    cuda = device.startswith("cuda")
    activities = [ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
    found: dict[str, tuple[float, list[Row]]] = {}
    running: Any = None
    began = 0.0
    with launches() as floors:
        recipes = [recipe, replace(recipe, seed=2)]
        for event in draw(recipes, files, Plan(device, resident=True)):
            last = isinstance(event, Progress) and event.done == event.total
            if running is not None and last and isinstance(event, Progress):
                seconds = time.perf_counter() - began
                running.stop()
                found[event.stage] = seconds, shares(running, floors, copies, products, cuda)
                running = None
            first = isinstance(event, Picture) and event.index == 0
            if first or (last and isinstance(event, Progress) and event.stage == "denoise"):
                running = Profiler(activities=activities)
                running.start()
                began = time.perf_counter()
    return found


def shares(
    done: Any, floors: dict[str, list[tuple[int, int]]], copies: float, products: float, cuda: bool
) -> list[Row]:
    """By kernel, the longest first: calls, seconds, share of the time; of our own the floor of an
    average call, too, and how much of it is reached."""
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
    """By Triton kernel, the (operations, bytes) of every start: its tensors once each, and the
    products of those that say m, n and k."""
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


# --- all of it ---------------------------------------------------------------------------------


def run_section(name: str, options: argparse.Namespace, report: Report, seconds: float) -> Row:
    command = [sys.executable, __file__, "--section", name, "--out", str(options.out)]
    command += ["--device", options.device, *(["--quick"] if options.quick else [])]
    began = time.perf_counter()
    with (options.out / "gpu.log").open("a", encoding="utf-8") as log:
        log.write(f"\n=== {name}\n")
        log.flush()
        child = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
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


def table(report: Report) -> None:
    """What was found, for people, on stdout."""
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
        "kernels",
        ["tests", "result", "s"],
        [
            [row["tests"], str(row.get("said", row.get("failed"))), number(row.get("seconds"))]
            for row in report.rows("kernels")
        ],
    )
    show(
        "engine: dB to the plain network in float32",
        ["model", "size", "dtype", "engine", "plain", ""],
        [
            [row["model"], row["size"], row["dtype"], number(row.get("snr")),
             number(row.get("plain_snr")), "ok" if row.get("ok") else row.get("failed", "WORSE")]
            for row in report.rows("engine")
        ],
    )  # fmt: skip
    show(
        "strips: dB to the whole map in float32",
        ["side", "dtype", "strips", "untiled", "s", "peak GB", ""],
        [
            [str(row["side"]), row["dtype"], number(row.get("psnr")),
             number(row.get("untiled_psnr")), number(row["seconds"], "", 3),
             number(row["peak_bytes"] and row["peak_bytes"] / 1e9, "", 2),
             {True: "ok", False: "WORSE"}.get(row.get("ok"), "")]
            for row in report.rows("strips")
        ],
    )  # fmt: skip
    speed, beside = [], []
    for row in [*report.rows("bench"), *report.rows("against")]:
        if "result" not in row:
            speed.append([" ".join(row["words"]), "; ".join(row["failed"])])
            continue
        for size in row["result"]["sizes"]:
            speed.append(_speed(size, row, number))
            if size["against"]:
                beside.append(_beside(size, number))
    show(
        "sana bench: seconds, share of the floor, peak memory (foretold) in GB",
        ["model", "size", "n", "encode", "step ms", "denoise", "decode", "total", "peak", "cap"],
        speed,
    )
    show(
        "times faster than diffusers: medians of pairs",
        ["model", "size", "with", "encode", "denoise", "decode", "total", "dB alike", "its GB"],
        beside,
    )
    for row in report.rows("profile"):
        if "kernels" in row:
            show(
                f"{row['model']}, {row['stage']} of a picture: {1e3 * row['seconds']:.1f} ms, the"
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
    phases, foretold = size["phases"], size["predicted_peak_bytes"]
    median = {name: phase["seconds"]["median"] for name, phase in phases.items()}
    cells = [
        f"{number(median[name], '', 3)} ({phases[name]['share']:.0%})"
        for name in ("denoise", "decode")
    ]
    peaks = " ".join(
        f"{phases[name]['peak_bytes'] / 1e9:.2f} ({foretold[name] / 1e9:.2f})"
        for name in ("denoise", "decode")
        if phases[name]["peak_bytes"] is not None
    )
    return [
        *(size["model"], f"{size['width']}x{size['height']}", str(row["result"]["count"])),
        *(number(median["encode"], "", 3), number(1e3 * size["step_seconds"], "", 2), *cells),
        *(number(median["total"], "", 3), peaks, number(row["cap"] and row["cap"] / 1e9)),
    ]


def _beside(size: Row, number: Callable[..., str]) -> list[str]:
    facts = size["against"]
    head = [size["model"], f"{size['width']}x{size['height']}", facts["with"]]
    if "failed" in facts:
        return [*head, facts["failed"][:60]]
    ratios = [number(facts["ratio"][name], "", 2) for name in ("encode", "denoise", "decode")]
    held = facts["peak_bytes"] and facts["peak_bytes"] / 1e9
    alike = "equal" if facts["psnr"] is None else number(facts["psnr"])
    return [*head, *ratios, number(facts["ratio"]["total"], "", 2), alike, number(held)]


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
        # float32 is the truth here: not rounded to 19 bits on the way.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        globals()[options.section](options, report)
        return
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("needs CUDA, which this torch has not; --device cpu --quick tries the script")
    began, allowed = time.perf_counter(), 0
    report.path.unlink(missing_ok=True)
    from sana_cli.bench.phases import surroundings

    report.add("about", facts=surroundings(options.device))
    for name in options.only:
        allowed += SECTIONS[name]
        if name == "kernels" and not options.device.startswith("cuda"):
            report.add("section", name=name, state="needs CUDA", seconds=0.0, rows=0)
        else:
            left = allowed - (time.perf_counter() - began)
            facts = run_section(name, options, report, left)
            sys.stderr.write(f"{name}: {facts['state']}, {facts['seconds']:.0f} s\n")
    table(report)


if __name__ == "__main__":
    main()
