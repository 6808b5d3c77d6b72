"""A session whose networks are those of a `sana serve`: recipes and events come over HTTP.

Settings are checked here and resolved there. Images travel as PNG files with their recipes inside;
files are written here, with the names and bytes that they would have if all of it had happened on
the server's machine.
"""

import base64
import io
import json
import os
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sana_cli.errors import (
    BadImage,
    DiskFull,
    MissingModel,
    NotEnoughMemory,
    SanaError,
    ServerGone,
    UsageError,
)
from sana_cli.pipeline.events import Event, Failure, ImageDone, Notice, Preview, Progress
from sana_cli.recipe import Recipe, adapters_of
from sana_cli.reporter import Reporter
from sana_cli.resolve import Inputs, Resolution, Role, Sampler
from sana_cli.session import DrawRequest, Session
from sana_cli.settings import FileOptions, Settings, declared
from sana_cli.weights.catalogue import Model

if TYPE_CHECKING:
    import httpx2
    import numpy as np

    from sana_cli.images.metadata import Metadata

CONNECT_SECONDS = 10
ROLES: dict[str, Role] = {"image": "init", "mask": "mask", "control": "control"}
GONE = (502, 503, 504)  # as it is stopping, or as a proxy before it says
AGAIN = "once it is back, type the command again"
SILENT_SECONDS = 60  # a server says every ten that it is still there
KINDS: dict[int, type[SanaError]] = {
    kind.exit_code: kind for kind in (UsageError, NotEnoughMemory, MissingModel, DiskFull, BadImage)
}


@dataclass(frozen=True, kw_only=True)
class RemoteResolution(Resolution):
    """Settings, resolved by a server."""

    drawn: Recipe  # with another prompt and seed
    warnings: tuple[str, ...]

    def sampler(self, files: Any = None) -> Sampler:
        drawn = self.drawn
        return Sampler(drawn.solver, drawn.steps, drawn.guidance, drawn.strength, self.warnings)

    def all_warnings(self, files: Any, device: str, memory: int | None = None) -> tuple[str, ...]:
        return self.warnings

    def recipe(self, files: Any, device: str, seed: int, memory: int | None = None) -> Recipe:
        return replace(self.drawn, prompt=self.settings.prompt, seed=seed)


class ImageReceived(ImageDone):
    """An image as the PNG file that a server sent, with its recipe; decoded if pixels are used."""

    png: bytes

    def __init__(self, index: int, png: bytes) -> None:
        vars(self).update(index=index, png=png)  # past the guard of a frozen dataclass

    @cached_property
    def pixels(self) -> "np.ndarray":
        return pixels_of(self.png)


