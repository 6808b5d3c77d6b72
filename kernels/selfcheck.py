"""Checks every kernel on a GPU before it is used there, against the torch lines that define it.

A process of its own compiles the kernels and runs them on small awkward inputs, so a crash of the
compiler or a fault on the GPU ends that process only. A kernel that fails is not used. Outcomes are
kept in the cache folder until the GPU, its driver, torch, Triton or the kernels change.

    python -m sana_cli.kernels.selfcheck DEVICE DTYPE WORKERS OPERATION …

is that process. It prints an outcome for each operation, as a line of JSON. With TRITON_INTERPRET=1
it runs on the CPU, in Triton's interpreter.
"""

import contextlib
import functools
import hashlib
import importlib
import json
import math
import os
import pkgutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sana_cli.kernels.rows8 import Rows8, dequantise
from sana_cli.system import disk, inventory
from sana_cli.system.devices import is_out_of_memory
from sana_cli.system.folders import cache_folder

OPERATIONS = (
    *("modulate", "project_qkv", "attend_tokens", "gated_residual_linear_", "linear_silu"),
    *("depthwise_glu", "rms_norm", "kv_state", "aggregate", "conv_to_rgb"),
    *("conv_silu", "conv_norm_add", "upsample", "attend_text"),
)
# Those of 8-bit rows, which are checked apart: few images need them.
OPERATIONS8 = (
    *("modulate8", "project_qkv8", "attend_tokens8", "gated_residual_linear8_", "linear_silu8"),
    "depthwise_glu8",
)
COMMAND = [sys.executable, "-P", "-m", "sana_cli.kernels.selfcheck"]
WORKERS = min(8, os.cpu_count() or 1)  # threads that compile; Triton's compiler frees the GIL
SECONDS = 300  # for the whole process
BROKEN = 70  # exit code: the GPU no longer answers
BEGUN = "the GPU answers"  # printed before the first check

# Minimum signal to noise in dB, against the torch lines in float64. A result rounded once to p bits
# has about 6·p + 6 dB: 150 in float32 (p = 24), 72 in float16 (11), 54 in bfloat16 (8). Like torch,
# kernels round k up to three times and v once before their product, which costs 6 dB. A state in
# tf32 has 80 dB. One wrong element in 10,000 leaves 40 dB.
LEAST = {torch.bfloat16: 44.0, torch.float16: 62.0, torch.float32: 125.0}
DTYPES = tuple(LEAST)  # that kernels are for
# The same of float32 sums of 16-bit products on tensor cores, which truncate where others round.
TENSOR_CORES = 90.0
# The same of float16 products that `launch.sums_in_half`: 67 where the sums of a step are rounded
# to the nearest, and 58 where they are truncated. Results in bfloat16 have 54 at best.
HALF_SUMS = 56.0
# The same of 8-bit rows that a kernel rounds. Next to a tie it may round the other way, and a step
# is a fortieth of the usual value: one in a hundred leaves 52 dB.
QUANTISED = 45.0


def least(dtype: torch.dtype, terms: int = 1) -> float:
    """Return the minimum signal to noise of a result in a dtype that sums up `terms` products.

    Added one after the other, K terms of either sign leave 152 - 10·log10(K) dB in float32: the
    partial sums grow as √K, and so do their rounding errors, of which there are K.
    """
    return min(LEAST[dtype], 150 - 10 * math.log10(terms))


def decibels(found: Tensor, true: Tensor) -> float:
    """Return the signal to noise of `found`, of any dtype, against `true` in float64."""
    noise = (found.double() - true).square().sum()
    return (10 * torch.log10(true.square().sum() / noise)).item() if noise else math.inf


Draw = Callable[..., Tensor]  # a normally distributed tensor of a shape: draw(2, 3, size=0.1)


class Check(NamedTuple):
    """A call of an operation. Every `*_triton.py` has a function `checks(draw)` that yields some.

    Together they launch every specialisation that the models do, but for the divisibility of sizes.
    """

    operation: str  # one of OPERATIONS
    fused: Callable[..., Any]
    definition: Callable[..., Any]  # torch's, if its inputs are in float64
    inputs: tuple[Any, ...]
    least: float | None = None  # decibels; None: those of the dtype

    def error(self) -> float:
        """Return the signal to noise of the worst result; NaN if there are NaNs."""
        inputs = [x.clone() if isinstance(x, Tensor) else x for x in self.inputs]
        wide = [_in_float64(x) for x in self.inputs]
        found, true = _as_tuple(self.fused(*inputs)), _as_tuple(self.definition(*wide))
        errors = [decibels(one, exact.double()) for one, exact in zip(found, true, strict=True)]
        return math.nan if any(map(math.isnan, errors)) else min(errors)


