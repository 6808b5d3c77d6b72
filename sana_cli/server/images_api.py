"""`/v1/images/*` and `/v1/models` in OpenAI's shapes (openai-python 3.57), and `/v1/jobs`.

A stream has OpenAI's events, `image_generation.partial_image` and `.completed` (`image_edit.*` for
edits), and with `progress` ours: `sana.recipes`, `sana.queued`, `sana.progress`, `sana.notice`.
"""

import asyncio
import base64
import binascii
import json
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import asdict
from typing import Annotated, Any

import anyio
import anyio.to_thread
from fastapi import APIRouter, Body, Request, Response
from fastapi.responses import StreamingResponse
from starlette.datastructures import UploadFile

from sana_cli.images.files import encode
from sana_cli.pipeline.events import Failure, ImageDone, Notice, Preview, Progress
from sana_cli.replay import command_of
from sana_cli.server import fields
from sana_cli.server.errors import ApiError, of
from sana_cli.server.fields import Asked
from sana_cli.server.gallery import Drawn
from sana_cli.server.jobs import Ended, Job, Started
from sana_cli.server.service import Service
from sana_cli.session import DrawRequest
from sana_cli.settings import Settings, declared
from sana_cli.weights.catalogue import Model

SILENCE = 10.0  # seconds, after which a stream says that it is still there
RESOLVED_AT_ONCE = 2  # requests, each with its images decoded
BEGINNINGS = ("image", "control")  # the uploads of which an edit has at least one

ImageRequest: Any = fields.request_model()


