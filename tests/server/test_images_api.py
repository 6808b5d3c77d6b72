"""The Images API: OpenAI's own client draws, and gets the bytes of `sana generate`."""

import base64
import io
import json
import tracemalloc

import numpy as np
import openai
import pytest
from PIL import Image

from sana_cli.images.metadata import recipe_of
from sana_cli.server.fields import (
    ALIASES,
    PROTOCOL,
    by_name,
    parse,
    read_or_refuse,
    request_model,
    uploads,
)
from sana_cli.server.jobs import JobQueue
from sana_cli.server.service import Service
from sana_cli.session import Session
from sana_cli.settings import FileOptions, RunOptions, Seeds, Settings, declared, is_path

PROMPT = "a red circle on a blue background"


@pytest.fixture
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as one:
        yield one


@pytest.fixture
def picture(tmp_path):
    """A file with an image to start from, and one with a mask whose upper part is transparent."""
    image, mask = tmp_path / "image.png", tmp_path / "mask.png"
    Image.new("RGB", (256, 256), (30, 60, 200)).save(image)
    alpha = np.full((256, 256, 4), 255, np.uint8)
    alpha[:96, :, 3] = 0
    Image.fromarray(alpha).save(mask)
    return image, mask


def test_a_generated_image_is_the_file_that_the_command_writes(client, sana, tmp_path):
    answer = client.images.generate(
        prompt=PROMPT,
        model="demo",
        size="256x256",
        n=2,
        extra_body={"seed": 7, "num_inference_steps": 2, "guidance_scale": 3, "negative": "green"},
    )
    words = ("-s7", "-n2", "--steps", "2", "-g", "3", "--negative", "green", "-r", "256x256")
    run = sana("generate", PROMPT, "-m", "demo", *words, "-o", f"{tmp_path}/{{seed}}.png")
    assert run.code == 0, run.err
    for one, seed in zip(answer.data, (7, 8), strict=True):
        assert one.seed == seed
        assert base64.b64decode(one.b64_json) == (tmp_path / f"{seed}.png").read_bytes()


def test_an_edit_repaints_as_the_command_does(client, sana, tmp_path, picture):
    image, mask = picture
    with image.open("rb") as one, mask.open("rb") as other:
        answer = client.images.edit(
            image=one, mask=other, prompt=PROMPT, extra_body={"seed": 7, "steps": 2}
        )
    file = tmp_path / "a.png"
    words = ("--image", str(image), "--mask", str(mask), "-s7", "--steps", "2", "-o", str(file))
    assert sana("generate", PROMPT, "-m", "demo", *words).code == 0
    assert base64.b64decode(answer.data[0].b64_json) == file.read_bytes()
    with Image.open(file) as drawn:
        assert np.array_equal(np.asarray(drawn)[160:], np.full((96, 256, 3), (30, 60, 200)))


def test_what_open_webui_sends_is_taken(served, picture):
    """The requests of its `routers/images.py`, with additional parameters from its settings."""
    fields = {"model": "demo", "prompt": PROMPT, "n": 1, "size": "256x256"}
    fields["response_format"] = "b64_json"
    drawn = served.client.post("/v1/images/generations", json=fields | {"steps": 1})
    assert drawn.json()["data"][0]["b64_json"]
    form = {name: str(value) for name, value in fields.items()} | {"background": "auto"}
    files = {"image[]": ("image.png", picture[0].read_bytes(), "image/png")}
    edited = served.client.post("/v1/images/edits", data=form | {"steps": "1"}, files=files)
    assert edited.json()["data"][0]["b64_json"]