class Outcome(NamedTuple):
    """What came of the checks of an operation in a dtype."""

    decibels: float | None  # signal to noise of the worst; None if there is no result
    fault: str | None = None  # why the operation runs as torch
    lasting: bool = True  # whether it would be the same another time


def _in_float64(x: Any) -> Any:
    if isinstance(x, Rows8):  # the same integers, in products of another precision
        return x._replace(dtype=torch.float64)
    return x.double() if isinstance(x, Tensor) else x


def _as_tuple(result: Any) -> tuple[Tensor, ...]:
    if isinstance(result, Rows8):
        return (dequantise(result),)
    return result if isinstance(result, tuple) else (result,)


# --- in the process that draws -----------------------------------------------------------------


Kind = tuple[torch.dtype, bool]  # of kernels; the second says that those of 8-bit rows are meant
# By device and kind.
_started: dict[tuple[torch.device, torch.dtype, bool], Future[dict[str, Outcome]]] = {}
_lock = threading.Lock()
_said: set[str] = set()


def passes(operation: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a kernel may be used; waits for its check, which begins now if it has not."""
    return outcomes(device, dtype, operation in OPERATIONS8)[operation].fault is None


def outcomes(
    device: torch.device | str, dtype: torch.dtype, eight: bool = False
) -> dict[str, Outcome]:
    """Return the outcome of every operation, of 8-bit rows or of others; waits for the check."""
    start(device, [(dtype, eight)])
    return _started[_with_index(device), dtype, eight].result()


def start(device: torch.device | str, kinds: Iterable[Kind]) -> bool:
    """Begin to check kernels in the background, if there is no outcome; whether any began."""
    began, device = False, _with_index(device)
    with _lock:
        for kind in kinds:
            if (device, *kind) in _started:
                continue
            future = _started[(device, *kind)] = Future()
            kept = _read(device, *kind)
            if kept is not None:
                future.set_result(kept)
                continue
            work = functools.partial(_run, future, device, *kind)
            threading.Thread(target=work, daemon=True).start()
            began = True
    return began


def remarks(device: torch.device | str, kinds: Iterable[Kind]) -> list[str]:
    """Return what has to be said of the checks, each once in this process; waits for them."""
    found = [
        f"{operation} in {name_of(dtype)} runs as plain torch: {outcome.fault};"
        " `sana doctor --check` checks it again"
        for dtype, eight in kinds
        for operation, outcome in outcomes(device, dtype, eight).items()
        if outcome.fault
    ]
    fresh = [text for text in dict.fromkeys([*found, *_unkept]) if text not in _said]
    _said.update(fresh)
    return fresh


def examine(
    device: torch.device | str, dtype: torch.dtype, eight: bool = False
) -> dict[str, Outcome]:
    """Check every operation now, of 8-bit rows or of others, and keep the outcomes."""
    device, operations = _with_index(device), OPERATIONS8 if eight else OPERATIONS
    found: dict[str, Outcome] = {}
    todo, workers = list(operations), WORKERS
    while todo:
        told, began, late, end = _told_by_process(device, dtype, workers, todo)
        found |= told
        todo = [operation for operation in todo if operation not in told]
        if not began:
            found |= dict.fromkeys(todo, Outcome(None, f"the check of the kernels {end}", False))
            break
        if todo and workers == 1 and not (late and told):  # it was this one
            found[todo.pop(0)] = Outcome(None, f"its check {end}")
        workers = 1
    if all(outcome.lasting for outcome in found.values()):
        _write(device, dtype, eight, found)
    return {operation: found[operation] for operation in operations}


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _with_index(device: torch.device | str) -> torch.device:
    """Return cuda:0 for "cuda", if that is the current one."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _run(
    future: Future[dict[str, Outcome]], device: torch.device, dtype: torch.dtype, eight: bool
) -> None:
    try:
        found = examine(device, dtype, eight)
    except Exception as error:  # whatever it is, torch can still draw
        fault = Outcome(None, f"the check of the kernels failed: {error}", False)
        found = dict.fromkeys(OPERATIONS8 if eight else OPERATIONS, fault)
    future.set_result(found)


