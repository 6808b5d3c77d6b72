"""Compile a package's Triton kernels for every GPU generation, without a GPU; report resources.

    python -m sana_cli.kernels.aot [--arch 89 90] [--json] [--jobs 2]

The exit code is 1, with one line per fault, if a kernel spills registers, needs more shared memory
than the GPU has, or multiplies matrices without tensor cores. The machine code is read with the
NVIDIA tools that come with Triton.
"""

import argparse
import functools
import importlib
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from sana_cli.kernels.cases import Case

# Bytes of shared memory available to one program (CUDA C++ Programming Guide, table of
# capabilities): A100; GeForce Ampere and Ada; Hopper; Blackwell, data centre and GeForce.
SHARED = {
    (8, 0): 163 << 10,
    (8, 6): 99 << 10,
    (8, 9): 99 << 10,
    (9, 0): 227 << 10,
    (10, 0): 227 << 10,
    (12, 0): 99 << 10,
}
# mma.sync is HMMA and the like, wgmma is HGMMA, and tcgen05 UTCHMMA.
TENSOR_CORES = re.compile(r"\b(?:[HIQO]G?MMA|UTC[A-Z]*MMA)[.\w]*")


@dataclass(frozen=True)
class Cost:
    case: str
    arch: int
    registers: int  # per thread, at most 255
    stack: int  # bytes per thread: spilled registers
    shared: int  # bytes per program
    warps: int
    tensor_cores: str | None  # the most frequent tensor-core instruction
    count: int  # of tensor-core instructions
    matrices: bool  # whether the kernel multiplies matrices

    @property
    def fault(self) -> str | None:
        limit = SHARED[divmod(self.arch, 10)]
        if self.stack:
            return f"spills {self.stack} bytes of registers per thread"
        if self.shared > limit:
            return f"needs {self.shared} bytes of shared memory, and a program has {limit}"
        if self.matrices and not self.count:
            return "multiplies matrices without tensor cores"
        return None


@functools.cache
def all_cases(package: str, target: tuple[int, int]) -> tuple[Case, ...]:
    """Collect the cases of all modules of a package on a GPU, without those that compile alike."""
    found: list[Case] = []
    folders = importlib.import_module(package).__path__
    for module in pkgutil.iter_modules(folders, f"{package}."):
        if module.name.endswith("_triton"):
            for case in importlib.import_module(module.name).cases(target):
                if not any(case.is_compiled_as(other) for other in found):
                    found.append(case)
    return tuple(found)


def measure(package: str, target: tuple[int, int], index: int) -> Cost:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    case, arch = all_cases(package, target)[index], target[0] * 10 + target[1]
    names = case.kernel.arg_names
    even = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if name in case.aligned or case.signature[name].startswith("*")
    }
    made = triton.compile(
        ASTSource(case.kernel, case.signature, case.constants, even),
        target=GPUTarget("cuda", arch, 32),
        options={
            "num_warps": case.num_warps,
            "num_stages": case.num_stages,
            "enable_fp_fusion": True,
        },
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(made.asm["cubin"])
        usage = _run("cuobjdump", "--dump-resource-usage", str(path))
        code = _run("nvdisasm", "-c", str(path))
    resources = {name: int(number) for name, number in re.findall(r"\b([A-Z]+):(\d+)", usage)}
    found = TENSOR_CORES.findall(code)
    return Cost(
        case.name,
        arch,
        resources["REG"],
        resources["STACK"],
        made.metadata.shared,
        case.num_warps,
        max(set(found), key=found.count, default=None),
        len(found),
        "tt.dot" in made.asm["ttir"],
    )


def _run(tool: str, *words: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    return subprocess.run([path, *words], check=True, capture_output=True, text=True).stdout


def measure_all(package: str, archs: list[int], jobs: int) -> list[Cost]:
    work = [
        (package, target, index)
        for target in (divmod(arch, 10) for arch in archs)
        for index in range(len(all_cases(package, target)))
    ]
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(measure, *zip(*work, strict=True)))


def show(costs: list[Cost]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("kernel", "GPU")
    for name in ("warps", "registers", "stack", "shared"):
        table.add_column(name, justify="right")
    table.add_column("tensor cores")
    for cost in costs:
        cores = f"{cost.count} {cost.tensor_cores}" if cost.count else ""
        numbers = (cost.warps, cost.registers, cost.stack, cost.shared)
        style = "red" if cost.fault else ""
        table.add_row(cost.case, f"sm_{cost.arch}", *map(str, numbers), cores, style=style)
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    console.print("sm_75 and older: torch's own kernels, as Triton has no tensor-core code there")


def main(package: str = "sana_cli.kernels") -> int:
    known = [major * 10 + minor for major, minor in SHARED]
    parser = argparse.ArgumentParser(f"python -m {package}.aot", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", choices=known, default=known)
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)  # the interpreter compiles nothing
    costs = measure_all(package, options.arch, options.jobs)
    if options.json:
        rows = [asdict(cost) | {"fault": cost.fault} for cost in costs]
        sys.stdout.write(json.dumps(rows, indent=2) + "\n")
    else:
        show(costs)
    faulty = [cost for cost in costs if cost.fault]
    for cost in faulty:
        sys.stderr.write(f"error: {cost.case} on sm_{cost.arch} {cost.fault}\n")
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