def test_a_request_that_waits_holds_no_decoded_image(picture):
    session = Session(device="cpu", offline=True)
    queue = JobQueue(session, most_waiting=1, keep_alive=0)
    service = Service(session, queue, "demo")
    asked = read_or_refuse(parse({"prompt": PROMPT}))
    files = dict(zip(("image", "mask"), (path.read_bytes() for path in picture), strict=True))
    service.request(asked, files)  # with all imports
    tracemalloc.start()
    request = service.request(asked, files)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    sizes = [request.inputs[sha256].nbytes for sha256 in request.inputs]
    assert sizes == [256 * 256 * 3, 256 * 256]
    assert held < sum(sizes) / 2
    queue.stop()


def test_an_edit_may_be_a_document_with_base64(served, picture):
    data = base64.b64encode(picture[0].read_bytes()).decode()
    fields = {"prompt": PROMPT, "steps": 1, "seed": 7, "size": "256x256", "dry_run": True}
    told = served.client.post("/v1/images/edits", json=fields | {"image": data}).json()
    form = {k: str(v) for k, v in fields.items()}
    files = {"image": picture[0].read_bytes()}
    assert served.client.post("/v1/images/edits", data=form, files=files).json() == told
    assert told["recipes"][0]["image"]


def test_a_stream_shows_estimates_and_then_the_image(client, served):
    events = list(
        client.images.generate(
            prompt=PROMPT,
            size="256x256",
            stream=True,
            partial_images=2,
            extra_body={"seed": 7, "steps": 4},
        )
    )
    kinds = [event.type.removeprefix("image_generation.") for event in events]
    assert kinds == ["partial_image", "partial_image", "completed"]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    whole = served.draw(steps=4).json()["data"][0]["b64_json"]
    assert events[-1].b64_json == whole  # previews change nothing
    images = [Image.open(io.BytesIO(base64.b64decode(event.b64_json))) for event in events]
    first, second, last = (np.asarray(image).astype(float) for image in images)
    assert np.abs(second - last).mean() < np.abs(first - last).mean()


def test_the_last_stage_of_progress_is_that_of_the_command(served):
    with served.client.stream(
        "POST",
        "/v1/images/generations",
        json={"prompt": PROMPT, "size": "256x256", "steps": 3, "stream": True, "progress": True},
    ) as answer:
        lines = [line for line in answer.iter_lines() if line]
    told = list(zip(lines[::2], lines[1::2], strict=True))
    steps = [
        json.loads(data.removeprefix("data: "))
        for name, data in told
        if name == "event: sana.progress"
    ]
    assert [(s["done"], s["total"]) for s in steps if s["stage"] == "denoise"] == [
        *((1, 3), (2, 3), (3, 3))
    ]
    assert told[0][0] == "event: sana.recipes"
    assert told[-1][0] == "event: image_generation.completed"


@pytest.mark.parametrize(("format", "name"), [("jpeg", "JPEG"), ("webp", "WEBP"), ("avif", "AVIF")])
def test_formats_carry_the_recipe(served, tmp_path, format, name):
    answer = served.draw(output_format=format, output_compression=70).json()
    assert answer["output_format"] == format
    file = tmp_path / "a"
    file.write_bytes(base64.b64decode(answer["data"][0]["b64_json"]))
    with Image.open(file) as image:
        assert image.format == name
    assert recipe_of(str(file))[0] == answer["data"][0]["recipe"]


def test_an_image_can_be_a_url(served):
    told = served.draw(response_format="url", metadata="none").json()["data"][0]
    data = served.client.get(told["url"]).content
    assert PROMPT.encode() not in data
    listed = served.client.get("/v1/images").json()["data"]
    assert listed[0]["id"] == told["id"]
    assert listed[0]["recipe"] == told["recipe"]
    assert listed[0]["command"].startswith(f"sana generate '{PROMPT}' --model demo")
    assert served.client.delete(f"/v1/images/{told['id']}").json()["deleted"]
    assert served.client.get(told["url"]).status_code == 404


def test_models_are_those_on_this_machine(client):
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").sides == [256, 512]


