"""Who is let in, and what a stranger can send."""

import io
import json
import re
import signal
import socket
import struct
import threading
import zlib

import httpx2
import pytest
import uvicorn
from PIL import Image

from sana_cli.server import security
from sana_cli.server.security import Guard, PatientProtocol, host_name, is_loopback

TOKEN = "correct-horse-battery-staple"


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("127.0.0.1", True),
        ("localhost:80", True),
        ("[::1]:7262", True),
        ("192.168.1.5:7262", True),
        ("evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("localhost.evil.example", False),
        ("localhost@evil.example", False),
        ("[::1", False),
        ("", False),
    ],
)
def test_the_name_of_another_site_is_not_answered_to(served, host, allowed):
    answer = served.client.get("/health", headers={"Host": host})
    assert answer.status_code in ((200,) if allowed else (400, 421))


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://[", "http://127.0.0.1"])
def test_a_page_of_another_site_cannot_ask(served, origin):
    headers = {"Origin": origin, "Content-Type": "text/plain"}
    answer = served.client.post("/v1/images/generations", content="{}", headers=headers)
    assert answer.status_code == 403
    assert (
        "access-control-allow-origin" not in served.client.get("/health", headers=headers).headers
    )


def test_an_origin_that_is_named_may_ask(serving):
    with serving("-m", "demo", "--allow-origin", "https://friend.example", token=TOKEN) as served:
        headers = {"Origin": "https://friend.example"}
        asked = {"Access-Control-Request-Method": "POST"} | headers
        before = httpx2.options(f"{served.url}/v1/images/generations", headers=asked)
        assert before.headers["access-control-allow-origin"] == "https://friend.example"
        answer = served.client.post("/v1/images/generations", json={}, headers=headers)
        assert answer.status_code == 400
        assert served.stop(signal.SIGINT) == 130


def test_a_token_is_asked_for_where_there_is_one(serving):
    with serving("-m", "demo", "--host", "0.0.0.0") as served:
        made = re.search(r"token: (\S+)", served.log.read_text())[1]
        assert len(made) > 40
        url = served.url.replace("0.0.0.0", "127.0.0.1")
        for words in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": made}):
            for path in ("/v1/models", "/v1/images", "/metrics", "/v1/jobs"):
                answer = httpx2.get(f"{url}{path}", headers=words)
                assert answer.status_code == 401
                assert answer.json()["error"]["code"] == "invalid_api_key"
        right = {"Authorization": f"Bearer {made}"}
        assert httpx2.get(f"{url}/v1/models", headers=right).status_code == 200
        assert httpx2.get(f"{url}/health").status_code == 200


def test_a_token_that_can_be_guessed_is_refused(process, monkeypatch, tmp_path):
    monkeypatch.setenv("SANA_TOKEN", "secret")
    run = process("serve", "-m", "demo", "--port", "0")
    assert run.returncode == 2
    assert b"SANA_TOKEN holds no token of 16 or more" in run.stderr
    (tmp_path / "token").write_text("\n")
    run = process("serve", "-m", "demo", "--token-file", str(tmp_path / "token"))
    assert (run.returncode, run.stdout) == (2, b"")


POST = b"POST /v1/images/generations HTTP/1.1\r\nHost: 127.0.0.1\r\n"


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01 a TLS client",
        POST + b"Content-Length: x\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\nnot a length\r\n",
        b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n;\r\n",
        b"HEAD / HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n;\r\n",
    ],
    ids=["no request", "headers", "body", "body that nobody reads", "HEAD"],
)
def test_what_is_not_http_gets_one_answer_and_no_traceback(served, data):
    with socket.create_connection(served.address, 30) as line:
        line.sendall(data)
        head, _, body = b"".join(iter(lambda: line.recv(4096), b"")).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    if not data.startswith(b"HEAD"):  # whose answers have no body
        assert json.loads(body)["error"]["message"] == "the request is not HTTP"
    assert served.client.get("/health").status_code == 200
    assert "Traceback" not in served.log.read_text()