def _told_by_process(
    device: torch.device, dtype: torch.dtype, workers: int, operations: list[str]
) -> tuple[dict[str, Outcome], bool, bool, str]:
    """Run the process; return the outcomes that it told, whether it began, whether it took too
    long, and how it ended."""
    command = [*COMMAND, str(device), name_of(dtype), str(workers), *operations]
    is_late = False
    try:
        done = subprocess.run(command, capture_output=True, timeout=SECONDS)
        output, end = done.stdout, f"crashed, exit code {done.returncode}"
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        end = ": ".join([end, *last])
    except subprocess.TimeoutExpired as late:
        is_late, output, end = True, late.stdout or b"", f"took more than {SECONDS} seconds"
    except OSError as error:
        output, end = b"", f"could not be started: {error}"
    told, lines = {}, output.decode(errors="replace").splitlines()
    for line in lines:
        with contextlib.suppress(
            ValueError, KeyError, TypeError, AttributeError
        ):  # what a library prints
            document = json.loads(line)
            operation = document.pop("operation")
            told[operation] = Outcome(**document)
    return told, BEGUN in lines, is_late, end


# --- what is kept ------------------------------------------------------------------------------


_unkept: list[str] = []  # why outcomes could not be kept


def could_not_keep(what: str, path: Path, error: OSError) -> None:
    """Let `remarks` say it."""
    _unkept.append(f"{what} cannot be kept in {path.parent}: {error}")


def kept_at(device: torch.device, *which: str | bool) -> Path:
    """Return the file of `which` findings, for all that may change them on a device."""
    sources = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        sources.update(path.read_bytes())
    facts = [*which, torch.__version__, torch.version.cuda, sources.hexdigest()]
    facts.append(inventory.triton())
    if device.type == "cuda":
        facts += [torch.cuda.get_device_name(device), inventory.nvidia_driver()]
    key = hashlib.sha256(json.dumps([*facts, interpreted()]).encode()).hexdigest()
    return cache_folder() / "kernels" / f"{key}.json"


def _read(device: torch.device, dtype: torch.dtype, eight: bool) -> dict[str, Outcome] | None:
    operations = OPERATIONS8 if eight else OPERATIONS
    try:
        kept = json.loads(kept_at(device, name_of(dtype), eight).read_bytes())
        return {operation: Outcome(*kept[operation]) for operation in operations}
    except (OSError, ValueError, TypeError, KeyError):  # absent or broken
        return None


def _write(
    device: torch.device, dtype: torch.dtype, eight: bool, found: dict[str, Outcome]
) -> None:
    path = kept_at(device, name_of(dtype), eight)
    try:
        disk.replace(path, json.dumps(found).encode())
    except OSError as error:
        could_not_keep("the check of the kernels", path, error)


# --- in the process that checks ----------------------------------------------------------------


def all_checks(device: torch.device, dtype: torch.dtype) -> Iterator[Check]:
    """Yield the checks of all kernels of this package."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int, size: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * size).to(device, dtype)

    for module in pkgutil.iter_modules([str(Path(__file__).parent)], f"{__package__}."):
        if module.name.endswith("_triton"):
            yield from importlib.import_module(module.name).checks(draw)


def _outcome(check: Check, device: torch.device, dtype: torch.dtype) -> Outcome:
    try:
        found = check.error()
    except Exception as error:  # the compiler, its launcher and torch raise anything
        if device.type == "cuda":
            _exit_if_broken(device)
        name, text = type(error).__name__, (str(error).strip() or "no reason").splitlines()[0]
        return Outcome(None, f"its kernel fails: {name}: {text}", not is_out_of_memory(error))
    needed = least(dtype) if check.least is None else check.least
    if found >= needed:
        return Outcome(found)
    return Outcome(found, f"its kernel agrees with torch to {found:.0f} dB, not to {needed:.0f}")


def _exit_if_broken(device: torch.device) -> None:
    """End this process if a fault on the GPU has made it useless; another one goes on."""
    try:
        torch.cuda.synchronize(device)
    except Exception as error:
        sys.stderr.write(f"{str(error).splitlines()[0]}\n")
        sys.stderr.flush()
        os._exit(BROKEN)


def main(device_name: str, dtype_name: str, workers: str, *operations: str) -> None:
    device, dtype = torch.device(device_name), getattr(torch, dtype_name)
    checks = list(all_checks(device, dtype))
    sys.stdout.write(f"{BEGUN}\n")
    sys.stdout.flush()
    # The interpreter is one for all threads. Alone, every operation is reported before the next one
    # begins, so that a crash is blamed on the operation that caused it: `map` is lazy.
    alone = interpreted() or workers == "1"
    with ThreadPoolExecutor(int(workers)) as pool:
        run = map if alone else pool.map
        examined = functools.partial(_outcome, device=device, dtype=dtype)
        pending = {
            operation: run(examined, [check for check in checks if check.operation == operation])
            for operation in operations
        }
        for operation, results in pending.items():
            outcomes = list(results)
            worst = min(outcomes, key=lambda one: (one.fault is None, one.decibels or 0.0))
            document = {"operation": operation} | worst._asdict()
            sys.stdout.write(json.dumps(document) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
