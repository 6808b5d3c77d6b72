"""`sana serve -m demo`: the cost of a warm image, 50 clients at once, memory over 1,000 requests.

    OMP_NUM_THREADS=1 python benchmarks/serve.py --save benchmarks/serve.json

*Warm*: images of 256² and the model's own 20 steps. A cold `sana generate`, a `sana generate
--server` of one image and of MANY, and a plain HTTP request take turns. What the server computed
for each is the growth of its own `sana_stage_seconds_total`, so load of the machine slows both
alike; the cold one is compared with the computation of the request.
*Clients*: 50 threads ask at once, each for a seed of its own, and compare what comes.
*Memory*: requests of one step, one after the other, each of another prompt and seed; the resident
memory of the server is that of its `/metrics`.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx2

SANA = str(Path(sys.executable).with_name("sana"))
PROMPT = "a red circle on a blue background"
SIZE = "256x256"
MANY = 20  # images of one process
CLIENTS = 50
WATCHED = (100, 200, 400, 600, 800, 1000)  # requests after which memory is read


@contextmanager
def serving(*words: str) -> Iterator[httpx2.Client]:
    with tempfile.TemporaryDirectory() as cache:
        process = subprocess.Popen(
            [SANA, "serve", "-m", "demo", "--port", "0", "--device", "cpu", "-q", *words],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"SANA_CACHE_DIR": cache},
        )
        assert process.stdout
        url = process.stdout.readline().strip()
        try:
            with httpx2.Client(base_url=url, timeout=600, trust_env=False) as client:
                yield client
        finally:
            process.terminate()
            process.wait()
            process.stdout.close()


def metric(client: httpx2.Client, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return sum(
        float(line.split()[-1]) for line in lines if line.startswith((f"{name} ", f"{name}{{"))
    )


def draw(client: httpx2.Client, **fields: object) -> httpx2.Response:
    body = {"prompt": PROMPT, "size": SIZE, "seed": 7} | fields
    return client.post("/v1/images/generations", json=body)


def generate(folder: str, *words: str) -> float:
    """Seconds of a process of `sana generate`."""
    command = [SANA, "generate", PROMPT, "-m", "demo", "-r", SIZE, "-s", "7", "-f", "-q", *words]
    began = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def warm(rounds: int) -> dict:
    rows = []
    with serving() as client, tempfile.TemporaryDirectory() as folder:

        def request() -> float:
            began = time.perf_counter()
            draw(client).raise_for_status()
            return time.perf_counter() - began

        server = ("--server", str(client.base_url))
        ways = {
            "through": lambda: generate(folder, *server),
            "many": lambda: generate(folder, *server, "-n", str(MANY)),
            "request": request,
        }
        draw(client)  # loads the networks, and fills the text cache
        for _ in range(rounds):
            row = {"cold": generate(folder, "--device", "cpu")}
            for name, way in ways.items():
                before = metric(client, "sana_stage_seconds_total")
                row[name] = way()
                row[f"{name}_computed"] = metric(client, "sana_stage_seconds_total") - before
            row["cold_computed"] = row["request_computed"]
            rows.append(row)
    seconds = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    ratios = {
        name: statistics.median(row[name] / row[f"{name}_computed"] for row in rows)
        for name in ("cold", *ways)
    }
    return {"rounds": rounds, "many": MANY, "seconds": seconds, "ratios": ratios, "raw": rows}


def clients() -> dict:
    with serving("--queue", str(CLIENTS)) as client:
        url = str(client.base_url).rstrip("/")

        def ask(seed: int) -> bool:
            answer = httpx2.post(
                f"{url}/v1/images/generations",
                json={"prompt": PROMPT, "size": SIZE, "seed": seed, "steps": 1},
                timeout=600,
                trust_env=False,
            )
            return answer.status_code == 200 and answer.json()["data"][0]["seed"] == seed

        with ThreadPoolExecutor(CLIENTS) as pool:
            answered = sum(pool.map(ask, range(CLIENTS)))
    return {"clients": CLIENTS, "answered": answered}


def memory() -> dict:
    resident = {}
    with serving() as client:
        for number in range(1, max(WATCHED) + 1):
            prompt = f"{PROMPT}, number {number}"
            draw(client, steps=1, prompt=prompt, seed=number).raise_for_status()
            if number in WATCHED:
                resident[str(number)] = metric(client, "process_resident_memory_bytes")
                sys.stdout.write(f"{number} requests: {resident[str(number)] / 1e6:.1f} MB\n")
                sys.stdout.flush()
    return {"resident": resident}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--parts", nargs="+", choices=("warm", "clients", "memory"))
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    report: dict = {}
    if options.save and options.save.exists():
        report = json.loads(options.save.read_text())
    report |= {
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
    }
    parts = {"warm": lambda: warm(options.rounds), "clients": clients, "memory": memory}
    for name in options.parts or parts:
        report[name] = parts[name]()
        if options.save:
            options.save.write_text(json.dumps(report, indent=1) + "\n")
    sys.stdout.write(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
