"""What only many requests show: fuzzed ones, 50 clients at once, and a thousand in a row."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest

from servers import TINY

pytestmark = pytest.mark.exhaustive
LORAS = Path(__file__).resolve().parents[2] / "benchmarks" / "gallery"

HOOKS = """
import schemathesis

@schemathesis.hook
def before_call(context, case, kwargs):
    body = case.body
    if isinstance(body, dict) and isinstance(body.get("prompt"), str):
        body["dry_run"] = True  # resolved to the end; a thousand steps say nothing more
        if isinstance(body.get("lora"), list) and body["lora"]:
            body["lora"][0] = "blueprint:0.5"  # a name that is offered, beside those that are not
"""


def test_no_request_that_the_description_allows_or_forbids_is_a_5xx(serving, tmp_path):
    (tmp_path / "hooks.py").write_text(HOOKS)
    with serving("-m", "demo", "--loras", str(LORAS)) as served:
        command = [
            str(Path(sys.executable).with_name("schemathesis")),
            *("run", f"{served.url}/openapi.json", "--checks", "not_a_server_error"),
            *("--max-examples", "100", "--request-timeout", "120", "--no-color"),
        ]
        more = {"SCHEMATHESIS_HOOKS": "hooks", "PYTHONPATH": str(tmp_path)}
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | more
        )
        assert done.returncode == 0, done.stdout[-4000:]
        assert served.client.get("/health").status_code == 200


def test_fifty_clients_at_once_lose_nothing(serving):
    with serving("-m", "demo", "--queue", "50") as served:
        url = f"{served.url}/v1/images/generations"

        def ask(seed: int) -> tuple[int, int]:
            answer = httpx2.post(url, json=TINY | {"seed": seed}, timeout=600)
            return answer.status_code, answer.json()["data"][0]["seed"]

        with ThreadPoolExecutor(50) as pool:
            assert list(pool.map(ask, range(50))) == [(200, seed) for seed in range(50)]


def test_a_thousand_requests_hold_no_more_memory_than_two_hundred(serving):
    with serving("-m", "demo") as served:

        def resident_after(count: int) -> float:
            for seed in range(count):
                assert served.draw(seed=seed).status_code == 200
            return served.metric("process_resident_memory_bytes")

        filled = resident_after(200)  # the gallery holds its hundred images
        grown = resident_after(800) - filled
        assert grown < 8e6, f"{grown / 1e6:.1f} MB"
