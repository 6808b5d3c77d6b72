"""`--server`: the same files from a warm server as from a cold process."""

import base64
import json
import re
import signal
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from subprocess import PIPE

import numpy as np
import pytest
from PIL import Image

from examples import exhaustive
from recipes import RECIPE

PROMPT = "a red circle on a blue background"
FAST = ("-m", "demo", "-r", "256", "--steps", "2")


@pytest.mark.parametrize(
    "words",
    [
        ("-s7", "-n2"),
        ("-s1", "-r", "200x180", "--metadata", "none"),
        *(
            pytest.param(words, marks=pytest.mark.exhaustive)
            for words in (
                ("-s7", "--negative", "green", "-g", "3", "--solver", "flow-euler"),
                ("-s1", "--format", "webp", "--quality", "60"),
                ("-s1", "--image", "in.bmp", "--strength", "0.5"),
            )
        ),
        ("-s1", "--image", "in.png", "--mask", "alpha"),
    ],
    ids=lambda words: " ".join(words),
)
def test_generate_writes_the_same_files(sana, served, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64), (200, 60, 30)).save("in.bmp")
    pixels = np.full((256, 256, 4), 200, np.uint8)
    pixels[:80, :, 3] = 0
    Image.fromarray(pixels).save("in.png")
    here = sana("generate", PROMPT, "a star", *FAST, *words, "-o", "here/")
    there = sana(
        "generate", PROMPT, "a star", *FAST, *words, "-o", "there/", "--server", served.url
    )
    assert (here.code, there.code) == (0, 0), here.err + there.err
    assert here.out.replace("here/", "there/") == there.out
    files = sorted(path.name for path in (tmp_path / "here").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "there").iterdir())
    for name in files:
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()


