"""Who may ask for what: the token, the Host and Origin headers, and limits on bodies and time."""

import asyncio
import hmac
import ipaddress
import json
import socket
from collections.abc import Collection, Mapping
from urllib.parse import urlsplit

import h11
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from sana_cli.errors import UsageError
from sana_cli.server.errors import ApiError

LARGEST_DOCUMENT = 1 << 20  # bytes of a body
LARGEST_UPLOAD = 64 << 20  # of one that carries images
UPLOADS = "/v1/images/edits"
HEADER_SECONDS = 15  # from the connection, or the first byte, to the last header
CHUNK_SECONDS = 20  # between two parts of a body
BODY_SECONDS = 300  # for all of it
STALLED_SECONDS = 60  # that a client may leave an answer unread
# What says nothing of images, and what a browser must load before it can ask for the token.
OPEN = ("/", "/health", "/docs", "/openapi.json")
OPEN_FOLDER = "/static-offline-docs/"

PAGE_POLICY = (
    "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}';"
    " img-src 'self' blob: data:; connect-src 'self'; form-action 'none'; base-uri 'none';"
    " frame-ancestors 'none'"
)
DOCS_POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline';"
    " img-src 'self' data:; connect-src 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}


class Guard:
    """Refuse what is not allowed before the application sees it; limit the body of the rest."""

    def __init__(
        self, app: ASGIApp, token: str | None, hosts: Collection[str], origins: Collection[str]
    ) -> None:
        """`hosts` are names that the Host header may have beside addresses and localhost;
        `origins` are the other web sites that may ask."""
        self.app, self.hosts = app, {"localhost", *(name.lower() for name in hosts)}
        self.token = token.encode() if token else None
        self.origins = set(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers = {name.decode("latin-1"): value for name, value in scope["headers"]}
        length = int(headers.get("content-length", b"0"))  # digits, or h11 had refused it
        try:
            self.check(scope["method"], scope["path"], headers)
        except ApiError as error:
            if 0 < length <= LARGEST_DOCUMENT:
                await discard(receive)
            await refuse(error, send)
            return
        is_upload = scope["path"] == UPLOADS
        limit = LARGEST_UPLOAD if is_upload else LARGEST_DOCUMENT
        if length > limit:
            await refuse(too_large(limit), send)
            return
        await self.app(scope, limited(receive, limit), with_headers(send, scope["path"]))

    def check(self, method: str, path: str, headers: Mapping[str, bytes]) -> None:
        """ApiError if a request is not to be answered."""
        host = headers.get("host", b"").decode("latin-1")
        name = host_name(host)
        if name not in self.hosts and not is_address(name):
            raise ApiError(
                421, f"this server is not called {ascii(name)[:100]}", code="unknown_host"
            )
        origin = headers.get("origin", b"").decode("latin-1")
        if method not in ("GET", "HEAD") and not self.is_ours(origin, host):
            raise ApiError(403, "another web site may not ask this server", code="origin")
        if self.token is None or path in OPEN or path.startswith(OPEN_FOLDER):
            return
        if method == "OPTIONS" and origin in self.origins:  # asked before the token is sent
            return
        kind, _, given = headers.get("authorization", b"").partition(b" ")
        right = hmac.compare_digest(given.strip(), self.token)
        if kind.lower() != b"bearer" or not right:
            raise ApiError(
                401, "a token is needed: Authorization: Bearer TOKEN", code="invalid_api_key"
            )

    def is_ours(self, origin: str, host: str) -> bool:
        """Whether a request comes from our own page, an allowed one, or no browser.

        A browser sends along the origin of what a page asks for; `null` is of one that hides.
        """
        own = {f"http://{host}".lower(), f"https://{host}".lower()}
        return not origin or origin in self.origins or origin.lower() in own


def host_name(host: str) -> str:
    """`[::1]:7262` -> `::1`, `Localhost:80` -> `localhost`."""
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return ""


def is_address(name: str) -> bool:
    """Whether a host is a number: no name server can make that mean another machine."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    return host == "localhost" or (is_address(host) and ipaddress.ip_address(host).is_loopback)


def listen(host: str, port: int) -> socket.socket:
    """Take an address. UsageError if it cannot be had."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"--host {host} --port {port}: {reason}", "use another --port") from None


def too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body is larger than {limit >> 20} MiB", code="too_large")


def limited(receive: Receive, limit: int) -> Receive:
    """Receive a body of at most so many bytes, each part of it in time.

    HTTPException otherwise, which FastAPI passes on from inside its own reading.
    """
    seen, complete = 0, False
    deadline = asyncio.get_running_loop().time() + BODY_SECONDS

    async def receive_part() -> Message:
        nonlocal seen, complete
        if complete:  # what comes now is that the client leaves, whenever that is
            return await receive()
        left = deadline - asyncio.get_running_loop().time()
        try:
            message = await asyncio.wait_for(receive(), min(CHUNK_SECONDS, max(left, 0)))
        except TimeoutError:
            raise HTTPException(408, "the body came too slowly") from None
        seen += len(message.get("body", b""))
        complete = not message.get("more_body", False)
        if seen > limit:
            raise HTTPException(413, too_large(limit).message)
        return message

    return receive_part


async def discard(receive: Receive) -> None:
    """Read a small body that nobody wants.

    Closing a connection with unread bytes resets it, and the client may lose the answer.
    """
    receive_part = limited(receive, LARGEST_DOCUMENT)
    try:
        while (await receive_part()).get("more_body", False):
            pass
    except HTTPException:  # too slow: the connection is closed anyway
        pass


def with_headers(send: Send, path: str = "") -> Send:
    """Send answers with HEADERS, unless they have their own."""
    headers = HEADERS | ({"Content-Security-Policy": DOCS_POLICY} if path == "/docs" else {})

    async def send_with(message: Message) -> None:
        if message["type"] == "http.response.start":
            there = {name.lower() for name, _ in message["headers"]}
            message["headers"] = list(message["headers"]) + [
                (name.lower().encode(), value.encode())
                for name, value in headers.items()
                if name.lower().encode() not in there
            ]
        await send(message)

    return send_with


async def refuse(error: ApiError, send: Send) -> None:
    body = json.dumps(error.document()).encode()
    headers = error.headers() | {
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "Connection": "close",  # the rest of the request is not read
    }
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    send = with_headers(send)
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


class PatientProtocol(H11Protocol):
    """uvicorn's HTTP/1.1, which hangs up on who sends headers, or the rest of a body after its
    answer, or reads answers too slowly."""

    _headers_due: asyncio.TimerHandle | None = None
    _reading_due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._headers_due = self.loop.call_later(HEADER_SECONDS, transport.abort)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE and self.conn.our_state is not h11.DONE:
            self._cancel_timers(reading=False)
        elif self._headers_due is None:  # of a second request, or of a body after its answer
            self._headers_due = self.loop.call_later(HEADER_SECONDS, self.transport.abort)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP. A request whose body it is in is abandoned: both answering it
        would be an error of h11."""
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(ApiError(400, "the request is not HTTP").document()).encode()
            headers = [("Content-Type", "application/json"), ("Connection", "close")]
            headers += [("Content-Length", str(len(body)))]
            answer = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
            is_head = self.cycle is not None and self.cycle.scope["method"] == "HEAD"
            for event in (answer, h11.Data(data=b"" if is_head else body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._reading_due = self.loop.call_later(STALLED_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._reading_due is not None:
            self._reading_due.cancel()
            self._reading_due = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_timers(reading=True)
        super().connection_lost(exc)

    def _cancel_timers(self, reading: bool) -> None:
        if self._headers_due is not None:
            self._headers_due.cancel()
            self._headers_due = None
        if reading and self._reading_due is not None:
            self._reading_due.cancel()
            self._reading_due = None
