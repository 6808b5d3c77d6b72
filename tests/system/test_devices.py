"""What a device tells and is told: that memory is exhausted, and how much may be taken."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from sana_cli.pipeline.plan import free_memory
from sana_cli.system.devices import cap_memory, is_out_of_memory
from sana_cli.system.inventory import memory


@pytest.mark.parametrize(
    "text",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB.",
        "CUDA error: out of memory",
        "Triton Error [CUDA]: out of memory",
        "CUDA driver error: CUDA_ERROR_OUT_OF_MEMORY",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "GET was unable to find an engine to execute this computation",
        "MPS backend out of memory (MPS allocated: 8.00 GB, max allowed: 9.07 GB)",
        "Invalid buffer size: 16.00 GB",
        "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory",
        "DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.",
        "std::bad_alloc",
    ],
)
def test_exhausted_memory_is_known_in_every_spelling(text):
    assert is_out_of_memory(RuntimeError(text))
    assert not is_out_of_memory(ValueError(text)), "errors of devices are RuntimeErrors"


def test_other_errors_of_a_device_are_not_taken_for_exhausted_memory():
    for text in ("CUDA error: an illegal memory access was encountered", "CUDNN_STATUS_BAD_PARAM"):
        assert not is_out_of_memory(RuntimeError(text))


CHOOSE = """
import ctypes, sys
from sana_cli.system.devices import choose_device, torch_version

driver, asked = {driver!r}, {asked!r}
def load(name, *rest):
    if name in ("libcuda.so.1", "nvcuda.dll") and not driver:
        raise OSError(name)
ctypes.CDLL = load
try:
    print(choose_device(asked), torch_version().__version__)
except RuntimeError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "darwin", reason="torch is asked for MPS")
@pytest.mark.parametrize(
    ("build", "driver", "asked", "says"),
    [
        ("cuda = None; hip = None", True, "auto", "cpu 2.0"),
        ("cuda = '12.8'; hip = None", False, "auto", "cpu 2.0"),
        ("cuda = '12.8'; hip = None", True, "cpu", "cpu 2.0"),
        ("cuda = '12.8'; hip = None", True, "auto", "torch is imported"),
        ("cuda = None; hip = '6.4'", False, "auto", "torch is imported"),
        ("cuda = None; hip = None", False, "cuda:3", "torch is imported"),
        ("cuda = None; hip = None", False, "cpu:0", "torch is imported"),
    ],
)
def test_torch_is_asked_for_a_device_only_if_it_may_have_one(tmp_path, build, driver, asked, says):
    torch_like = tmp_path / "torch"
    torch_like.mkdir()
    (torch_like / "__init__.py").write_text("raise RuntimeError('torch is imported')")
    (torch_like / "version.py").write_text(f"__version__ = '2.0'; {build}")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
    code += CHOOSE.format(driver=driver, asked=asked)
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == says, done.stderr


def test_the_version_is_that_of_torch():
    code = """
import sys
from sana_cli.system.devices import torch_version
alone = torch_version()
assert "torch" not in sys.modules
import torch
facts = [(m.__version__, m.cuda, m.hip) for m in (alone, torch.version)]
assert facts[0] == facts[1], facts
assert alone.__version__ == torch.__version__
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def gpu(monkeypatch) -> dict[int, float]:
    """Two GPUs of 16 GB, of which torch has 5 GB and uses 3; the share that each was capped to."""
    capped: dict[int, float] = {}
    functions = {
        "get_device_properties": lambda device: SimpleNamespace(total_memory=16 * 10**9),
        "mem_get_info": lambda device: (10 * 10**9, 16 * 10**9),
        "memory_reserved": lambda device: 5 * 10**9,
        "memory_allocated": lambda device: 3 * 10**9,
        "current_device": lambda: 0,
        "set_per_process_memory_fraction": lambda share, index: capped.update({index: share}),
    }
    for name, function in functions.items():
        monkeypatch.setattr(torch.cuda, name, function)
    return capped


def test_torch_may_take_no_more_of_a_gpu_than_the_plan_has(gpu):
    cap_memory("cuda", budget=8 * 10**9, held=3 * 10**9)
    cap_memory("cuda:1", budget=8 * 10**9, held=10**9)
    cap_memory("cpu", budget=8 * 10**9, held=0)
    # On the second GPU, 2 GB belong to somebody else in this process.
    assert gpu == {0: pytest.approx(8 / 16), 1: pytest.approx(10 / 16)}
    cap_memory("cuda", budget=20 * 10**9, held=0)
    assert gpu[0] == 1.0


CONTAINERS = {
    "version 2": {
        "memory.max": "1000000000\n",
        "memory.current": "900000000\n",
        "memory.stat": "file 400000000\ninactive_file 300000000\nslab 3\n",
    },
    "version 1": {
        "memory/memory.limit_in_bytes": "1000000000\n",
        "memory/memory.usage_in_bytes": "900000000\n",
        "memory/memory.stat": "inactive_file 5\ntotal_inactive_file 300000000\n",
    },
}


@pytest.mark.parametrize("version", CONTAINERS)
def test_what_a_container_uses_of_its_memory_is_not_free(version, tmp_path, monkeypatch):
    (tmp_path / "memory").mkdir()
    for name, text in CONTAINERS[version].items():
        (tmp_path / name).write_text(text)
    facts = memory(tmp_path)
    assert (facts["limit_bytes"], facts["limit_free_bytes"]) == (10**9, 4 * 10**8)
    of_host = {"available_bytes": 60 * 10**9}
    monkeypatch.setattr("sana_cli.pipeline.plan.memory", lambda: facts | of_host)
    free = [free_memory("cpu", held) for held in (0, 5 * 10**8, 9 * 10**8)]
    assert free == [4 * 10**8, 9 * 10**8, 10**9]


@pytest.mark.parametrize(
    ("folder", "own", "files"),
    [
        (".", "0::/job/step\n", ("memory.max", "memory.current", "inactive_file")),
        (
            "memory",
            "9:name=systemd:/else\n4:hugetlb,memory:/job/step\n0::/\n",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ),
    ],
    ids=["version 2", "version 1"],
)
@pytest.mark.parametrize(
    ("groups", "found"),  # of each group the limit, what is used, and of that the unneeded part
    [
        ({"job": (1000, 900, 300)}, (1000, 400)),
        ({"job/step": (1000, 900, 300)}, (1000, 400)),
        ({"job": (2000, 1900, 50), "job/step": (1000, 100, 0)}, (1000, 150)),
        ({"job": ("max", 900, 300)}, (None, None)),
        ({"else": (1000, 900, 300)}, (None, None)),
    ],
)
def test_the_limit_of_a_job_or_a_unit_holds_in_the_groups_below(
    tmp_path, folder, own, files, groups, found
):
    limit, usage, unneeded = files
    for name, values in groups.items():
        group = tmp_path / folder / name
        group.mkdir(parents=True, exist_ok=True)
        (group / limit).write_text(f"{values[0]}\n")
        (group / usage).write_text(f"{values[1]}\n")
        (group / "memory.stat").write_text(f"{unneeded} {values[2]}\n")
    (tmp_path / "own").write_text(own)
    facts = memory(tmp_path, tmp_path / "own")
    assert (facts["limit_bytes"], facts["limit_free_bytes"]) == found


def test_memory_that_torch_keeps_for_reuse_is_free(gpu):
    assert free_memory("cuda:1") == 12 * 10**9