class RemoteSession(Session):
    """A `Session` that draws elsewhere."""

    def __init__(self, url: str, token: str | None, reporter: Reporter) -> None:
        """UsageError if `url` is not the address of a server. Nothing is connected yet."""
        super().__init__(reporter=reporter)
        import ssl

        import httpx2

        self.url = url.rstrip("/").removesuffix("/v1")
        if not self.url.startswith(("http://", "https://")):
            raise UsageError(f"--server {url} is not a URL", "write http://127.0.0.1:7262")
        try:
            self._client = httpx2.Client(
                base_url=self.url,
                headers={"Authorization": f"Bearer {token}"} if token else {},
                timeout=httpx2.Timeout(SILENT_SECONDS, connect=CONNECT_SECONDS),
                trust_env=not is_local(self.url),  # a proxy does not lead to this machine
                # Without TLS no certificates are needed, and loading them takes as long as all the
                # rest of the start.
                verify=self.url.startswith("https://") or ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
            )
        except (httpx2.InvalidURL, ValueError, UnicodeError) as error:
            raise UsageError(f"--server {url} is not a URL: {error}") from None
        self._made = ("", "")  # the device and the version of torch there
        self._vocabularies: dict[Model, frozenset[str] | None] = {}
        self._resolved: dict[Settings, RemoteResolution] = {}  # by settings, whatever the prompt
        self._asked: dict[Recipe, Settings] = {}  # by recipes, whatever the prompt and the seed

    @property
    def device(self) -> str:
        """The server's, once it has said so."""
        return self._made[0] or f"the server at {self.url}"

    def metadata(self, recipe: Recipe) -> "Metadata":
        from sana_cli.images.metadata import Metadata

        return Metadata(recipe, *self._made)

    def encode(self, image: ImageDone, recipe: Recipe, format: str, files: FileOptions) -> bytes:
        if isinstance(image, ImageReceived) and format == "png" and files.metadata == "full":
            return image.png  # the very file
        return super().encode(image, recipe, format, files)

    def peak_bytes(self) -> int:
        return 0  # of this process it means nothing

    def open(self, model: Model, *, dry_run: bool = False) -> Any:
        return None  # the server has its files

    def is_here(self, model: Model) -> bool:
        return True

    def vocabulary(self, model: Model, files: Any) -> frozenset[str] | None:
        return self._vocabularies[model]

    def with_components(self, resolution: Resolution, files: Any, *, dry_run: bool = False) -> Any:
        return None

    def close(self) -> None:
        self._client.close()

    # --- resolve -------------------------------------------------------------------------------

    def resolve(self, settings: Settings, inputs: Inputs) -> RemoteResolution:
        for name in self._files(settings):  # read, and reported, as they are here
            inputs.add(getattr(settings, name), ROLES[name])
        key = replace(settings, prompt="-")
        if key not in self._resolved or self._files(settings):  # which may have changed
            with self._answer(self._body(settings) | {"dry_run": True}, settings) as answer:
                answer.read()
                document = _json(answer.text)
            self._resolved[key] = self._read(document, settings)
        found = replace(self._resolved[key], settings=settings)
        for text, adapter in zip(settings.lora, adapters_of(found.drawn), strict=True):
            name = text.rpartition(":")[0] or text
            inputs.loras[adapter.sha256] = Path(name)  # what it is called there
        return found

    def _read(self, document: Any, settings: Settings) -> RemoteResolution:
        try:
            drawn = Recipe(**document["recipes"][0])
            described = document["model"]
            model = Model(
                described["name"], licence=described["licence"], folder=described["source"]
            )
            self._made = document["device"], document["torch"]
            known = described["vocabulary"]
            self._vocabularies[model] = None if known is None else frozenset(known)
            warnings = tuple(document["warnings"])
        except (KeyError, TypeError, IndexError):
            raise self._stranger() from None
        self._asked[replace(drawn, prompt="", seed=0)] = settings
        # What the server says of the words is about this prompt alone: `request` looks at all.
        of_words = self.about_words(model, None, [settings])
        warnings = tuple(text for text in warnings if text not in of_words)
        return RemoteResolution(
            settings=settings,
            model=model,
            request=None,
            aspect=None,
            drawn=drawn,
            warnings=warnings,
        )

    def request(
        self,
        settings: Sequence[Settings],
        seeds: Sequence[int],
        inputs: Inputs | None = None,
        *,
        dry_run: bool = False,
    ) -> DrawRequest:
        inputs = Inputs() if inputs is None else inputs
        resolved = [self.resolve(one, inputs) for one in settings]
        recipes = [one.recipe(None, "", seed) for one in resolved for seed in seeds]
        notes = [note for image in inputs.images() for note in image.notes]
        model, warnings = resolved[0].model, (*notes, *resolved[0].warnings)
        warnings = *warnings, *self.about_words(model, None, settings)
        return DrawRequest(model, self.open(model), recipes, inputs, warnings)

    def plan(self, request: DrawRequest, *, predict: bool = False) -> Any:
        for text in request.warnings:
            self.reporter.warn(text)

    # --- draw ----------------------------------------------------------------------------------

    def draw(
        self, request: DrawRequest, plan: Any = None, previews: int = 0
    ) -> Generator[Event, None, None]:
        """The events of the server's drawing, one request an image."""
        with self.exclusive():
            for index, recipe in enumerate(request.recipes):
                yield from self._draw(index, recipe, len(request.recipes), previews)

    def _draw(self, index: int, recipe: Recipe, count: int, previews: int) -> Iterator[Event]:
        settings = replace(self._asked[replace(recipe, prompt="", seed=0)], prompt=recipe.prompt)
        body = self._body(settings) | {"seed": str(recipe.seed), "stream": True, "progress": True}
        with self._answer(body | {"partial_images": previews}, settings) as answer:
            for name, data in self._events(answer):
                event = self._event(name, data, index, count)
                if event is not None:
                    yield event
                if isinstance(event, ImageDone | Failure):
                    return
        raise self._gone()

    def _event(self, name: str, data: Any, index: int, count: int) -> Event | None:
        """What a server-sent event means for the recipe at `index` of `count`. SanaError if it
        ends them all."""
        try:
            match name.rpartition(".")[2]:
                case "error":
                    error = self._error(data)
                    if "index" not in data:
                        raise error
                    return Failure(index, error)
                case "progress":
                    one = Progress(**data)
                    if one.stage == "load":  # once, whatever the images
                        return one
                    done, total = index * one.total + one.done, count * one.total
                    return replace(one, done=done, total=total)
                case "notice":
                    return Notice(**data)
                case "partial_image":
                    return Preview(index, data["step"], data["steps"], pixels_of(png_of(data)))
                case "completed":
                    return ImageReceived(index, png_of(data))
        except (KeyError, TypeError, ValueError, OSError):
            raise self._stranger() from None
        return None

    def _events(self, answer: "httpx2.Response") -> Iterator[tuple[str, Any]]:
        """The server-sent events of an answer, as far as this server writes them."""
        name = ""
        for line in answer.iter_lines():
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: "):
                yield name, _json(line.removeprefix("data: "))

    # --- HTTP ----------------------------------------------------------------------------------

    @staticmethod
    def _files(settings: Settings) -> list[str]:
        """The options whose value is an image file."""
        return [
            name
            for name, one in declared(Settings).items()
            if one.option.upload
            and (value := getattr(settings, name)) is not None
            and value not in one.option.words
        ]

    def _body(self, settings: Settings) -> dict[str, Any]:
        """The fields of settings that are not left at their defaults, without the files."""
        known, files = declared(Settings), self._files(settings)
        given = {one.name: getattr(settings, one.name) for one in fields(settings)}
        return {
            name: value
            for name, value in given.items()
            if name == "prompt" or (value != known[name].default and name not in files)
        }

    @contextmanager
    def _answer(self, body: dict[str, Any], settings: Settings) -> "Iterator[httpx2.Response]":
        """Post a request, waiting while the queue is full. SanaError unless the answer is good."""
        import httpx2

        files = {
            name: ("image", upload(name, getattr(settings, name))) for name in self._files(settings)
        }
        path, content = "/v1/images/generations", {"json": body}
        if files:
            path = "/v1/images/edits"
            form = {k: _words(v) for k, v in body.items()}
            content = {"data": form, "files": files}
        announced = False
        while True:
            try:
                request = self._client.build_request("POST", path, **content)  # type: ignore[arg-type]
                answer = self._client.send(request, stream=True)
            except httpx2.TransportError as error:
                raise ServerGone(
                    f"no server answers at {self.url}: {error or type(error).__name__}",
                    "start one with `sana serve`, or leave out --server and SANA_SERVER",
                ) from None
            try:
                if answer.status_code == 200:
                    yield answer
                    return
                answer.read()
                if answer.status_code != 429:
                    raise self._error(_json(answer.text), answer.status_code)
                wait = answer.headers.get("Retry-After", "5")
            except httpx2.TransportError:  # also where the answer is used
                raise self._gone() from None
            finally:
                answer.close()
            if not announced:
                self.reporter.info("the server's queue is full; waiting for room")
                announced = True
            time.sleep(min(int(wait) if wait.isdigit() else 5, SILENT_SECONDS))

    def _error(self, document: Any, status: int = 500) -> SanaError:
        """The error that the command line would have shown on the server's machine."""
        error = document.get("error") if isinstance(document, dict) else None
        if status == 401:
            return ServerGone(f"the server at {self.url} wants a token", "set SANA_TOKEN to it")
        error = error if isinstance(error, dict) else {}
        message = f"the server at {self.url} says: {error.get('message', f'HTTP {status}')}"
        if status in GONE or error.get("code") == "stopping":
            return ServerGone(message, AGAIN)
        if not error:
            return self._stranger()
        details = error.get("sana") or {
            "message": message,
            "hint": None,
            "exit_code": UsageError.exit_code if status in (400, 413) else SanaError.exit_code,
        }
        try:
            kind = KINDS.get(details["exit_code"], SanaError)
            return kind(str(details["message"]), details["hint"])
        except (KeyError, TypeError):
            return self._stranger()

    def _stranger(self) -> SanaError:
        return SanaError(
            f"{self.url} does not answer as this version of `sana serve` does",
            "see that --server is the URL that it printed",
        )

    def _gone(self) -> SanaError:
        return ServerGone(
            f"the server at {self.url} went away before its answer was complete", AGAIN
        )


