"""The check of the kernels before their first use: what it covers, finds, survives and keeps.

The process that checks runs Triton's interpreter where there is no GPU.
"""

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from examples import exhaustive
from kernel_checks import DEVICE, DTYPES, MIN_TRITON
from recipes import RECIPE

pytest.importorskip("triton", minversion=MIN_TRITON)

from sana_cli.kernels import dispatch, launch, selfcheck
from sana_cli.kernels.aot import DTYPES as COMPILED
from sana_cli.kernels.aot import all_cases
from sana_cli.kernels.cases import Case
from sana_cli.kernels.selfcheck import OPERATIONS, OPERATIONS8, Outcome, all_checks, decibels, least
from sana_cli.pipeline import draw
from sana_cli.pipeline.events import Notice
from sana_cli.pipeline.networks import Networks
from sana_cli.pipeline.plan import Plan
from sana_cli.weights.layout import folder_parts
from sana_cli.weights.model_files import open_model

FLOAT = torch.float32


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    """Nothing is known from another test."""
    for name, empty in (("_started", {}), ("_said", set()), ("_unkept", [])):
        monkeypatch.setattr(selfcheck, name, empty)


@pytest.fixture
def script(tmp_path, monkeypatch) -> Callable[[str], None]:
    """Let a script be the process that checks."""

    def choose(text: str) -> None:
        path = tmp_path / "checks.py"
        path.write_text(text)
        monkeypatch.setattr(selfcheck, "COMMAND", [sys.executable, str(path)])

    return choose


# Says of every operation that its kernel is right; `wrong` is one that it says is not.
TELLER = """
import json, sys
device, dtype, workers, *operations = sys.argv[1:]
print("the GPU answers")
print("noise of a library", 3, [], sep="\\n")
for operation in operations:
    fault = "of the test" if operation == {wrong!r} else None
    document = dict(operation=operation, decibels=float("inf"), fault=fault, lasting={lasting})
    print(json.dumps(document))
"""


def telling(wrong: str = "", lasting: bool = True) -> str:
    return TELLER.format(wrong=wrong, lasting=lasting)


# --- what is checked ---------------------------------------------------------------------------


def specialisation(case: Case) -> tuple:
    """What a kernel is compiled for, but for sizes: whether they are 1, or multiples of 16."""
    pointers = {name: kind for name, kind in case.signature.items() if kind.startswith("*")}
    fixed = {k: v for k, v in case.constants.items() if v is None or k.isupper()}
    return case.kernel.__name__, str(pointers), str(fixed), case.num_warps, case.num_stages


@pytest.mark.parametrize("arch", [89, 90, *exhaustive(80, 86, 100, 120)])
def test_every_specialisation_that_the_models_launch_is_checked(arch):
    target = divmod(arch, 10)
    with launch._tracing(target) as launched:
        for dtype in COMPILED:
            for check in all_checks(torch.device("meta"), dtype):
                check.fused(*check.inputs)
    covered = set(map(specialisation, launched))
    missing = [
        case.name
        for case in all_cases("sana_cli.kernels", target)
        if specialisation(case) not in covered
    ]
    assert not missing


def test_every_operation_is_checked():
    checks = all_checks(torch.device("meta"), FLOAT)
    assert {check.operation for check in checks} == {*OPERATIONS, *OPERATIONS8}


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("eight", [False, True])
def test_all_kernels_agree_with_torch(dtype, eight):
    found = selfcheck.examine(DEVICE, dtype, eight)
    assert [operation for operation, outcome in found.items() if outcome.fault] == []


@pytest.mark.parametrize("terms", [1152, 5600])
def test_a_sum_that_is_added_in_order_is_near_enough(terms):
    """As GPUs add in float32; numpy and cuBLAS add in blocks, which is more exact."""
    torch.manual_seed(1)
    a, b = torch.randn(32, terms), torch.randn(terms, 32)
    total = torch.zeros(32, 32)
    for k in range(terms):
        total += a[:, k, None] * b[k]
    assert least(FLOAT, terms) < decibels(total, a.double() @ b.double()) < least(FLOAT)


# --- what it finds -----------------------------------------------------------------------------


FAULTY = """
import os, sys
import torch
from sana_cli.kernels import linear_attention_triton, modulation_triton, projection_triton
from sana_cli.kernels import rms_norm_triton, selfcheck

def wrong(x, *rest):
    return torch.randn_like(x)

def nan(x, *rest):
    return x.fill_(float("nan"))

def failing(*given, **more):
    raise RuntimeError("no kernel image is available\\nand more")

def crashing(*given):
    sys.stderr.write("LLVM ERROR: of the test\\n")
    sys.stderr.flush()
    os.abort()

modulation_triton.modulate = wrong
rms_norm_triton.rms_norm = nan
projection_triton.linear_silu = failing
linear_attention_triton.attend_tokens = crashing
selfcheck.main(*sys.argv[1:])
"""


