"""The application: routes, the layers around them, and the loop that serves it."""

import logging
import socket
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from sana_cli import __version__
from sana_cli.reporter import Reporter
from sana_cli.server import images_api, page
from sana_cli.server.access import Access
from sana_cli.server.errors import ApiError
from sana_cli.server.fields import invalid
from sana_cli.server.security import Guard, PatientProtocol
from sana_cli.server.service import Service
from sana_cli.system.signals import stop_on_signal

MAX_CONNECTIONS = 512


def create_app(
    service: Service,
    reporter: Reporter,
    *,
    token: str | None = None,
    hosts: Collection[str] = (),
    origins: Collection[str] = (),
) -> Any:
    """The ASGI application. See `security.Guard` for what the arguments allow."""
    app = FastAPIOffline(
        redoc_url=None,
        title="sana",
        version=__version__,
        description="Images from text, in the shapes of OpenAI's Images API.",
        default_response_class=JSONResponse,
    )
    app.include_router(images_api.routes(service))
    page.add(app)

    @app.get("/health")
    def health() -> Any:
        """Whether the server takes requests."""
        if service.queue.stopping:
            raise ApiError(503, "the server is stopping", code="stopping", retry_after=10)
        return {"status": "ok", "version": __version__}

    @app.get("/metrics")
    def metrics() -> Response:
        """Counts in Prometheus' text format."""
        text = service.metrics.text(service.session, service.queue, service.gallery)
        return Response(text, media_type="text/plain; version=0.0.4")

    _answer_errors(app, reporter)
    layers: Any = app
    if origins:
        layers = CORSMiddleware(
            app,
            allow_origins=list(origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["authorization", "content-type"],
        )
    guarded = Guard(layers, token, hosts, origins)
    return Access(guarded, service.metrics, reporter.info)


def _answer_errors(app: FastAPI, reporter: Reporter) -> None:
    """Give every error OpenAI's shape."""

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return JSONResponse(error.document(), error.status, error.headers())

    @app.exception_handler(RequestValidationError)
    async def validation(request: Request, error: RequestValidationError) -> Response:
        return await api_error(request, invalid(error.errors()))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        answer = await api_error(request, ApiError(error.status_code, error.detail, code=code))
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        reporter.warn(unforeseen(error))
        return await api_error(request, ApiError(500, "this is a bug of the server"))


def unforeseen(error: BaseException) -> str:
    import traceback

    return "".join(traceback.format_exception(error))


# --- serving -----------------------------------------------------------------------------------


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # they are handled in `serve`


class _ToReporter(logging.Handler):
    """What uvicorn logs."""

    def __init__(self, reporter: Reporter) -> None:
        super().__init__(logging.WARNING)
        self.reporter = reporter

    def emit(self, record: logging.LogRecord) -> None:
        self.reporter.warn(self.format(record))


def serve(
    app: Any,
    service: Service,
    listener: socket.socket,
    reporter: Reporter,
    ready: Callable[[], None],
) -> int:
    """Serve until a signal says otherwise; the exit code. `ready` is called once that works."""
    logger = logging.getLogger("uvicorn.error")
    logger.addHandler(_ToReporter(reporter))
    logger.propagate = False
    config = uvicorn.Config(
        app,
        http=PatientProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
    )
    server = _Server(config)

    def stop() -> None:
        service.queue.stop()
        server.should_exit = True
        text = "stopping after this image; a second signal stops at once"
        reporter.info(text if service.queue.current else "stopping")

    with stop_on_signal(stop) as asked:
        ready()
        server.run(sockets=[listener])
    service.queue.stop()
    service.queue.join()
    return asked.code or 0