def bomb() -> bytes:
    """A PNG of 20000x20000 pixels in a few hundred bytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + check

    header = struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0)
    rest = chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + rest


def picture(format: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, format)
    return file.getvalue()


@pytest.mark.parametrize(
    ("files", "status", "says"),
    [
        ({"image": bomb()}, 400, "more than 40 million pixels"),
        ({"image": b""}, 400, "cannot be read"),
        ({"image": b"GIF89a"}, 400, "cannot be read"),
        ({"image": picture("TIFF")}, 400, "send one of PNG"),
        ({"image": picture("PNG")[:60]}, 400, "cannot be read"),
        ({"image": picture("PNG"), "mask": bomb()}, 400, "more than 40 million pixels"),
        ({"image": picture("PNG"), "mask": picture("PNG")}, 400, "repaints nothing"),
        ({"image": picture("PNG"), "lora": b"x"}, 400, "no image is taken as 'lora'"),
        ({"image": ("../../etc/passwd\r\n\x1b[31m", b"x")}, 400, "cannot be read"),
    ],
    ids=["bomb", "nothing", "gif", "tiff", "cut", "mask", "black", "unknown", "name"],
)
def test_uploads_are_checked_before_they_are_decoded(served, files, status, says):
    data = {"prompt": "a", "steps": "1", "size": "256x256"}
    answer = served.client.post("/v1/images/edits", data=data, files=files)
    assert answer.status_code == status
    assert says in answer.json()["error"]["message"]


def test_an_upload_grows_no_further_than_an_upload_may_be(served):
    data = {"prompt": "a", "steps": "1", "outpaint": "3200", "dry_run": "true"}
    answer = served.client.post("/v1/images/edits", data=data, files={"image": picture("PNG")})
    assert answer.status_code == 400
    assert "to 6464x6464 pixels; at most 40 million" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[" * 100_000,
        b"null",
        b'{"prompt": NaN}',
        b'{"prompt": "a", "guidance_scale": Infinity}',
        b'{"prompt": "a", "guidance_scale": 1e999}',
        b'{"prompt": "a", "seed": ' + b"9" * 4000 + b"}",
        b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": "\\ud800"}',
        b'{"\\ud800": 1, "prompt": "a"}',
        b'{"prompt": "a", "steps": 1e400}',
        b'{"prompt": "a", "steps": true}',
        b'{"prompt": {"a": "b"}}',
        b"\xff\xfe",
        b'{"prompt": "a", "__proto__": 1}',
    ],
    ids=lambda body: repr(body[:30]),
)
def test_a_bad_document_is_a_400(served, body):
    for path in ("generations", "edits"):
        headers = {"Content-Type": "application/json"}
        answer = served.client.post(f"/v1/images/{path}", content=body, headers=headers)
        assert answer.status_code == 400
        assert answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "kind", ["", "multipart/form-data", "text/plain", "multipart/form-data; boundary=x"]
)
def test_a_bad_form_is_refused(served, kind):
    answer = served.client.post(
        "/v1/images/edits", content=b"--x\r\nnonsense", headers={"Content-Type": kind}
    )
    assert answer.status_code in (400, 415)
    assert answer.json()["error"]["message"]


def test_a_body_that_is_too_large_is_not_read(served):
    announced = {"Content-Length": str(1 << 40), "Content-Type": "application/json"}
    for path in ("generations", "edits"):
        with socket.create_connection(served.address) as connection:
            head = "".join(f"{name}: {value}\r\n" for name, value in announced.items())
            text = f"POST /v1/images/{path} HTTP/1.1\r\nHost: localhost\r\n{head}\r\n"
            connection.sendall(text.encode())
            assert connection.recv(100).startswith(b"HTTP/1.1 413")

    def endless():
        for _ in range(100):
            yield b" " * 65536

    answer = served.client.post(
        "/v1/images/generations", content=endless(), headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 413


def test_nothing_of_a_request_reaches_the_log_unescaped(served):
    path = "/%1b%5b31m%0d%0aevil%20line/[red]x[/red]"
    assert served.client.get(path).status_code == 404
    lines = served.log.read_text().splitlines()
    (line,) = (line for line in lines if "evil" in line)
    assert "\\x1b[31m\\r\\nevil line/[red]x[/red] 404" in line


def test_a_word_of_a_stranger_is_no_label_of_a_count(served):
    assert served.client.request("STRANGE", "/health").status_code == 405
    assert served.client.get("/strange").status_code == 404
    assert "strange" not in served.client.get("/metrics").text.lower()


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/v1/models/../x",
        "/static-offline-docs/../../__init__.py",
        "/static-offline-docs/%2e%2e/core.py",
        "/v1/images/..%2f..%2fx/content",
    ],
)
def test_no_path_of_the_disk_is_reachable(served, path):
    with socket.create_connection(served.address) as connection:
        connection.sendall(
            f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
        )
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.startswith((b"HTTP/1.1 404", b"HTTP/1.1 405"))
    assert b"root:" not in answer and b"import" not in answer


def test_every_answer_forbids_what_a_browser_might_do(served):
    for path in ("/health", "/", "/docs", "/nope", "/v1/models"):
        headers = served.client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert re.fullmatch(r"[0-9a-f]{16}", headers["x-request-id"])
    page = served.client.get("/")
    nonce = re.search(r"script-src 'nonce-([\w-]+)'", page.headers["content-security-policy"])[1]
    assert f'nonce="{nonce}"' in page.text
    assert "http" not in re.sub(r"http://www.w3.org/\S+|\{url\}", "", page.text)


@pytest.fixture
def patient(monkeypatch):
    """An application behind the guard and the protocol, with little patience; its address."""
    monkeypatch.setattr(security, "HEADER_SECONDS", 0.3)
    monkeypatch.setattr(security, "CHUNK_SECONDS", 0.3)
    monkeypatch.setattr(security, "STALLED_SECONDS", 0.3)

    async def app(scope, receive, send):
        if scope["path"] == "/read":
            try:
                while (await receive()).get("more_body"):
                    pass
                status = 200
            except Exception as error:
                status = error.status_code
            await send({"type": "http.response.start", "status": status, "headers": []})
            await send({"type": "http.response.body", "body": b""})
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(400 if scope["path"] == "/large" else 0):
            await send({"type": "http.response.body", "body": bytes(1 << 20), "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    config = uvicorn.Config(
        Guard(app, None, (), ()), port=0, http=PatientProtocol, lifespan="off", log_config=None
    )
    server = uvicorn.Server(config)
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    yield listener.getsockname()
    server.force_exit = server.should_exit = True
    thread.join(30)


def answer_to(connection: socket.socket, request: bytes) -> bytes:
    """Send a request; the bytes of its answer, whose body comes in chunks."""
    connection.sendall(request)
    answer = b""
    while not answer.endswith(b"0\r\n\r\n"):
        answer += connection.recv(1000)
    return answer


def test_slow_headers_are_hung_up_on(patient):
    with socket.create_connection(patient, timeout=60) as connection:
        connection.sendall(b"GET /read HTTP/1.1\r\nHost: localhost\r\nX-")
        assert connection.recv(10) == b""


def test_slow_second_headers_are_hung_up_on(patient):
    with socket.create_connection(patient, timeout=60) as connection:
        answer = answer_to(connection, b"GET /read HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 200")
        connection.sendall(b"GET /read HTTP/1.1\r\nX-")
        assert connection.recv(1000) == b""


def test_a_slow_body_that_nobody_reads_is_hung_up_on(patient):
    with socket.create_connection(patient, timeout=10) as connection:
        request = b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n"
        answer_to(connection, request)
        connection.sendall(b"{")  # which ends the wait of uvicorn for a second request
        assert connection.recv(1000) == b""


def test_a_slow_body_is_408(patient):
    with socket.create_connection(patient, timeout=60) as connection:
        connection.sendall(
            b"POST /read HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{"
        )
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")


def test_an_answer_that_nobody_reads_is_given_up(patient):
    with socket.create_connection(patient, timeout=60) as connection:
        connection.sendall(b"GET /large HTTP/1.1\r\nHost: localhost\r\n\r\n")
        threading.Event().wait(1.5)
        received = 0
        try:
            while part := connection.recv(1 << 20):
                received += len(part)
        except ConnectionError:
            pass
        assert received < 400 << 20


def test_hosts_are_told_apart():
    assert host_name("EXAMPLE.org.:80") == "example.org"
    assert is_loopback("127.0.0.1") and is_loopback("::1") and is_loopback("localhost")
    assert not is_loopback("0.0.0.0") and not is_loopback("example.org")
