"""Facts about this machine for `sana doctor`: plain data, None where unknown."""

import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Any

NAMED_INSTRUCTIONS = {
    "avx2": "AVX2",
    "fma3": "FMA",
    "avx512_f": "AVX-512",
    "avx512_bf16": "AVX-512 BF16",
    "avx512_vnni": "AVX-512 VNNI",
    "avx_vnni": "AVX VNNI",
    "amx_int8": "AMX INT8",
    "amx_bf16": "AMX BF16",
    "neon": "NEON",
    "bf16": "BF16",
    "i8mm": "I8MM",
    "sve": "SVE",
    "sve2": "SVE2",
}

# Of version 2 and 1 of control groups: the controller, which is also the folder of its groups, the
# files of the limit and of what is used, and in memory.stat the part of it that the kernel frees
# when memory is short.
CONTROL_GROUPS = (
    ("", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def system() -> dict[str, Any]:
    return {
        "os": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "python": platform.python_version(),
    }


def torch_build() -> dict[str, Any]:
    """Describe the build of torch. Raises anything if torch is missing or cannot be imported."""
    import torch

    cuda, rocm = torch.version.cuda, torch.version.hip
    build = f"CUDA {cuda}" if cuda else f"ROCm {rocm}" if rocm else "CPU"
    return {"version": torch.__version__, "build": build, "threads": torch.get_num_threads()}


def cpu() -> dict[str, Any]:
    """Describe the CPU: `instructions` that torch detects and that matter, `kernels` it uses."""
    import torch

    # Missing in the oldest supported torch.
    seen: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    found = [title for name, title in NAMED_INSTRUCTIONS.items() if seen.get(name)]
    return {
        "name": cpu_name() or seen.get("cpu_name") or platform.processor() or None,
        "cores": cores(),
        "instructions": found if seen else None,
        "kernels": torch.backends.cpu.get_cpu_capability(),
    }


def cores() -> int | None:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def cpu_name() -> str | None:
    """Return the name of the CPU; None where the system has no list of processors."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    name = re.search(r"^model name\s*:\s*(.+)$", lines, re.MULTILINE)
    return name[1].strip() if name else None


def memory(
    groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> dict[str, int | None]:
    """Return memory in bytes. `limit` is the least of a container, a job of SLURM or a unit of
    systemd, where it is below the total, and `limit_free` the least that is left of any of them."""
    total, available = _pages("SC_PHYS_PAGES"), _pages("SC_AVPHYS_PAGES")
    try:  # includes what the page cache can release
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        if match := re.search(r"MemAvailable:\s*(\d+) kB", text):
            available = int(match[1]) * 1024
    except OSError:
        pass
    limits, free = [], []
    for controller, bound, usage, released in CONTROL_GROUPS:
        for level in _levels(own, controller):
            group = groups / controller / level
            limit = _number(group / bound)
            if limit is not None and total and limit < total:
                unused = _number(group / "memory.stat", f"{released} ") or 0
                limits.append(limit)
                free.append(max(0, limit - (_number(group / usage) or 0) + unused))
    return {
        "total_bytes": total,
        "available_bytes": available,
        "limit_bytes": min(limits, default=None),
        "limit_free_bytes": min(free, default=None),
    }


def _levels(own: Path, controller: str) -> list[PurePosixPath]:
    """Return the paths of this process's control group and of all its parents, up to the root."""
    try:
        lines = os.fsdecode(own.read_bytes()).splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            level = PurePosixPath(path.lstrip("/"))
            return [level, *level.parents]
    return [PurePosixPath()]


def _number(path: Path, name: str = "") -> int | None:
    """Return the number on the first line that begins with a name; None where there is none."""
    try:
        match = re.search(rf"^{name}(\d+)$", path.read_text(encoding="ascii"), re.MULTILINE)
    except (OSError, ValueError):
        return None
    return int(match[1]) if match else None


def _pages(name: str) -> int | None:
    try:
        return os.sysconf(name) * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows; macOS does not report free pages
        return None


def devices() -> tuple[list[dict[str, Any]], str | None]:
    """List the devices besides the CPU, and why CUDA is not available where it should be."""
    import torch

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    reason = str(said[0].message).split("\n")[0] if said and not count else None
    if "CUDA_VISIBLE_DEVICES" in os.environ and not reason:
        reason = f"CUDA_VISIBLE_DEVICES is {os.environ['CUDA_VISIBLE_DEVICES']!r}"
    found: list[dict[str, Any]] = []
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        found.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "total_bytes": total,
                "free_bytes": free,
                "capability": f"{properties.major}.{properties.minor}",
                "bfloat16": (properties.major, properties.minor) >= (8, 0),  # as choose_dtypes
            }
        )
    if torch.backends.mps.is_available():
        found.append(
            {
                "device": "mps",
                "name": "Apple GPU",
                "total_bytes": torch.mps.recommended_max_memory(),
                "free_bytes": None,
                "capability": None,
                "bfloat16": False,
            }
        )
    return found, reason


