"""Compile a package's Triton kernels for every GPU generation, without a GPU; report resources.

    python -m sana_cli.kernels.aot [--arch 89 90] [--json] [--jobs 2]

Every case is compiled in bfloat16 and, where there are 8-bit inputs, with int8; in float16 and
float32 one case of each block shape is.

The exit code is 1, with one line per fault, if a kernel spills registers, needs more shared memory
than the GPU has, multiplies matrices without the tensor-core instructions of their precision, or
has more instructions beside these in its inner loop than such a loop needs. The machine code is
read with the NVIDIA tools that come with Triton.
"""

import argparse
import functools
import importlib
import json
import math
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from sana_cli.kernels.cases import Case

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
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
# Of a multiprocessor, from the same table.
REGISTERS = 1 << 16
THREADS = {(8, 0): 2048, (8, 6): 1536, (8, 9): 1536, (9, 0): 2048, (10, 0): 2048, (12, 0): 1536}
RESERVED = 1 << 10  # bytes of shared memory that the system takes for each program
# mma.sync is HMMA and the like, wgmma is HGMMA, and tcgen05 UTCHMMA; the I is for integers.
TENSOR_CORES = re.compile(r"\b(?:[HIQO]G?MMA|UTC[A-Z]*MMA)[.\w]*")
INTEGER = re.compile(r"\b(?:IG?MMA|UTCIMMA)\b")
FLOAT = re.compile(r"\b(?:HG?MMA|UTC[HQ]MMA)\b")
# Products of matrices in Triton's intermediate code: the options and the type of the left one.
DOT = re.compile(r"tt\.dot ([^\n]*?) : tensor<[\dx]*x(\w+)>")
LABEL = re.compile(r"^(\.L_x_\d+):", re.MULTILINE)
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)")
LOADS = re.compile(r"\bLDG(?:STS)?\.E((?:\.\w+)*)")
WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}  # bytes; else 4
# In an inner loop: what brings the operands of a product, and what adds sums of int32 or float16 to
# those of float32.
EXPECTED = {"LDSM", "LDS", "LDGSTS", "I2F", "I2FP", "FFMA", "HADD2", "FADD"}
# Most other instructions for each mma.sync, in loops of products alone that have enough of these to
# take long. Those of floats have up to 3.0, those of int8 2.1; operands put together byte by byte
# cost 4. (wgmma and tcgen05 run beside other instructions.)
MANY = 32
MOST_OTHERS = {"HMMA": 3.2, "IMMA": 2.5}


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
    missing: str | None  # of the tensor-core instructions that its precisions need: "int8", "float"
    products: int  # tensor-core instructions of the inner loop
    others: float  # its instructions that are neither these nor EXPECTED, for each of these
    softmax: bool  # whether it computes exponentials between the products
    loads: dict[str, int]  # instructions that load from memory, by the bytes that a thread loads

    @property
    def programs(self) -> int:
        """How many fit on a multiprocessor at once, by registers, shared memory and threads."""
        target, threads = divmod(self.arch, 10), 32 * self.warps
        each = -(-self.registers // 8) * 8 * threads
        shared = (SHARED[target] + RESERVED) // (self.shared + RESERVED)
        return min(REGISTERS // each, shared, THREADS[target] // threads)

    def fault(self, spills: int = 0) -> str | None:
        """Say what the kernel must not do; it may spill `spills` bytes."""
        limit = SHARED[divmod(self.arch, 10)]
        if self.stack > spills:
            return f"spills {self.stack} bytes of registers per thread"
        if self.shared > limit:
            return f"needs {self.shared} bytes of shared memory, and a program has {limit}"
        if self.missing:
            return f"multiplies matrices of {self.missing} without tensor cores"
        kind = (self.tensor_cores or "").split(".")[0]
        most = math.inf if self.softmax else MOST_OTHERS.get(kind, math.inf)
        if self.products >= MANY and self.others > most:
            return f"has {self.others:.1f} other instructions for each {kind} of its inner loop"
        return None


@functools.cache
def all_cases(package: str, target: tuple[int, int]) -> tuple[Case, ...]:
    """Collect the cases of all modules of a package on a GPU, without those that compile alike."""
    found: list[Case] = []
    folders = importlib.import_module(package).__path__
    modules = [
        importlib.import_module(module.name)
        for module in pkgutil.iter_modules(folders, f"{package}.")
        if module.name.endswith("_triton")
    ]
    for dtype in DTYPES:
        shapes = set()
        for module in modules:
            with _default_dtype(dtype):
                cases = list(module.cases(target))
            for case in cases:
                known = case.shape in shapes if dtype != DTYPES[0] else False
                if known or any(case.is_compiled_as(other) for other in found):
                    continue
                shapes.add(case.shape)
                kernel, label = case.name.split(" ", 1)
                name = str(dtype).removeprefix("torch.")
                if dtype != DTYPES[0]:
                    case = replace(case, name=f"{kernel} {name} {label}")
                found.append(case)
    return tuple(found)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


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
    loop = _inner_loop(code)
    products = sum(count for name, count in loop.items() if TENSOR_CORES.match(name))
    others = loop.total() - products - sum(loop[name] for name in EXPECTED)
    return Cost(
        case.name,
        arch,
        resources["REG"],
        resources["STACK"],
        made.metadata.shared,
        case.num_warps,
        max(sorted(set(found)), key=found.count, default=None),
        len(found),
        "tt.dot" in made.asm["ttir"],
        _missing(made.asm["ttir"], code),
        products,
        round(others / products, 2) if products else 0.0,
        "MUFU" in loop,
        _loads(code),
    )


def _missing(ttir: str, code: str) -> str | None:
    """Name a precision whose products of matrices use no tensor cores, if there is one.

    Products of float32 only use them in TF32.
    """
    dots = DOT.findall(ttir)
    if any(kind == "i8" for _, kind in dots) and not INTEGER.search(code):
        return "int8"
    floats = [kind for options, kind in dots if kind != "f32" or "= tf32" in options]
    return "floats" if {*floats} - {"i8"} and not FLOAT.search(code) else None


def _inner_loop(code: str) -> Counter[str]:
    """Count by name the instructions of the innermost loop that has the most tensor-core ones.

    A loop ends with the last jump back to its label. It may contain loops that wait for memory.
    """
    found: list[tuple[int, int, int]] = []
    for label in LABEL.finditer(code):
        end = code.rfind(f"`({label[1]})")
        products = len(TENSOR_CORES.findall(code[label.end() : max(end, 0)]))
        if products:
            found.append((label.end(), end, products))
    inner = [
        one
        for one in found
        if not any(other != one and one[0] <= other[0] and other[1] <= one[1] for other in found)
    ]
    if not inner:
        return Counter()
    begin, end, _ = max(inner, key=lambda one: one[2])
    return Counter(INSTRUCTION.findall(code[begin:end]))


def _loads(code: str) -> dict[str, int]:
    widths = Counter(
        next((WIDTHS[word] for word in words.split(".") if word in WIDTHS), 4)
        for words in LOADS.findall(code)
    )
    return {str(width): count for width, count in sorted(widths.items())}


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


def show(costs: list[Cost], spills: int) -> None:
    import triton
    from rich.console import Console
    from rich.table import Table

    table = Table("kernel", "GPU")
    for name in ("warps", "registers", "stack", "shared", "programs"):
        table.add_column(name, justify="right")
    table.add_column("bytes x loads")
    table.add_column("tensor cores")
    table.add_column("in a step", justify="right")
    table.add_column("others", justify="right")
    for cost in costs:
        cores = f"{cost.count} {cost.tensor_cores}" if cost.count else ""
        numbers = (cost.warps, cost.registers, cost.stack, cost.shared, cost.programs)
        loads = ", ".join(f"{width}x{count}" for width, count in cost.loads.items())
        loop = (str(cost.products), f"{cost.others:.1f}") if cost.products else ("", "")
        style = "red" if cost.fault(spills) else ""
        table.add_row(
            cost.case, f"sm_{cost.arch}", *map(str, numbers), loads, cores, *loop, style=style
        )
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    console.print("sm_75 and older: torch's own kernels, as Triton has no tensor-core code there")
    console.print(f"compiled by Triton {triton.__version__}")


def main(package: str = "sana_cli.kernels") -> int:
    known = [major * 10 + minor for major, minor in SHARED]
    parser = argparse.ArgumentParser(f"python -m {package}.aot", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", choices=known, default=known)
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--json", action="store_true")
    # The ptxas of older versions gives up a few registers where one more program then fits.
    parser.add_argument(
        "--spills", type=int, default=0, help="bytes of registers per thread that may spill"
    )
    options = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)  # the interpreter compiles nothing
    costs = measure_all(package, options.arch, options.jobs)
    if options.json:
        rows = [
            asdict(c) | {"programs": c.programs, "fault": c.fault(options.spills)} for c in costs
        ]
        sys.stdout.write(json.dumps(rows, indent=2) + "\n")
    else:
        show(costs, options.spills)
    faults = [(cost, cost.fault(options.spills)) for cost in costs]
    faulty = [(cost, fault) for cost, fault in faults if fault]
    for cost, fault in faulty:
        sys.stderr.write(f"error: {cost.case} on sm_{cost.arch} {fault}\n")
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