def is_local(url: str) -> bool:
    host = url.partition("://")[2].partition("/")[0].rpartition("@")[2]
    return host.startswith(("127.", "localhost", "[::1]"))


def upload(name: str, path: str) -> bytes:
    """The file of an image for the option `name`, in a format that a server takes."""
    from PIL import Image

    from sana_cli.images.files import UPLOADS, encode, load, rgb

    file = Path(os.path.expanduser(path))
    try:
        with Image.open(file, formats=UPLOADS):
            return file.read_bytes()
    except OSError:
        return encode(rgb(load(path, option=f"--{name}"), path), "png", None, None)


def png_of(data: Any) -> bytes:
    """The PNG of an event. ValueError for what is none."""
    png = base64.b64decode(data["b64_json"])
    if not png.startswith(b"\x89PNG\r\n\x1a\n"):
        raise ValueError("not a PNG")
    return png


def pixels_of(png: bytes) -> "np.ndarray":
    """uint8 RGB (height, width, 3) of a PNG. SanaError if it is damaged."""
    import numpy as np
    from PIL import Image

    try:
        with Image.open(io.BytesIO(png), formats=("PNG",)) as image:
            return np.asarray(image)
    except (OSError, ValueError, SyntaxError) as error:
        raise SanaError(f"the server sent an image that cannot be read: {error}") from None


def _words(value: Any) -> str | list[str]:
    """A value in a form."""
    if isinstance(value, tuple):
        return [str(one) for one in value]
    return str(value).lower() if isinstance(value, bool) else str(value)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None
