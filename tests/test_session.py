"""One session under everything: networks outlive a call, and nothing of an image depends on it."""

import io
import shutil
import threading
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from sana_cli import Pipeline, SanaError
from sana_cli.batch import worker
from sana_cli.batch.jobs import RowReader
from sana_cli.batch.rows import parse
from sana_cli.batch.run import Batch, RunPolicy, Summary
from sana_cli.batch.this_process import ThisProcess
from sana_cli.images.names import parse_batch_output
from sana_cli.pipeline.draw import Event, ImageDone, Progress
from sana_cli.session import Session
from sana_cli.settings import FileOptions, Seeds, Settings, declared
from sana_cli.system.signals import StopRequest

PROMPT = "a red circle on a blue background"
SMALL = {"res": "256", "steps": 1}


def loads(events: list[Event]) -> list[str]:
    """The networks that were loaded, in order."""
    return [e.network for e in events if isinstance(e, Progress) and e.stage == "load"]


@pytest.fixture
def told() -> list[Event]:
    return []


def test_a_second_call_loads_nothing_and_draws_the_same_bytes(told):
    with Pipeline("demo", cache=False) as pipeline:
        cold = pipeline.generate(PROMPT, seed=7, progress=told.append, **SMALL)[0]
        assert loads(told) == ["text_encoder", "transformer", "decoder"]
        told.clear()
        warm = pipeline.generate(PROMPT, seed=7, progress=told.append, **SMALL)[0]
        assert loads(told) == []
        assert warm.tobytes() == cold.tobytes()
        assert "transformer" in repr(pipeline)
    assert "nothing loaded" in repr(pipeline)
    pipeline.generate(PROMPT, seed=7, progress=told.append, **SMALL)
    assert loads(told) == ["text_encoder", "transformer", "decoder"]
    pipeline.close()


def test_without_keeping_every_call_loads_and_the_bytes_are_the_same(told):
    kept = Pipeline("demo", cache=False).generate(PROMPT, seed=7, **SMALL)[0]
    pipeline = Pipeline("demo", cache=False, keep_loaded=False)
    for _ in range(2):
        told.clear()
        image = pipeline.generate(PROMPT, seed=7, progress=told.append, **SMALL)[0]
        assert loads(told) == ["text_encoder", "transformer", "decoder"]
        assert image.tobytes() == kept.tobytes()
        assert pipeline.session.networks.loaded == []


def test_calls_of_two_threads_queue():
    pipeline = Pipeline("demo", cache=False)
    order: list[int] = []
    images = {}

    def work(seed: int) -> None:
        done = pipeline.generate(
            PROMPT, seed=seed, progress=lambda event: order.append(seed), res="256", steps=2
        )
        images[seed] = done[0].tobytes()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    turns = [seed for i, seed in enumerate(order) if i == 0 or order[i - 1] != seed]
    assert sorted(turns) == [1, 2, 3], "no two calls interleave"
    for seed, drawn in images.items():
        alone = Pipeline("demo", cache=False).generate(PROMPT, seed=seed, res="256", steps=2)[0]
        assert alone.tobytes() == drawn


def test_a_callback_that_draws_is_refused_and_the_session_goes_on():
    pipeline = Pipeline("demo")

    def again(event: Event) -> None:
        pipeline.generate(PROMPT, seed=1, **SMALL)

    with pytest.raises(SanaError, match="already drawing"):
        pipeline.generate(PROMPT, seed=1, progress=again, **SMALL)
    assert pipeline.generate(PROMPT, seed=1, **SMALL)


def test_an_input_image_that_is_overwritten_between_two_calls_is_read_again(tiny_sprint, tmp_path):
    path = tmp_path / "in.png"
    pipeline = Pipeline(tiny_sprint)
    hashes = []
    for shade in (10, 240):
        Image.fromarray(np.full((64, 64, 3), shade, np.uint8)).save(path)
        image = pipeline.generate(
            "a fox", seed=1, image=path, strength=0.5, instruction=False, res="512"
        )[0]
        hashes.append(image.recipe.image)
    assert hashes[0] != hashes[1]


def test_weights_that_are_replaced_between_two_calls_are_loaded_again(tiny_model, tmp_path, told):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    pipeline = Pipeline(folder, cache=False)
    call = {"seed": 1, "steps": 1, "instruction": False, "progress": told.append}
    before = pipeline.generate("a fox", **call)[0]
    told.clear()
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = {name: 1.5 * tensor for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, {"format": "pt"})
    after = pipeline.generate("a fox", **call)[0]
    assert loads(told) == ["transformer"]
    assert before.tobytes() != after.tobytes()