def routes(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1")
    limiter = anyio.CapacityLimiter(RESOLVED_AT_ONCE)

    async def answer(request: Request, asked: Asked, uploads: dict[str, bytes], kind: str) -> Any:
        resolved = await anyio.to_thread.run_sync(service.request, asked, uploads, limiter=limiter)
        if asked.dry_run:
            return described(service, resolved)
        job = Job(resolved, asked.previews)
        service.queue.submit(job)
        drawing = Drawing(service, job, asked, kind, str(request.base_url))
        if asked.stream:
            headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no", "X-Job-Id": job.id}
            return StreamingResponse(
                drawing.stream(), media_type="text/event-stream", headers=headers
            )
        return await drawing.wait(request)

    @router.post("/images/generations", openapi_extra=responses_of("Images."))
    async def generate(request: Request, body: Annotated[ImageRequest, Body()]) -> Any:
        """Draw images from a prompt."""
        return await answer(request, fields.read_or_refuse(body), {}, "image_generation")

    @router.post("/images/edits", openapi_extra=edit_body())
    async def edit(request: Request) -> Any:
        """Draw from an image, all of it or where a mask says, or guided by a control image."""
        values, uploads = await read_edit(request)
        body = fields.parse(values)
        if not uploads.keys() & BEGINNINGS:
            message = f"image is missing: send {' or '.join(BEGINNINGS)}"
            raise ApiError(400, message, param="image", code="missing")
        return await answer(request, fields.read_or_refuse(body), uploads, "image_edit")

    @router.get("/images")
    def newest() -> Any:
        """The images that this server drew last, the newest first."""
        return {"object": "list", "data": [shown(drawn) for drawn in service.gallery.newest()]}

    @router.get("/images/{id}/content")
    def content(id: str) -> Response:
        """The file of an image."""
        drawn = service.gallery.find(id)
        if drawn is None:
            raise no_image()
        headers = {"Cache-Control": "private, max-age=31536000, immutable"}
        return Response(drawn.data, media_type=f"image/{drawn.format}", headers=headers)

    @router.delete("/images/{id}")
    def forget(id: str) -> Any:
        """Forget an image."""
        if not service.gallery.remove(id):
            raise no_image()
        return {"id": id, "object": "image", "deleted": True}

    @router.get("/models")
    def models() -> Any:
        """The models on this machine."""
        return {"object": "list", "data": [model_row(m) for m in service.models().values()]}

    @router.get("/models/{name:path}")
    def model(name: str) -> Any:
        """One of them."""
        offered = service.models()
        if name not in offered:
            service.model_named(name)
        return model_row(offered[name])

    @router.get("/loras")
    def loras() -> Any:
        """The LoRAs that a request may name."""
        rows = [{"id": name, "object": "lora"} for name in service.loras.files()]
        return {"object": "list", "data": rows}

    @router.get("/jobs")
    def jobs() -> Any:
        """What is being drawn, and what waits behind it."""
        return {"object": "list", "data": [job.describe() for job in service.queue.jobs()]}

    @router.delete("/jobs/{id}")
    def cancel(id: str) -> Any:
        """Cancel a job: at once while it waits, after the step under way while it is drawn."""
        for job in service.queue.jobs():
            if job.id == id:
                service.queue.cancel(job)
                return {"id": id, "object": "job", "cancelled": True}
        raise ApiError(404, "no job has this id", param="id", code="not_found")

    return router


class Drawing:
    """The answer to one request for images."""

    def __init__(self, service: Service, job: Job, asked: Asked, kind: str, base: str) -> None:
        self.service, self.job, self.asked, self.kind, self.base = service, job, asked, kind, base
        self.request: DrawRequest = job.request

    async def wait(self, request: Request) -> Any:
        """The document of a request that is not streamed. A client that leaves cancels it."""
        leaving = asyncio.create_task(left(request))
        leaving.add_done_callback(lambda task: None if task.cancelled() else self.cancel())
        images: dict[int, dict[str, Any]] = {}
        failure: ApiError | None = None
        notices = list(self.request.warnings)
        try:
            while not isinstance(event := await self.job.events.get(), Ended):
                match event:
                    case ImageDone(index, _):
                        images[index] = await self.finished(event)
                    case Failure(error=error):
                        failure = failure or of(error, self.asked.names)
                    case Notice(text, True):
                        notices.append(text)
        finally:
            leaving.cancel()
            self.cancel()
        failure = event.error or failure
        if failure is not None:
            raise failure
        first = self.request.recipes[0]
        document = {
            "created": int(time.time()),
            "background": "opaque",
            "output_format": self.asked.format,
            "size": f"{first.width}x{first.height}",
            "data": [images[index] for index in sorted(images)],
        }
        return document | ({"warnings": notices} if notices else {})

    async def stream(self) -> AsyncIterator[bytes]:
        """Server-sent events; the job is cancelled when nobody reads them any more."""
        try:
            if self.asked.progress:
                yield event_text("sana.recipes", described(self.service, self.request))
                yield self._queued()
            while True:
                try:
                    event = await asyncio.wait_for(self.job.events.get(), SILENCE)
                except TimeoutError:
                    yield self._queued() if self.asked.progress else b": waiting\n\n"
                    continue
                match event:
                    case Ended(error):
                        if error is not None:
                            yield event_text("error", error.document())
                        return
                    case Preview():
                        yield event_text(f"{self.kind}.partial_image", await self.preview(event))
                    case ImageDone():
                        yield event_text(f"{self.kind}.completed", await self.completed(event))
                    case Failure(index, error):
                        document = of(error, self.asked.names).document()
                        yield event_text("error", document | {"index": index})
                    case Started() if self.asked.progress:
                        yield self._queued()
                    case Progress() if self.asked.progress:
                        yield event_text("sana.progress", asdict(event))
                    case Notice() if self.asked.progress:
                        yield event_text("sana.notice", asdict(event))
        finally:
            self.cancel()

    def cancel(self) -> None:
        if self.job.state in ("queued", "drawing"):
            self.service.queue.cancel(self.job)

    def _queued(self) -> bytes:
        facts = self.job.describe() | {"ahead": self.service.queue.position(self.job)}
        return event_text("sana.queued", facts)

    async def finished(self, done: ImageDone) -> dict[str, Any]:
        """Encode an image, put it into the gallery, and describe it."""
        recipe = self.request.recipes[done.index]
        drawn = await anyio.to_thread.run_sync(self._encode, done)
        self.service.gallery.add(drawn)
        where = {"url": f"{self.base}v1/images/{drawn.id}/content"}
        if self.asked.response_format == "b64_json":
            where = {"b64_json": base64.b64encode(drawn.data).decode()}
        return where | {"id": drawn.id, "seed": recipe.seed, "recipe": recipe.as_dict()}

    def _encode(self, done: ImageDone) -> Drawn:
        recipe, format = self.request.recipes[done.index], self.asked.format
        data = self.service.session.encode(done, recipe, format, self.asked.files)
        return Drawn(recipe, format, data)

    async def completed(self, done: ImageDone) -> dict[str, Any]:
        facts = self._facts(f"{self.kind}.completed", done.index)
        return facts | await self.finished(done)

    async def preview(self, preview: Preview) -> dict[str, Any]:
        facts = self._facts(f"{self.kind}.partial_image", preview.index)
        data = await anyio.to_thread.run_sync(
            encode, preview.pixels, self.asked.format, self.asked.files.quality, None
        )
        steps = {"step": preview.step, "steps": preview.steps}
        return (
            facts
            | steps
            | {
                "b64_json": base64.b64encode(data).decode(),
                "partial_image_index": self._partial_index(preview.index),
            }
        )

    _previews: dict[int, int] | None = None

    def _partial_index(self, index: int) -> int:
        self._previews = self._previews or {}
        self._previews[index] = self._previews.get(index, -1) + 1
        return self._previews[index]

    def _facts(self, kind: str, index: int) -> dict[str, Any]:
        recipe = self.request.recipes[index]
        return {
            "type": kind,
            "index": index,  # of the image among those of the request
            "created_at": int(time.time()),
            "size": f"{recipe.width}x{recipe.height}",
            "quality": "auto",
            "background": "opaque",
            "output_format": self.asked.format,
        }


def event_text(event: str, data: dict[str, Any]) -> bytes:
    return f"event: {event}\ndata: {json.dumps(data)}\n\n".encode()


async def left(request: Request) -> None:
    """Return once the client is gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def described(service: Service, request: DrawRequest) -> dict[str, Any]:
    """What would be drawn, and by what."""
    model = request.model
    known = service.session.vocabulary(model, request.files)
    made = service.session.metadata(request.recipes[0])
    return {
        "object": "recipes",
        "model": {
            "name": model.name,
            "source": model.source,
            "licence": model.licence,
            "vocabulary": known and sorted(known),
        },
        "device": made.device,
        "torch": made.torch,
        "recipes": [recipe.as_dict() for recipe in request.recipes],
        "warnings": list(request.warnings),
    }


def shown(drawn: Drawn) -> dict[str, Any]:
    return {
        "id": drawn.id,
        "object": "image",
        "created": int(drawn.created),
        "format": drawn.format,
        "bytes": len(drawn.data),
        "recipe": drawn.recipe.as_dict(),
        "command": command_of(drawn.recipe.as_dict())[0],
    }


def model_row(model: Model) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": 0,
        "owned_by": model.source,
        "licence": model.licence,
        "sides": list(model.sides),
        "steps": model.steps,
        "guidance": model.guidance,
    }


def no_image() -> ApiError:
    return ApiError(404, "this image is no longer kept here", param="id", code="not_found")


# --- the body of an edit -----------------------------------------------------------------------


async def read_edit(request: Request) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The fields and the images of a form, or of a document with images in base64."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        return await read_document(request)
    if kind != "multipart/form-data":
        raise ApiError(415, "the body must be multipart/form-data or application/json")
    values: dict[str, Any] = {}
    uploads: dict[str, bytes] = {}
    async with request.form(max_files=8, max_fields=64, max_part_size=1 << 20) as form:
        for field, value in form.multi_items():
            name = field.removesuffix("[]")
            if name == "lora" and isinstance(value, str):
                values.setdefault(name, []).append(value)
                continue
            if name in values or name in uploads:
                raise ApiError(400, f"{ascii(name)} is given twice", param=ascii(name)[1:-1])
            if not isinstance(value, UploadFile):
                values[name] = value
            elif name not in fields.uploads():
                raise no_upload(name)
            else:
                uploads[name] = await value.read()
    return values, uploads


async def read_document(request: Request) -> tuple[dict[str, Any], dict[str, bytes]]:
    try:
        values = json.loads(await request.body())
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not valid JSON", code="invalid_json") from None
    if not isinstance(values, dict):
        raise ApiError(400, "the body is not an object", code="invalid_json")
    uploads = {}
    for name in fields.uploads():
        text = values.get(name)
        if text is None or text in declared(Settings)[name].option.words:
            continue
        del values[name]
        with suppress(binascii.Error, ValueError, AttributeError):
            uploads[name] = base64.b64decode(text.rpartition(",")[2], validate=True)
        if name not in uploads:
            raise ApiError(400, f"{name} is not an image in base64", param=name)
    return values, uploads


def no_upload(name: str) -> ApiError:
    known = ", ".join(fields.uploads())
    shown = ascii(name)[1:-1][:80]
    message = f"no image is taken as {shown!r}; there is {known}"
    return ApiError(400, message, param=shown, code="unknown_parameter")


# --- the OpenAPI description ----------------------------------------------------------------------


def responses_of(what: str) -> dict[str, Any]:
    error = {"description": "An error, in OpenAI's shape."}
    codes = ("400", "401", "403", "404", "408", "409", "413", "415", "421", "429", "503")
    return {"responses": dict.fromkeys(codes, error)}


def edit_body() -> dict[str, Any]:
    schema = fields.request_model().model_json_schema()
    image = {"type": "string", "format": "binary"}
    properties = schema["properties"] | dict.fromkeys(fields.uploads(), image)
    required = {"required": ["prompt"], "anyOf": [{"required": [name]} for name in BEGINNINGS]}
    form = schema | {"properties": properties} | required
    text = {"type": "string", "contentEncoding": "base64"}
    properties = schema["properties"] | dict.fromkeys(fields.uploads(), text)
    document = schema | {"properties": properties} | required
    content = {
        "multipart/form-data": {"schema": form},
        "application/json": {"schema": document},
    }
    return {"requestBody": {"required": True, "content": content}} | responses_of("Images.")
