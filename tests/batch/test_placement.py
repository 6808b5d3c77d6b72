"""Which processes `--gpus` and `--workers` ask for."""

import pytest
import torch

from batches import DEMO
from sana_cli.batch.placement import Placement, on_cpu, on_gpus
from sana_cli.errors import UsageError


@pytest.fixture
def four_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize(
    ("text", "visible"),
    [("auto", "0123"), ("2", "01"), ("0,2", "02"), ("3,1", "31"), ("3,", "3")],
)
def test_gpus_are_all_a_count_or_a_list(four_gpus, text, visible):
    assert on_gpus(text, 10**9) == [Placement("cuda", number, 10**9) for number in visible]


@pytest.mark.parametrize("text", ["0", "5", "0,4", "1,1", "-1", "x", "", "0,,1", "1.5"])
def test_gpus_that_are_not_here_are_refused(four_gpus, text):
    with pytest.raises(UsageError, match="--gpus"):
        on_gpus(text, None)


def test_numbers_count_the_gpus_that_the_process_may_use(four_gpus, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,5,GPU-3a1b,2")
    assert [one.visible for one in on_gpus("1,2", None)] == ["5", "GPU-3a1b"]


def test_processes_on_the_cpu_share_its_memory_and_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(9), raising=False)
    assert on_cpu(4, 8 * 10**9) == [Placement("cpu", None, 2 * 10**9, 2)] * 4
    assert on_cpu(16, 8 * 10**9)[0].threads == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "3")  # which every process reads itself
    assert on_cpu(4, 8 * 10**9)[0].threads is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--gpus", "2"), "no CUDA device"),
        (("--gpus", "2", "--device", "cuda"), "both choose a device"),
        (("--workers", "0"), "between 1 and 256"),
        (("--gpus", "2", "--workers", "2"), "both choose processes"),
        (("--workers", "2", "--server", "http://127.0.0.1:1"), "no effect with --server"),
    ],
)
def test_a_wrong_choice_is_refused_before_anything_is_drawn(sana, monkeypatch, words, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    run = sana("batch", "jobs.txt", *DEMO, *words)
    assert (run.code, run.out) == (2, "")
    assert message in run.err