def test_a_kernel_that_is_wrong_fails_or_crashes_is_not_used(script, monkeypatch):
    script(FAULTY)
    good = "depthwise_glu"
    operations = ("modulate", "rms_norm", "linear_silu", "attend_tokens", good)
    monkeypatch.setattr(selfcheck, "OPERATIONS", operations)
    found = selfcheck.outcomes(DEVICE, FLOAT)
    assert list(found) == list(operations)
    faults = {operation: str(found[operation].fault) for operation in operations}
    assert "agrees with torch to -" in faults["modulate"]
    assert "agrees with torch to nan dB" in faults["rms_norm"]
    assert faults["linear_silu"].endswith("fails: RuntimeError: no kernel image is available")
    assert faults["attend_tokens"].startswith("its check crashed")
    assert faults["attend_tokens"].endswith("LLVM ERROR: of the test")
    assert found[good].fault is None and found[good].decibels > least(FLOAT)
    used = [one for one in operations if selfcheck.passes(one, torch.device(DEVICE), FLOAT)]
    assert used == [good]


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (["/nonexistent"], "could not be started"),
        ([sys.executable, "-c", "raise SystemExit('the GPU is busy')"], "the GPU is busy"),
    ],
)
def test_without_a_check_nothing_runs_in_triton_this_time(cache, monkeypatch, command, reason):
    monkeypatch.setattr(selfcheck, "COMMAND", command)
    found = selfcheck.outcomes("cpu", FLOAT)
    assert all(reason in outcome.fault for outcome in found.values())
    assert kept(cache) == []


def test_no_operation_is_blamed_for_the_time_that_all_take(cache, monkeypatch):
    """On a machine whose compiler is slow the process ends late, having told some outcomes."""
    passes = []

    def late(command, **options):
        passes.append(command[4:])
        told = {"operation": command[-1], "decibels": 60.0, "fault": None, "lasting": True}
        lines = f"{selfcheck.BEGUN}\n{json.dumps(told)}\n".encode()
        raise subprocess.TimeoutExpired(command, options["timeout"], lines)

    monkeypatch.setattr(selfcheck, "COMMAND", ["python"])
    monkeypatch.setattr(subprocess, "run", late)
    found = selfcheck.examine("cpu", FLOAT)
    assert not any(outcome.fault for outcome in found.values())
    assert [len(operations) for operations in passes] == list(range(len(OPERATIONS), 0, -1))
    assert len(kept(cache)) == 1


def test_drawing_begins_with_the_check_and_says_what_failed(script, monkeypatch):
    script(telling(wrong="kv_state"))
    monkeypatch.setattr(draw, "fallback_reason", lambda device: None)
    recipe = SimpleNamespace(
        dit_dtype="float16", vae_dtype="float32", quant="w8a8", steps=1, strength=None
    )
    files = SimpleNamespace(vae=SimpleNamespace(compression=32))
    drawing = draw.Drawing([recipe], files, Plan("cpu"), Networks(), None, None)
    (began,) = drawing.start_selfcheck(drawing.kernel_kinds)
    assert began.text.startswith("compiling and checking the kernels")
    assert not list(drawing.start_selfcheck(drawing.kernel_kinds))
    warnings = list(drawing.remarks_of_selfcheck(drawing.kernel_kinds))
    assert [event.text.split(" runs")[0] for event in warnings if event.warning] == [
        "kv_state in float16",
        "kv_state in float32",
    ]
    assert not list(drawing.remarks_of_selfcheck(drawing.kernel_kinds))


def test_a_decode_that_is_repeated_in_float32_has_its_kernels_checked_first(monkeypatch):
    started: list[selfcheck.Kind] = []
    monkeypatch.setattr(draw, "fallback_reason", lambda device: None)
    monkeypatch.setattr(selfcheck, "start", lambda device, kinds: started.extend(kinds) or True)
    monkeypatch.setattr(selfcheck, "remarks", lambda device, kinds: [f"of {kinds[-1][0]}"])
    faults = iter(["NaN", None])
    monkeypatch.setattr(draw, "fault_of", lambda decoded: next(faults))
    files = open_model(folder_parts(Path(draw.__file__).parents[1] / "demo"))
    sides = dict.fromkeys(("width", "height", "native_width", "native_height"), 256)
    precision = {"dit_dtype": "bfloat16", "vae_dtype": "bfloat16"}
    recipe = replace(RECIPE, steps=1, **sides, **precision)
    notices = [e.text for e in draw.draw([recipe], files, Plan("cpu")) if isinstance(e, Notice)]
    assert started == [(torch.bfloat16, False), (torch.float32, False)]
    first, warned, second, again, told = notices
    assert first == second == "compiling and checking the kernels, once for this GPU"
    assert (warned, again) == ("of torch.bfloat16", "of torch.float32")
    assert "decoded again in float32" in told


