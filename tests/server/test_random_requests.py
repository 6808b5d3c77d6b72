"""Requests made at random: answered or refused in OpenAI's shape, and the server stays."""

import base64
import io
import json
import socket
from http.client import HTTPException, HTTPResponse

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sana_cli.server.fields import request_model, uploads

FUZZ = settings(max_examples=max(1, settings.default.max_examples // 4), database=None)
PATIENCE = 5  # seconds for an answer; of a broken request the server waits for the rest
ANSWERS = {200, 204, 307, 400, 401, 403, 404, 405, 408, 411, 413, 415, 421, 422, 429}
TEXT = st.text(max_size=12)
FIELDS = st.sampled_from([*request_model().model_fields, *uploads()])
SCALARS = TEXT | st.none() | st.booleans() | st.integers() | st.floats()
LIKELY = st.sampled_from(
    ["demo", "256x256", "auto", "high", "png", "jpeg", "webp", "b64_json", "1:1", 0, 1, 2, 3, 4.5]
)
VALUES = st.recursive(
    LIKELY | SCALARS,
    lambda one: st.lists(one, max_size=3) | st.dictionaries(TEXT, one, max_size=2),
    max_leaves=5,
)
# Resolved to the end; a thousand drawn images would say nothing more.
RIGHT = {"prompt": "a star", "dry_run": True, "size": "256x256", "steps": 1}

SCHEMA = request_model().model_json_schema()["properties"]


def right_values(name: str) -> st.SearchStrategy:
    """What the description of the API allows for a field."""
    pools = []
    for one in SCHEMA[name].get("anyOf", [SCHEMA[name]]):
        if "enum" in one or "const" in one:
            pools.append(st.sampled_from(one.get("enum") or [one["const"]]))
        elif one.get("type") == "boolean":
            pools.append(st.booleans())
        elif one.get("type") in ("integer", "number"):
            low, high = one.get("minimum", 0), one.get("maximum", 99)
            pools.append(st.sampled_from([low, high, 1, low + (high - low) // 2]))
    return st.one_of(pools) if pools else LIKELY


FIELD = st.sampled_from(sorted(SCHEMA)).flatmap(
    lambda name: st.tuples(st.just(name), right_values(name))
)
DOCUMENTS = (
    st.lists(FIELD, max_size=4).map(dict) | st.dictionaries(FIELDS | TEXT, VALUES, max_size=4)
).map(lambda fields: RIGHT | fields | {"dry_run": True})
JUNK = st.binary(max_size=40)


@pytest.fixture
def survives(served, no_hang, count_ending):
    """Send a request's bytes, and check the answer."""

    def run(data: bytes) -> None:
        no_hang()
        with socket.create_connection(served.address, PATIENCE) as line:
            try:
                line.sendall(data)
                answer = HTTPResponse(line)
                answer.begin()
                body = answer.read()
            except TimeoutError:
                count_ending("waits for more")
                return
            except (HTTPException, ConnectionError):
                count_ending("hung up")
                return
        count_ending(f"HTTP {answer.status}")
        assert answer.status in ANSWERS, body
        if answer.status >= 400 and not data.startswith(b"HEAD"):  # whose answers have no body
            error = json.loads(body)["error"]
            assert {"message", "type", "param", "code"} <= error.keys()
            assert error["message"] and "Traceback" not in error["message"]

    yield run
    assert served.client.get("/health").status_code == 200
    assert "Traceback" not in served.log.read_text()


def request(method: str, path: str, kind: str, body: bytes, *more: bytes) -> bytes:
    lines = [f"{method} {path} HTTP/1.1".encode(), b"Host: 127.0.0.1", b"Connection: close"]
    lines += [f"Content-Type: {kind}".encode(), b"Content-Length: %d" % len(body), *more]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def changed(draw, data: bytes) -> bytes:
    """Some bytes of it replaced, cut out or doubled."""
    data = bytearray(data)
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.integers(0, 20)))
        part = bytes(data[start:end])
        data[start:end] = draw(JUNK | st.just(b"") | st.just(part * 2))
    return bytes(data)


@pytest.mark.hypothesis
def test_a_random_document(survives):
    @FUZZ
    @given(DOCUMENTS | VALUES, st.sampled_from(["generations", "edits"]))
    def holds(document, path):
        body = json.dumps(document).encode()
        survives(request("POST", f"/v1/images/{path}", "application/json", body))

    holds()


def picture(format: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGBA", (64, 64), (9, 99, 9, 0)).save(file, format)
    return file.getvalue()


PICTURES = {one: picture(one) for one in ("PNG", "WEBP", "GIF")}
KINDS = st.sampled_from(
    ["application/json", "multipart/form-data", "multipart/form-data; boundary=", "text/plain", ""]
)


@st.composite
def damaged_documents(draw) -> tuple[str, bytes]:
    images = st.sampled_from(sorted(PICTURES)).map(lambda one: changed(draw, PICTURES[one]))
    fields = {name: base64.b64encode(draw(images)).decode() for name in draw(st.sets(FIELDS))}
    text = json.dumps(draw(DOCUMENTS) | fields | {"dry_run": True})
    encoding = draw(st.sampled_from(["utf-8", "utf-8", "utf-16", "utf-8-sig"]))
    kind = draw(st.just("application/json") | KINDS)
    return kind, changed(draw, text.encode(encoding))


@pytest.mark.hypothesis
def test_a_random_damage_to_a_document(survives):
    @FUZZ
    @given(damaged_documents(), st.sampled_from(["generations", "edits"]))
    def holds(made, path):
        kind, body = made
        survives(request("POST", f"/v1/images/{path}", kind, body))

    holds()


@st.composite
def forms(draw) -> bytes:
    """A form in parts, of which some may be damaged."""
    parts = [(b'name="prompt"', b"a star"), (b'name="dry_run"', b"true")]
    parts.append((b'name="image"; filename="a.png"', PICTURES["PNG"]))
    for name, value in draw(st.lists(FIELD, max_size=2)):
        parts.append((b'name="%s"' % name.encode(), str(value).encode()))
    for name in draw(st.just([]) | st.lists(FIELDS | TEXT, max_size=4)):
        head = b'name="%s"' % name.encode("utf-8", "replace")
        if draw(st.booleans()):
            value = str(draw(LIKELY | SCALARS)).encode("utf-8", "replace")
        else:
            head += b'; filename="%s"' % draw(st.sampled_from([b"a.png", b"", b"../a", b"\xff"]))
            value = PICTURES[draw(st.sampled_from(sorted(PICTURES)))]
            value = changed(draw, value) if draw(st.booleans()) else value
        parts.append((head, value))
    body = b"".join(
        b"--cut\r\nContent-Disposition: form-data; %s\r\n\r\n%s\r\n" % part for part in parts
    )
    return changed(draw, body + b"--cut--\r\n") if draw(st.booleans()) else body + b"--cut--\r\n"


@pytest.mark.hypothesis
def test_a_random_form(survives):
    @FUZZ
    @given(forms())
    def holds(body):
        survives(request("POST", "/v1/images/edits", "multipart/form-data; boundary=cut", body))

    holds()


PATHS = st.sampled_from(
    [
        *("/", "/v1/images", "/v1/images/x/content", "/v1/models/demo", "/v1/models/%2e%2e%2fx"),
        *(
            "/v1/loras",
            "/v1/jobs",
            "/v1/jobs/x",
            "/health",
            "/metrics",
            "/docs",
            "*",
            "//x",
            "/%ff",
        ),
        *("/static-offline-docs/../x", "http://[/", "/v1/images/generations", "/v1/images/edits"),
    ]
)
HEADERS = st.sampled_from(
    [
        *(b"Host: evil.example", b"Host:", b"Origin: http://[", b"Origin: null"),
        *(b"Content-Length: -1", b"Content-Length: 99999999999999999999", b"Content-Length: 1"),
        *(b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip", b"Expect: 100-continue"),
        *(b"Authorization: Bearer \xff", b"Content-Type: \xff", b"Range: bytes=9-", b"Upgrade: x"),
        *(b"Accept-Encoding: *", b"If-None-Match: *", b"X-Forwarded-For: x", b"Cookie: \xc3\x28"),
    ]
)


@st.composite
def raw_requests(draw) -> bytes:
    methods = [
        "GET",
        "HEAD",
        "POST",
        "PUT",
        "DELETE",
        "OPTIONS",
        "PATCH",
        "TRACE",
        "CONNECT",
        "get",
    ]
    body = draw(JUNK | st.just(json.dumps(RIGHT).encode()))
    more = draw(st.lists(HEADERS | JUNK, max_size=3))
    made = request(
        draw(st.sampled_from(methods)),
        draw(PATHS),
        draw(st.just("text/plain") | KINDS),
        body,
        *more,
    )
    return changed(draw, made) if draw(st.booleans()) else made


@pytest.mark.hypothesis
def test_a_random_request(survives):
    @FUZZ
    @given(raw_requests())
    def holds(data):
        survives(data)

    holds()