def test_a_batch_writes_the_same_files_and_goes_on(sana, served, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": "a red star"}, {"prompt": "a ring", "steps": 1}, {"prompt": "a", "steps": 0}]
    (tmp_path / "jobs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    monkeypatch.setenv("SANA_SERVER", served.url)
    there = sana("batch", "jobs.jsonl", *FAST, "-o", "there/")
    monkeypatch.delenv("SANA_SERVER")
    here = sana("batch", "jobs.jsonl", *FAST, "-o", "here/")
    assert (here.code, there.code) == (0, 0), here.err + there.err
    for path in (tmp_path / "here").glob("*.png"):
        assert path.read_bytes() == (tmp_path / "there" / path.name).read_bytes()
    again = sana("batch", "jobs.jsonl", *FAST, "-o", "there/", "--server", served.url)
    assert "0 to draw" in again.err
    assert again.code == 0


def warnings(err: str) -> list[str]:
    return [line for line in err.splitlines() if line.startswith("warning:")]


def test_words_that_a_model_does_not_know_are_warned_of_as_on_one_machine(
    sana, served, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("jobs.txt").write_text("a red star\na dragon\na dragon in a city\n")
    words = (*FAST, "--negative", "blurry")
    for call in (("generate", "a red star", "a dragon"), ("batch", "jobs.txt")):
        here = sana(*call, *words, "-o", "here/")
        there = sana(*call, *words, "-o", "there/", "--server", served.url)
        (warning,) = warnings(here.err)
        assert '"dragon"' in warning and '"blurry"' in warning
        assert warnings(there.err) == [warning]


def test_the_client_imports_nothing_heavy(served, tmp_path):
    code = f"""
import sys
sys.argv = ["sana", "generate", "a star", *{FAST!r}, "--server", {served.url!r}, "-o", "a.png"]
from sana_cli.app import main
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
found = {{"torch", "transformers", "numpy", "PIL", "huggingface_hub"}} & sys.modules.keys()
assert not found, found
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.png").is_file()


def test_the_json_document_has_the_stages_of_the_server(sana, served, tmp_path):
    words = (*FAST, "-s7", "-o", f"{tmp_path}/a.png", "--json", "--server", served.url)
    document = json.loads(sana("generate", PROMPT, *words).out)
    assert document["images"][0]["seed"] == 7
    assert document["seconds"]["denoise"] > 0
    assert document["seconds"]["decode"] > 0


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("-m", "nope"), 2, "offers no model 'nope'"),
        (("-m", "sana-0.6b-512"), 5, "offers no model 'sana-0.6b-512'"),
        (("-m", "demo", "--negative", "x", "-g", "1"), 2, "--negative has no effect"),
        (("-m", "demo", "--memory", "6GB"), 2, "--memory has no effect with --server"),
        (("-m", "demo", "--dry-run"), 2, "--dry-run shows the plan of this machine"),
    ],
)
def test_errors_are_those_of_the_command(sana, served, words, code, says):
    run = sana("generate", PROMPT, *words, "--server", served.url)
    assert run.code == code
    assert says in run.err
    assert len([line for line in run.err.splitlines() if line.startswith("error: ")]) == 1


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "127.0.0.1:7262", "http://[::1", "ftp://x"])
def test_a_server_that_is_not_there_is_one_line(sana, url):
    run = sana("generate", PROMPT, "--server", url)
    assert run.code in (1, 2)
    lines = run.err.splitlines()
    assert sum(line.startswith("error: ") for line in lines) == 1
    assert url in next(line for line in lines if line.startswith("error: "))


def test_a_server_that_dies_is_one_line(sana, serving, tmp_path):
    with serving("-m", "demo") as served:

        def kill() -> None:
            served.until(lambda: served.jobs())
            served.process.kill()

        threading.Thread(target=kill, daemon=True).start()
        words = ("-m", "demo", "--steps", "1000", "-o", f"{tmp_path}/a.png")
        run = sana("generate", PROMPT, *words, "--server", served.url)
    assert run.code == 1
    assert "went away before its answer was complete" in run.err
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize("number", [signal.SIGKILL, *exhaustive(signal.SIGTERM)])
def test_a_batch_goes_on_with_the_next_server(
    sana, serving, program, tmp_path, monkeypatch, number
):
    monkeypatch.chdir(tmp_path)
    Path("jobs.txt").write_text("".join(f"a star {i}\n" for i in range(8)))
    with serving("-m", "demo") as served:
        words = ("batch", "jobs.txt", *FAST, "-o", "there/", "--server", served.url)
        with subprocess.Popen([program, *words], stdout=PIPE, stderr=PIPE, text=True) as batch:
            assert batch.stdout.readline()
            served.process.send_signal(number)
            _, err = batch.communicate(timeout=60)
    assert batch.returncode == 1, err
    assert re.search(r"^\d drawn, \d left", err, re.MULTILINE)
    assert '"failed"' not in Path("there/manifest.jsonl").read_text()
    with serving("-m", "demo", "--port", str(served.address[1])):
        assert sana(*words).code == 0
    assert len(list(Path("there").glob("*.png"))) == 8


def test_an_answer_that_breaks_off_is_one_line(sana):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            line, _ = listener.accept()
            with line:
                line.recv(65536)
                line.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n{"object"')

        threading.Thread(target=answer, daemon=True).start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        run = sana("generate", PROMPT, *FAST, "--server", url)
    assert run.code == 1
    assert "went away before its answer was complete" in run.err


@pytest.fixture
def stranger():
    """The URL of a server that answers like ours but for the image, which is `sent` to it."""
    sent: list[bytes] = []
    document = {
        "recipes": [RECIPE.as_dict()],
        "model": {
            "name": "demo",
            "licence": "Apache-2.0",
            "source": "bundled",
            "vocabulary": None,
        },
        **{"device": "cpu", "torch": "2.13.0", "warnings": []},
    }

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer = json.dumps(document)
            if not body.get("dry_run"):
                image = json.dumps({"b64_json": base64.b64encode(sent[0]).decode()})
                answer = f"event: image_generation.completed\ndata: {image}\n\n"
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer.encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", sent
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("sent", "words", "says"),
    [
        (b"GIF89a", (), "does not answer as this version"),
        (b"\x89PNG\r\n\x1a\n", ("--format", "webp"), "sent an image that cannot be read"),
    ],
)
def test_what_is_no_image_is_not_written(sana, stranger, tmp_path, sent, words, says):
    url, answers = stranger
    answers.append(sent)
    run = sana("generate", RECIPE.prompt, *words, "--server", url, "-o", f"{tmp_path}/")
    assert run.code == 1
    assert says in run.err.splitlines()[-2] + run.err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_a_token_comes_from_the_environment(sana, serving, tmp_path, monkeypatch):
    token = "correct-horse-battery-staple"
    with serving("-m", "demo", token=token) as served:
        words = ("generate", PROMPT, *FAST, "-o", f"{tmp_path}/a.png", "--server", served.url)
        run = sana(*words)
        assert run.code == 1
        assert "wants a token" in run.err
        monkeypatch.setenv("SANA_TOKEN", token)
        assert sana(*words).code == 0
