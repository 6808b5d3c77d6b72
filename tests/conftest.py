"""Real parts for every test: a saved random model, the `sana` command, loopback nothing."""

import atexit
import gc
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, is_hypothesis_test, settings

# Last, and so behind everything installed: `training` is not part of the package.
sys.path.append(str(Path(__file__).resolve().parents[1]))

# Set before any import of the libraries that read them once.
os.environ["HF_HUB_OFFLINE"] = "0" if os.environ.get("SANA_TEST_WEIGHTS") == "pull" else "1"
os.environ["NO_COLOR"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

# Python's end looks for garbage among a million objects of the imports, which takes seconds. Called
# after what the libraries do at the end, as the first registered is called last.
IN_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if IN_WORKER:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # several workers share the cores
    atexit.register(os._exit, 0)
else:
    atexit.register(gc.unfreeze)  # or libraries in C++ tell of leaks

# Nor may a developer's own standing choices change what is tested: there is no such file. Which
# commits of released weights are here is no choice; the tests marked `weights` need it.
KEPT = ("SANA_TEST_WEIGHTS", "SANA_DATA_DIR")
for name in [name for name in os.environ if name.startswith("SANA_") and name not in KEPT]:
    del os.environ[name]
os.environ["SANA_CONFIG"] = f"{tempfile.gettempdir()}/sana-tests-{os.getpid()}/config.toml"


settings.register_profile(
    "default",
    settings(),
    max_examples=25,
    deadline=None,  # no test asserts a time
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.register_profile("exhaustive", settings.get_profile("default"), max_examples=100)
settings.register_profile("fuzz", settings.get_profile("default"), max_examples=3000)
ENDINGS = pytest.StashKey[dict[str, Counter[str]]]()  # by test


def is_exhaustive(config: pytest.Config) -> bool:
    return config.option.markexpr == "exhaustive"


def pytest_configure(config: pytest.Config) -> None:
    if not IN_WORKER and getattr(config.option, "numprocesses", None):
        return  # its workers test
    # Imports leave a million objects that stay: until they are all there, looking for garbage among
    # them takes a third of the time.
    gc.disable()
    import torch

    # Without a GPU Triton interprets its kernels: it decides so as it is first imported.
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    chosen = config.getoption("--hypothesis-profile")
    settings.load_profile(chosen or ("exhaustive" if is_exhaustive(config) else "default"))


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist, whose default is one worker for a core
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Three workers for two cores, as some tests wait for a process or a socket; not at full sizes.

    Each costs 10 s of imports.
    """
    return None if is_exhaustive(config) else (3 * (os.cpu_count() or 1) + 1) // 2


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let `-m exhaustive` run the tests of properties too, on more examples than otherwise."""
    if is_exhaustive(config):
        for item in items:
            if is_hypothesis_test(item.obj) or item.get_closest_marker("hypothesis"):
                item.add_marker("exhaustive")


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Print how many random inputs there were of each kind, and how they ended."""
    if config.getoption("--hypothesis-profile") != "fuzz":
        return
    counts = config.stash.get(ENDINGS, {})
    for name, endings in counts.items():
        told = ", ".join(f"{ending}: {count}" for ending, count in sorted(endings.items()))
        terminalreporter.write_line(f"{name}: {endings.total()} ({told})")
    terminalreporter.write_line(f"{sum(c.total() for c in counts.values())} inputs in all")


@pytest.fixture(autouse=True)
def cache(request, tmp_path_factory, monkeypatch) -> Path:
    """The folder of what is kept between runs: empty for every test, and never the user's.

    So is the folder of the weights' lock, except for tests of the released weights.
    """
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("SANA_CACHE_DIR", str(folder))
    if request.node.get_closest_marker("weights") is None:
        monkeypatch.setenv("SANA_DATA_DIR", str(folder / "data"))
    return folder


@pytest.fixture
def machine(monkeypatch) -> list[str]:
    """A machine of round rates and networks of round counts; lists what was measured or counted."""
    from sana_cli.bench import forecast, phases, roofline
    from sana_cli.bench.counted import Count

    asked: list[str] = []

    def given(module, name, value):
        monkeypatch.setattr(module, name, lambda *what: asked.append(name) or value)

    for module in (roofline, phases):
        given(module, "bandwidth", 1e10)
        given(module, "matrix_rate", 1e11)
    given(forecast, "count_step", Count(2e11, 1e9, 100, 4e8, 0))
    given(forecast, "count_image", Count(5e11, 1e9, 40, 3e8, 0))
    given(forecast, "count_decode", Count(1e12, 2e9, 50, 5e8, 0))
    return asked


@pytest.fixture
def no_hang():
    """Fail a test that hangs: it takes well under a second otherwise. Gives a function by which a
    test with many parts begins to count anew.

    pytest's failure is a BaseException: nothing in the command can take it for its own.
    """
    longest = 30  # seconds
    if not hasattr(signal, "SIGALRM"):  # Windows
        yield lambda: None
        return

    def stop(signum, frame):
        pytest.fail(f"still running after {longest} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(longest)
    yield lambda: signal.alarm(longest)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def count_ending(request) -> Callable[[str], None]:
    """Count how a random input of this test ended, for the log of a campaign."""
    counts = request.config.stash.setdefault(ENDINGS, {}).setdefault(request.node.name, Counter())
    return lambda ending: counts.update([ending])


@dataclass(frozen=True)
class Run:
    code: int
    out: str
    err: str


@pytest.fixture
def sana(capfd, monkeypatch):
    """Run the command in this process: `sana("generate", …)` -> exit code, stdout, stderr."""
    from sana_cli.app import main

    def run(*words: str) -> Run:
        monkeypatch.setattr(sys, "argv", ["sana", *words])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capfd.readouterr()
        return Run(stop.value.code or 0, out, err)

    return run


INSTALLED = Path(sys.executable).with_name("sana")


def run_by(command: Path) -> Callable[..., subprocess.CompletedProcess]:
    def run(*words: str, **options) -> subprocess.CompletedProcess:
        return subprocess.run([command, *words], capture_output=True, timeout=300, **options)

    return run


@pytest.fixture
def process(program):
    """Run the command in a process of its own, as a shell would."""
    return run_by(program)


@pytest.fixture
def new_interpreter():
    """The same, never forked: it imports everything, and reads its environment, anew."""
    return run_by(INSTALLED)


@pytest.fixture(scope="session")
def program(tmp_path_factory) -> Iterator[Path]:
    """The command; where there is fork, one that starts at once."""
    if not hasattr(os, "fork"):
        yield INSTALLED
        return
    folder = tmp_path_factory.mktemp("quick")
    forks, socket = Path(__file__).with_name("forks.py"), folder / "socket"
    command = folder / "sana"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -SE {forks} {socket} "$@"\n')
    command.chmod(0o755)
    words = [sys.executable, str(forks), str(socket)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stdin=subprocess.PIPE) as server:
        assert server.stdout.readline() == b"ready\n"
        yield command
        server.kill()


@pytest.fixture(scope="session")
def quick(program) -> Path:
    """A folder with a `sana` that starts at once, for tests that start many."""
    if program == INSTALLED:
        pytest.skip("needs fork")
    return program.parent


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A random model of native side 512, saved by diffusers. Copy it before changing it."""
    from reference import random_pipeline

    folder = tmp_path_factory.mktemp("models") / "tiny"
    random_pipeline(sample_size=16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_sprint(tmp_path_factory) -> Path:
    """The same of Sana-Sprint."""
    from reference import SPRINT, random_pipeline

    folder = tmp_path_factory.mktemp("models") / "tiny-sprint"
    random_pipeline(sample_size=16, **SPRINT).save_pretrained(folder)
    return folder
