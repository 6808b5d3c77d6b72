"""Every kernel compiled for this GPU and compared with the torch lines that define it."""

import argparse
import math
import os

import torch

from benchmarks.gpu.report import Report


def selfcheck(options: argparse.Namespace, report: Report) -> None:
    """Later sections, and later images, use the outcomes that this keeps."""
    from sana_cli.kernels import selfcheck as checks

    dtypes = list(checks.DTYPES)
    if options.device == "cpu":  # in Triton's interpreter, where all of them would take minutes
        os.environ["TRITON_INTERPRET"] = "1"
        dtypes = [torch.float32]
        checks.OPERATIONS, checks.OPERATIONS8 = ("modulate",), ("modulate8",)
    for dtype in dtypes:
        for eight in (False, True):
            for operation, outcome in checks.examine(options.device, dtype, eight).items():
                error, fault = outcome.decibels, outcome.fault
                report.add(
                    "selfcheck",
                    operation=operation,
                    dtype=checks.name_of(dtype),
                    decibels=error if error is not None and math.isfinite(error) else None,
                    fault=fault,
                    ok=fault is None,
                )