@pytest.fixture
def ampere(monkeypatch):
    """A machine with a GPU, as the dispatch sees it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    return functools.partial(dispatch.fallback_reason.__wrapped__, torch.device("cuda:0"))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere Triton brings its compiler")
def test_without_a_compiler_nothing_runs_in_triton(ampere, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    assert "neither gcc nor clang" in ampere()
    monkeypatch.setenv("CC", "/opt/missing/cc")
    assert "CC names /opt/missing/cc" in ampere()
    monkeypatch.setenv("CC", sys.executable)
    assert ampere() is None or "Python.h" in ampere()


def test_an_operation_runs_in_triton_only_if_its_kernel_passed(script, ampere, monkeypatch):
    script(telling(wrong="linear_silu"))
    monkeypatch.setattr(dispatch, "fallback_reason", lambda device: None)
    kind = {"is_cuda": True, "is_meta": False, "requires_grad": False}
    x = SimpleNamespace(**kind, dtype=FLOAT, device=torch.device("cpu"))
    assert not dispatch.uses_triton("linear_silu", x)
    assert dispatch.uses_triton("modulate", x)
    (text,) = selfcheck.remarks("cpu", [(FLOAT, False)])
    assert text.startswith("linear_silu in float32 runs as plain torch: of the test; ")
    assert selfcheck.remarks("cpu", [(FLOAT, False)]) == [], "it is said once"


# --- what it keeps -----------------------------------------------------------------------------


def kept(cache: Path) -> list[Path]:
    return list((cache / "kernels").glob("*.json"))


def test_outcomes_are_kept_until_something_changes(script, cache, monkeypatch):
    script(telling(wrong="modulate"))
    assert selfcheck.start("cpu", [(FLOAT, False)])
    found = selfcheck.outcomes("cpu", FLOAT)
    assert found["modulate"] == Outcome(float("inf"), "of the test")
    assert not selfcheck.start("cpu", [(FLOAT, False)]), "it began already"
    assert len(kept(cache)) == 1
    script("raise SystemExit('it was started again')")
    selfcheck._started.clear()
    assert not selfcheck.start("cpu", [(FLOAT, False)])
    assert selfcheck.outcomes("cpu", FLOAT) == found
    monkeypatch.setattr(torch, "__version__", "2.99")
    selfcheck._started.clear()
    assert selfcheck.start("cpu", [(FLOAT, False)]), "another torch"
    assert "it was started again" in selfcheck.outcomes("cpu", FLOAT)["linear_silu"].fault


@pytest.mark.parametrize("text", ["", "{}", "[1", '{"modulate": 3}'])
def test_a_broken_file_is_made_again(script, cache, text):
    script(telling())
    selfcheck.examine("cpu", FLOAT)
    (path,) = kept(cache)
    good = json.loads(path.read_text())
    path.write_text(text)
    selfcheck.outcomes("cpu", FLOAT)
    assert json.loads(path.read_text()) == good


def test_a_full_gpu_is_no_reason_to_avoid_a_kernel_another_time(script, cache):
    script(telling(wrong="modulate", lasting=False))
    assert selfcheck.outcomes("cpu", FLOAT)["modulate"].fault
    assert kept(cache) == []


def test_a_cache_that_cannot_be_written_is_said_once_and_costs_no_kernel(
    script, tmp_path, monkeypatch
):
    script(telling())
    (tmp_path / "file").touch()
    monkeypatch.setenv("SANA_CACHE_DIR", str(tmp_path / "file"))
    (text,) = selfcheck.remarks("cpu", [(FLOAT, False)])
    assert "cannot be kept" in text
    assert selfcheck.passes("modulate", torch.device("cpu"), FLOAT)
    assert selfcheck.remarks("cpu", [(FLOAT, False)]) == []


# --- on demand ---------------------------------------------------------------------------------


def test_doctor_checks_on_demand_and_shows_a_table(script, sana, machine, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    script(telling(wrong="rms_norm"))
    run = sana("doctor", "--check")
    assert run.code == 0
    lines = [" ".join(line.split()) for line in run.out.splitlines()]
    assert "kernel dtype arch dB to torch path" in lines
    assert "modulate float32 interpreter exact triton" in lines
    assert "rms_norm float16 interpreter - torch: of the test" in lines
    rows = json.loads(sana("doctor", "--check", "--json").out)["checks"]
    assert [row["kernel"] for row in rows] == 2 * [*OPERATIONS, *OPERATIONS8]
    assert {row["path"] for row in rows if row["kernel"] == "rms_norm"} == {"torch"}
    assert "checks" not in json.loads(sana("doctor", "--json").out)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are kernels to check")
def test_doctor_says_why_there_is_no_kernel_to_check(sana, machine, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    run = sana("doctor", "--check")
    assert run.code == 0
    assert "no kernel to check, as everything runs as plain torch: there is no Triton" in run.err
