"""A line, an id and a count for every request."""

import secrets
import time
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sana_cli.server.metrics import Metrics

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


class Access:
    """The outermost layer: it sees what is refused as well."""

    def __init__(self, app: ASGIApp, metrics: Metrics, log: Callable[[str], None]) -> None:
        self.app, self.metrics, self.log = app, metrics, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        began = time.perf_counter()
        id = secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = id
        status, sent, received = 0, 0, 0

        async def counted_receive() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            return message

        async def counted_send(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", id.encode())]
            else:
                sent += len(message.get("body", b""))
            await send(message)

        try:
            await self.app(scope, counted_receive, counted_send)
        finally:
            seconds = time.perf_counter() - began
            # A stranger's paths and methods would grow without end.
            path = getattr(scope.get("route"), "path", "other")
            method = scope["method"] if scope["method"] in METHODS else "other"
            self.metrics.requests.labels(method, path, str(status)).inc()
            self.metrics.request_seconds.labels(path).observe(seconds)
            self.metrics.sent_bytes.inc(sent)
            self.metrics.received_bytes.inc(received)
            client = scope["client"][0] if scope.get("client") else "-"
            words = (id, client, scope["method"], scope["path"])
            line = " ".join(ascii(word)[1:-1][:200] for word in words)
            self.log(f"{line} {status or 'gone'} {seconds:.3f}s {sent} bytes")
