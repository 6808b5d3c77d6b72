"""A `sana serve` of its own process, as a user would start it."""

import os
import subprocess
from collections.abc import Iterator

import httpx2
import pytest

from servers import Served


@pytest.fixture(scope="session")
def serving(program, tmp_path_factory):
    """Start servers: `with serving("-m", "demo") as served`."""
    from contextlib import contextmanager

    @contextmanager
    def start(
        *words: str, token: str | None = None, stderr: int | None = None, **environment: str
    ) -> Iterator[Served]:
        folder = tmp_path_factory.mktemp("served")
        log = folder / "log"
        command = [program, "serve", "--port", "0", *words]
        more = {"SANA_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1"} | environment
        more |= {"SANA_TOKEN": token} if token else {}
        with log.open("w") as err:
            process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=stderr or err,
                text=True,
                env=os.environ | more,
            )
        try:
            url = process.stdout.readline().strip()
            assert url.startswith("http"), log.read_text()
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            with httpx2.Client(base_url=url, headers=headers, timeout=300) as client:
                yield Served(process, url, log, client)
        finally:
            process.kill()
            process.wait()
            process.stdout.close()

    return start


@pytest.fixture(scope="session")
def served(serving) -> Iterator[Served]:
    """One of `demo` for all tests that leave it as it was."""
    with serving("-m", "demo") as one:
        yield one
