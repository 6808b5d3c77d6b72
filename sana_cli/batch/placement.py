"""Where the processes of a batch run: `--gpus auto|N|0,1`, or `--workers N` on the CPU."""

import os
import re
from dataclasses import dataclass

from sana_cli.errors import UsageError
from sana_cli.units import counted, gigabytes

MAX_WORKERS = 256


@dataclass(frozen=True)
class Placement:
    """The device, memory and threads of a worker process. None leaves a choice to the process."""

    device: str
    visible: str | None = None  # of a GPU: CUDA_VISIBLE_DEVICES of the process
    memory: int | None = None  # bytes
    threads: int | None = None

    def __str__(self) -> str:
        return self.device if self.visible is None else f"GPU {self.visible}"

    def share(self) -> str:
        """Describe the memory and the threads of the process."""
        shares = [f"{gigabytes(self.memory)} of memory"] if self.memory is not None else []
        shares += [counted(self.threads, "thread")] if self.threads is not None else []
        return " and ".join(shares)


def on_gpus(text: str, memory: int | None) -> list[Placement]:
    """Place a worker on each GPU of `auto`, a count, or a list of numbers such as 0,1.

    The numbers count the GPUs that CUDA_VISIBLE_DEVICES leaves. `memory` limits each. UsageError
    for what is not here.
    """
    import torch

    count = torch.cuda.device_count()
    if not count:
        raise UsageError(
            f"--gpus {text}: this machine or this build of torch has no CUDA device",
            "leave it out, or use several CPU processes: --workers 2 --device cpu",
        )
    if text == "auto":
        numbers = list(range(count))
    elif re.fullmatch(r"[1-9]\d{0,3}", text):
        numbers = list(range(int(text)))
    elif re.fullmatch(r"\d{1,4}(,\d{1,4})*,?", text) and "," in text:
        numbers = [int(number) for number in text.rstrip(",").split(",")]
    else:
        raise UsageError(
            f"--gpus {text!r} is neither auto, a count nor a list",
            "use --gpus auto, --gpus 2, or --gpus 0,2",
        )
    if len(set(numbers)) < len(numbers):
        raise UsageError(f"--gpus {text} names a GPU twice")
    if max(numbers) >= count:
        there = "is 1 GPU" if count == 1 else f"are {count} GPUs"
        raise UsageError(f"--gpus {text}: there {there}", f"they have the numbers 0 to {count - 1}")
    names = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    seen = names if names != [""] else [str(number) for number in range(count)]
    return [Placement("cuda", seen[number], memory) for number in numbers]


def on_cpu(count: int, memory: int) -> list[Placement]:
    """Place `count` workers on the CPU, which share its cores and `memory`, in bytes.

    UsageError for a count out of range.
    """
    if not 1 <= count <= MAX_WORKERS:
        raise UsageError(f"--workers {count} is not between 1 and {MAX_WORKERS}")
    # A user who has set the number of threads means that of each process.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = None if os.environ.get("OMP_NUM_THREADS") else max(1, (cores or 1) // count)
    return [Placement("cpu", memory=memory // count, threads=threads)] * count