@pytest.mark.parametrize(("effort", "steps"), [("low", 10), ("auto", 20), ("hd", 40)])
def test_quality_is_a_number_of_steps(served, effort, steps):
    told = served.client.post(
        "/v1/images/generations", json={"prompt": "a", "quality": effort, "dry_run": True}
    ).json()
    assert told["recipes"][0]["steps"] == steps


@pytest.mark.parametrize(
    ("fields", "status", "param", "says"),
    [
        ({"stpes": 2}, 400, "stpes", "did you mean steps?"),
        ({"steps": 0}, 400, "steps", "greater than or equal to 1"),
        ({"num_inference_steps": 1001}, 400, "num_inference_steps", "less than or equal to 1000"),
        ({"num_inference_steps": 2}, 400, "num_inference_steps", "are the same"),
        ({"n": 11}, 400, "n", "less than or equal to 10"),
        ({"seed": "1..11"}, 400, "seed", "more than 10"),
        ({"seed": "x"}, 400, "seed", "is not a seed"),
        ({"size": "1x1"}, 400, "size", "below the smallest side"),
        ({"size": "9000x9000"}, 400, None, "9000x9000"),
        ({"negative_prompt": "b", "guidance_scale": 1}, 400, "negative_prompt", "no effect"),
        ({"solver": "scm"}, 400, "solver", "cannot be sampled"),
        ({"quality": "hd"}, 400, "quality", "how many steps"),
        ({"output_compression": 0, "output_format": "jpeg"}, 400, "output_compression", "1"),
        ({"output_compression": 50}, 400, "output_compression", "no effect on PNG"),
        ({"background": "transparent"}, 400, "background", "opaque"),
        ({"partial_images": 1}, 400, "partial_images", "without stream"),
        ({"stream": True, "response_format": "url"}, 400, "response_format", "b64_json"),
        ({"guidance_scale": "much"}, 400, "guidance_scale", "number"),
        ({"strength": 0.5}, 400, "strength", "without image"),
        ({"mask": "alpha"}, 400, "mask", "without image"),
        ({"image": "/etc/passwd"}, 400, "image", "send it as a file"),
        ({"mask": "/etc/passwd"}, 400, "mask", "alpha"),
        ({"device": "cpu"}, 400, "device", "unknown field"),
        ({"lora": ["/etc/passwd"]}, 400, "lora", "offers no LoRA '/etc/passwd'"),
        ({"lora": ["a:x"]}, 400, "lora", "is not a scale"),
        ({"lora": ["a"] * 9}, 400, "lora", "at most 8"),
        ({"vae": "/etc"}, 400, "vae", "should be"),
        ({"controlnet": "/etc"}, 400, "controlnet", "should be"),
        ({"model": "/etc"}, 404, "model", "offers no model"),
        ({"model": "someone/else"}, 404, "model", "offers no model"),
        ({"model": "sana-0.6b-512"}, 404, "model", "sana models pull"),
        ({"prompt": " "}, 400, None, "empty"),
        ({"prompt": "a\0"}, 400, None, "NUL"),
        ({"prompt": "a" * 20_001}, 400, "prompt", "20000"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_what_cannot_be_is_an_error_that_names_the_field(served, fields, status, param, says):
    answer = served.draw(**fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param), error
    assert says in error["message"]
    assert error["type"] == "invalid_request_error"


def test_every_option_is_a_field_unless_it_is_declared_otherwise():
    fields = request_model().model_fields.keys()
    assert fields == {"prompt", *by_name(), *ALIASES, *PROTOCOL, "mask"}  # which may be "alpha"
    everything = declared(Settings, Seeds, FileOptions, RunOptions)
    for name, one in everything.items():
        if name in by_name():
            assert one.option.http
            # What names a file of the server is not for strangers; these are one of a list each.
            assert name in ("model", "lora", "vae", "controlnet") or not is_path(one)
    assert set(uploads()) == {"image", "mask", "control"}
    assert not fields & declared(RunOptions).keys()