def test_where_only_one_network_fits_they_take_turns_and_the_image_is_the_same(told):
    session = Session(cache=False)
    request = session.request([Settings(PROMPT, model="demo", res="256", steps=1)], [7])
    plan = session.plan(request)
    (roomy,) = (e.pixels for e in session.draw(request, plan) if isinstance(e, ImageDone))
    tight = replace(plan, budget=max(plan.bounds.values()), keep_loaded=False)
    for _ in range(2):
        told = list(session.draw(request, tight))
        (pixels,) = (e.pixels for e in told if isinstance(e, ImageDone))
        assert np.array_equal(pixels, roomy)
    assert loads(told), "what did not fit beside the others was loaded again"


# --- one load for many rows, one resolution for many seeds --------------------------------------


def batch(folder, session: Session, text: bytes) -> tuple[Batch, list]:
    place, names = parse_batch_output(str(folder / "out"), None, "out")
    defaults = {name: one.default for name, one in declared(Settings, Seeds).items()}
    reader = RowReader(defaults | {"model": "demo"} | SMALL, names, None, None, False)
    rows = list(parse(io.BytesIO(text), "txt", reader.used))
    files, policy = FileOptions(), RunPolicy()
    drawn_by = ThisProcess, session.device
    return Batch(session, reader, place, None, "x.txt", files, policy, *drawn_by), rows


def test_a_pipe_loads_each_network_once_however_many_rounds_its_rows_come_in(tmp_path):
    session = Session(cache=False)
    run, rows = batch(tmp_path, session, b"a red circle\na blue star\na green ring\n")
    events = list(run.run(([row] for row in rows), StopRequest()))
    assert loads(events) == ["text_encoder", "transformer", "decoder"]
    assert next(e for e in events if isinstance(e, Summary)).drawn == 3


def test_a_file_loads_each_network_once_however_many_chunks_it_is_drawn_in(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "GROUP_SIZE", 2)
    session = Session(cache=False)
    run, rows = batch(tmp_path, session, b"".join(b"a red circle\n" for _ in range(5)))
    events = list(run.run([rows], StopRequest()))
    assert loads(events) == ["text_encoder", "transformer", "decoder"]
    assert next(e for e in events if isinstance(e, Summary)).drawn == 5


def test_many_seeds_are_resolved_as_one(sana, monkeypatch):
    from sana_cli import resolve

    calls = []
    plain = resolve.resolve_sampler
    monkeypatch.setattr(resolve, "resolve_sampler", lambda *a: calls.append(1) or plain(*a))
    counts = []
    for count in ("1", "100"):
        calls.clear()
        run = sana("generate", PROMPT, "-m", "demo", "-n", count, "-s", "1", "--dry-run")
        assert run.code == 0, run.err
        counts.append(len(calls))
    assert counts[0] == counts[1]


# --- options are declared once -----------------------------------------------------------------


def test_a_declared_option_is_an_option_a_column_a_key_and_an_argument(sana, tmp_path, monkeypatch):
    """Of every option that may be given in all these ways, the same wrong value is refused."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SanaError, match="--steps 0 is not between 1 and 1000"):
        Pipeline("demo").generate(PROMPT, steps=0)
    said = "--steps 0 is not between 1 and 1000"
    assert said in sana("generate", PROMPT, "-m", "demo", "--steps", "0").err
    (tmp_path / "rows.csv").write_text("prompt,steps\na fox,0\n")
    assert "column steps: " + said in sana("batch", "rows.csv", "-m", "demo").err
    (tmp_path / "sana.toml").write_text("steps = 0\n")
    assert said in sana("generate", PROMPT, "-m", "demo").err
    assert "./sana.toml" in sana("generate", PROMPT, "-m", "demo").err


def test_arguments_that_are_not_declared_are_type_errors_that_name_ours():
    with pytest.raises(TypeError, match="'stpes'.*steps"):
        Pipeline("demo").generate(PROMPT, stpes=3)
    with pytest.raises(TypeError, match="'steps'.*argument of Pipeline.generate"):
        Pipeline("demo", steps=3)
    with pytest.raises(TypeError, match="'dtype'.*argument of Pipeline"):
        Pipeline("demo").generate(PROMPT, dtype="float32")


@pytest.mark.parametrize(
    "wrong", [{"dtype": "half"}, {"text_precision": "fp8"}, {"memory": "much"}, {"device": "tpu"}]
)
def test_what_is_wrong_with_a_constructor_fails_there(wrong):
    with pytest.raises(SanaError):
        Pipeline("demo", **wrong)
