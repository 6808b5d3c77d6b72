"""What the routes share: one session, its queue, the images it drew, and the models it offers."""

from dataclasses import dataclass, field
from typing import Any

from sana_cli.errors import SanaError, UsageError
from sana_cli.images.names import check_size
from sana_cli.resolve import Inputs, with_defaults_of_kind
from sana_cli.server.errors import ApiError, of
from sana_cli.server.fields import Asked
from sana_cli.server.gallery import Gallery
from sana_cli.server.jobs import JobQueue
from sana_cli.server.loras import LoraFolder
from sana_cli.server.metrics import Metrics
from sana_cli.session import DrawRequest, Session
from sana_cli.settings import Settings
from sana_cli.shapes import parse_resolution
from sana_cli.weights.catalogue import Model, choose_model, known_models
from sana_cli.weights.hub_cache import find_parts


@dataclass
class Service:
    session: Session
    queue: JobQueue
    default: str | None = None  # the model, as --model gave it
    metrics: Metrics = field(default_factory=Metrics)
    gallery: Gallery = field(default_factory=Gallery)
    loras: LoraFolder = LoraFolder()

    def models(self) -> dict[str, Model]:
        """The models that are on this machine, the default one first."""
        first = [] if self.default is None else [choose_model(self.default, None)]
        here = [model for model in known_models().values() if find_parts(model) is not None]
        return {model.name: model for model in (*first, *here)}

    def model_named(self, name: str | None) -> str | None:
        """What `--model` would be for a name in a request. ApiError for one that is not here.

        A request names no folder of this machine, and fetches nothing from the hub.
        """
        if name is None:
            return self.default
        offered = self.models()
        if name not in offered:
            lacking = name in known_models()
            hint = f"on the server: sana models pull {name}" if lacking else ""
            hint = hint or f"use one of {', '.join(offered)}"
            shown = ascii(name)[:100]
            cause = UsageError(f"the server offers no model {shown}", hint)
            if lacking:
                cause.exit_code = 5
            message = f"{cause.message} ({hint})"
            raise ApiError(404, message, param="model", code="model_not_found", cause=cause)
        is_default = self.default is not None and name == choose_model(self.default, None).name
        return self.default if is_default else name

    def request(self, asked: Asked, uploads: dict[str, bytes]) -> DrawRequest:
        """Resolve a request, with the images that it carries. ApiError for what is wrong with it,
        or if there is no room in the queue.

        It takes a while: files are read, and images decoded, of which none is kept for the wait.
        """
        if not asked.dry_run:
            self.queue.check_room()
        try:
            inputs = Inputs()
            values = dict(asked.settings)
            values["model"] = self.model_named(values.get("model"))
            values["lora"] = tuple(map(self.loras.choice, values.get("lora", ())))
            for name, data in uploads.items():
                inputs.add_bytes(name, data)
                values[name] = name
            if asked.effort is not None:
                values["steps"] = max(1, round(asked.effort * self._usual_steps(values)))
            request = self.session.request([Settings(**values)], asked.seeds, inputs)
            check_size(request.recipes[0], asked.format)
            if asked.format == "jpeg" and asked.files.metadata == "full":
                self.session.metadata(request.recipes[0]).as_exif("jpeg")
            inputs.release()
            return request
        except SanaError as error:
            error.message = self.loras.without_folder(error.message)
            raise of(error, asked.names) from None

    def _usual_steps(self, values: dict[str, Any]) -> int:
        size = parse_resolution(values["res"]) if values.get("res") else None
        model = choose_model(values["model"], size)
        if model.steps is None:
            model = with_defaults_of_kind(model, self.session.open(model).is_sprint)
        assert model.steps is not None
        return model.steps
