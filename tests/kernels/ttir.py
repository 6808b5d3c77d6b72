"""Executes the checks of the kernels on the intermediate code (TTIR) that Triton compiles them to.

    python tests/kernels/ttir.py {DTYPE,faulty}

ttsem executes each launch on the CPU, adding in the order of the code, in any dtype. It raises an
error where a program reads or writes outside the tensors it was given, where two programs touch
the same element and one of them writes it, and where an operation has no defined result. Memory
that nothing has written holds NaN. A process of its own runs it, as Triton compiles there: the
interpreter is chosen once, at the first import. One line of JSON is printed for each check.
"""

import json
import sys
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from ttsem import sanitize

from sana_cli.kernels import selfcheck
from sana_cli.kernels.launch import launch
from sana_cli.kernels.selfcheck import least


def checked(dtype: torch.dtype) -> Iterator[dict]:
    for check in selfcheck.all_checks(torch.device("cpu"), dtype):
        needed = least(dtype) if check.least is None else check.least
        yield {"operation": check.operation, "decibels": check.error(), "least": needed}


def faulty() -> Iterator[dict]:
    """Launch a kernel that is right, one without its mask, and one of which two programs meet."""
    for size, step in ((64, 32), (50, 32), (64, 16)):
        x = torch.empty(size)
        try:
            launch(fill_kernel, (2,), x, STEP=step, BLOCK=32, num_warps=4)
            yield {"fault": None}
        except sanitize.KernelFault as found:
            yield {"fault": found.fault.kind}


@triton.jit
def fill_kernel(x, STEP: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    tl.store(x + at, at * 0.0 + tl.program_id(0))


def main(what: str) -> None:
    # The block shapes are those of the least capability, and the code that of sm_80.
    with sanitize.session(cc=80) as session:
        for line in faulty() if what == "faulty" else checked(getattr(torch, what)):
            print(json.dumps(line))  # noqa: T201
    print(json.dumps({"launches": session.launches, "unchecked": session.races_unchecked}))  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])