def nvidia_driver() -> str | None:
    """Return the version of NVIDIA's driver, whether or not torch can use it."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
        if match := re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)", text):
            return match[1]
    except OSError:
        pass
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=2)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.split()
    return lines[0] if done.returncode == 0 and lines else None


def installed(*names: str) -> str | None:
    """Return the version of the first installed one of these distributions, without importing."""
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def triton() -> str | None:
    """Return the version of Triton, whatever its distribution is called on this platform."""
    return installed("triton", "triton-windows", "pytorch-triton")


def free_bytes(path: Path) -> int | None:
    """Return the free bytes on the disk that would hold `path`, which need not exist."""
    try:
        return shutil.disk_usage(_existing(path)).free
    except OSError:
        return None


def makes_symlinks(path: Path) -> bool | None:
    """Whether the file system that would hold `path` has symbolic links; None if unwritable."""
    import tempfile

    try:
        with tempfile.TemporaryDirectory(prefix=".sana-", dir=_existing(path)) as folder:
            try:
                os.symlink("target", os.path.join(folder, "link"))
            except (OSError, NotImplementedError):
                return False
            return True
    except OSError:
        return None


def _existing(path: Path) -> Path:
    while not path.is_dir() and path != path.parent:
        path = path.parent
    return path


def image_protocol(environment: Mapping[str, str], is_terminal: bool) -> tuple[str | None, str]:
    """Return the terminal's image protocol ("kitty", "iterm2", "sixel" or None) and the evidence.

    Only the environment is read: a query to the terminal could leave its answer in the shell.
    """
    if not is_terminal:
        return None, "stdout is not a terminal"
    term = environment.get("TERM", "")
    program = environment.get("TERM_PROGRAM", "")
    # A multiplexer hides the terminal, and the variables it inherited may be out of date.
    if environment.get("TMUX") or environment.get("STY") or term.startswith(("tmux", "screen")):
        return None, "inside tmux or screen, which do not pass images on"
    if "kitty" in term or "ghostty" in term:
        return "kitty", f"TERM is {term}"
    if environment.get("KITTY_WINDOW_ID"):
        return "kitty", "KITTY_WINDOW_ID is set"
    if environment.get("KONSOLE_VERSION", "").isdigit():
        if int(environment["KONSOLE_VERSION"]) >= 220400:
            return "kitty", "KONSOLE_VERSION is 220400 or newer"
        return None, "this Konsole is older than 22.04"
    if program in ("iTerm.app", "WezTerm", "mintty"):
        return "iterm2", f"TERM_PROGRAM is {program}"
    if environment.get("LC_TERMINAL") == "iTerm2":  # carried through ssh
        return "iterm2", "LC_TERMINAL is iTerm2"
    if term.startswith(("foot", "mlterm", "contour", "yaft")) or "sixel" in term:
        return "sixel", f"TERM is {term}"
    return None, f"TERM is {term or 'not set'}, and no other variable names a protocol"


def spills_into_ram(facts: dict[str, Any]) -> bool:
    """Whether the NVIDIA driver may move memory of a full GPU into RAM, which is very slow."""
    return sys.platform == "win32" or "microsoft" in facts["os"].lower()


def power(root: Path = Path("/sys")) -> dict[str, Any]:
    """Return power settings that may slow this machine: `on_battery`, the CPU's `governor`, and
    the firmware's `profile`. Linux only; None where unknown."""

    def read(path: str) -> str | None:
        try:
            return (root / path).read_text(encoding="utf-8").strip()
        except OSError:
            return None

    batteries = [
        read(f"class/power_supply/{supply.name}/status")
        for supply in (root / "class" / "power_supply").glob("*")
        if read(f"class/power_supply/{supply.name}/type") == "Battery"
        and read(f"class/power_supply/{supply.name}/scope")
        != "Device"  # the battery of a mouse, for example
    ]
    cpu = "devices/system/cpu/cpu0/cpufreq"
    return {
        "on_battery": "Discharging" in batteries if batteries else None,
        "governor": read(f"{cpu}/scaling_governor"),
        "frequency_driver": read(f"{cpu}/scaling_driver"),
        "profile": read("firmware/acpi/platform_profile"),
    }


def saving_power(facts: Mapping[str, Any]) -> list[str]:
    """Name the settings in `power` that probably slow everything down."""
    found = []
    if facts["on_battery"]:
        found.append("it runs on battery")
    # With the p-state drivers "powersave" is the usual name of full speed on demand.
    if facts["governor"] == "powersave" and "pstate" not in (facts["frequency_driver"] or ""):
        found.append("the CPU's governor is powersave")
    if facts["profile"] in ("low-power", "quiet", "cool"):
        found.append(f"the power profile is {facts['profile']}")
    return found


def nvidia_state(index: int) -> dict[str, float] | None:
    """Return the driver's readings for a GPU, by its index in torch: watts allowed and used, MHz
    now and at most, °C."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    names = ("power.limit", "power.draw", "clocks.sm", "clocks.max.sm", "temperature.gpu")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    which = visible[index].strip() if index < len(visible) and visible[index].strip() else index
    query = [program, f"--id={which}", f"--query-gpu={','.join(names)}"]
    try:
        done = subprocess.run(
            [*query, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = {}
    for name, value in zip(names, done.stdout.split(","), strict=False):
        with suppress(ValueError):  # laptops may not report a power limit
            found[name] = float(value)
    return found if done.returncode == 0 else None
