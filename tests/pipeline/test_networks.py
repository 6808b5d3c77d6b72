"""Which networks stay loaded: what fits does, and the least recently used go first."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sana_cli.errors import NotEnoughMemory
from sana_cli.models.cuda_graph import RepeatedCall
from sana_cli.pipeline.networks import NetworkKey, Networks, identity_of
from sana_cli.pipeline.oom_retry import Notice, OOMRetry
from sana_cli.pipeline.plan import Plan
from sana_cli.recipe import Adapter
from sana_cli.weights.layout import Part
from sana_cli.weights.single_file import read_single_file


def key(part: str) -> NetworkKey:
    return NetworkKey(part, (), "float32")


@pytest.fixture
def networks() -> Networks:
    """Three of 100 bytes, the decoder used last."""
    made = Networks()
    for part in ("text_encoder", "transformer", "decoder"):
        made.add(key(part), nn.Linear(1, 1), 100)
    return made


def parts(networks: Networks) -> list[str]:
    return [loaded.part for loaded in networks.loaded]


def test_what_fits_stays(networks):
    networks.make_room(needed=300, budget=500, using=key("decoder"), device="cpu")
    assert parts(networks) == ["text_encoder", "transformer", "decoder"]
    assert networks.held_bytes == 300


def test_the_least_recently_used_go_first_and_no_more_than_need_be(networks):
    networks.make_room(needed=300, budget=400, using=key("decoder"), device="cpu")
    assert parts(networks) == ["transformer", "decoder"]


def test_a_network_that_fell_back_to_the_cpu_holds_nothing_of_the_gpu(networks):
    networks.add(key("encoder"), nn.Linear(1, 1, device="meta"), 100)
    networks.add(key("text_encoder")._replace(device="meta"), object(), 30)
    assert (networks.held_on("meta:1"), networks.held_on("cpu")) == (130, 300)
    networks.make_room(needed=300, budget=430, using=key("decoder"), device="meta")
    assert len(networks.loaded) == 5
    networks.make_room(needed=300, budget=400, using=key("decoder"), device="meta")
    assert [loaded.part for loaded in networks.loaded if loaded.part == "encoder"] == []
    assert networks.held_on("cpu") == 300


def with_graph(networks: Networks, part: str, nbytes: int) -> RepeatedCall:
    """Give a network a graph of so many bytes, which goes as others do."""
    graph = networks.find(key(part)).graph = RepeatedCall()
    graph._graph = SimpleNamespace(nbytes=nbytes)
    networks.find(key("decoder"))
    return graph


def test_a_cuda_graph_counts_as_part_of_its_network(networks):
    graph = with_graph(networks, "transformer", 60)
    networks.make_room(needed=300, budget=560, using=key("decoder"), device="cpu")
    assert graph.nbytes == 60
    assert parts(networks) == ["text_encoder", "transformer", "decoder"]


def test_a_cuda_graph_goes_before_a_network_does(networks):
    graph = with_graph(networks, "transformer", 60)
    networks.make_room(needed=300, budget=500, using=key("decoder"), device="cpu")
    assert graph.nbytes == 0
    assert parts(networks) == ["text_encoder", "transformer", "decoder"]


def test_the_graph_of_the_network_in_use_stays(networks):
    graph = with_graph(networks, "decoder", 60)
    networks.make_room(needed=300, budget=400, using=key("decoder"), device="cpu")
    assert graph.nbytes == 60
    assert parts(networks) == ["transformer", "decoder"]


def test_being_found_counts_as_use(networks):
    assert networks.find(key("text_encoder")) is not None
    networks.make_room(needed=300, budget=400, using=key("decoder"), device="cpu")
    assert parts(networks) == ["decoder", "text_encoder"]


def test_the_network_in_use_stays_whatever_it_needs(networks):
    networks.make_room(needed=9000, budget=400, using=key("transformer"), device="cpu")
    assert parts(networks) == ["transformer"]


def test_of_one_network_with_loras_the_last_stays_beside_that_without(networks):
    scaled = [key("transformer")._replace(adapters=(Adapter("x", s),)) for s in (0.5, 1.0)]
    networks.add(scaled[0], nn.Linear(1, 1), 100)
    networks.make_room(needed=0, budget=9000, using=scaled[1], device="cpu")
    assert scaled[0] not in networks.loaded
    assert parts(networks) == ["text_encoder", "transformer", "decoder"]
    networks.add(scaled[1], nn.Linear(1, 1), 100)
    networks.make_room(needed=0, budget=9000, using=key("transformer"), device="cpu")
    assert scaled[1] in networks.loaded


def test_a_checkpoint_in_one_file_is_the_same_network_until_it_is_replaced(tmp_path, networks):
    path = tmp_path / "mine.safetensors"

    def opened() -> NetworkKey:
        """As every call opens it."""
        part = Part(tmp_path, (read_single_file(path),))
        return NetworkKey("transformer", identity_of(part), "float32")

    for side in (2, 3):
        save_file({"patch_embed.proj.weight": torch.zeros(side, side)}, path)
        assert networks.find(opened()) is None
        networks.add(opened(), nn.Linear(1, 1), 100)
        assert networks.find(opened()) is not None


def running_out(times: int):
    left = [times]

    def work(plan: Plan) -> Plan:
        if left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("the test's")
        return plan

    return work


def outcome(retry: OOMRetry, work) -> tuple[list[Notice], Plan]:
    notices = []
    attempt = retry.attempt(work)
    while True:
        try:
            notices.append(next(attempt))
        except StopIteration as stop:
            return notices, stop.value


def test_running_out_first_releases_what_is_idle_and_keeps_the_plan(networks):
    def release() -> bool:
        return networks.release_idle(key("decoder"), "cpu")

    retry = OOMRetry(Plan("cpu").fallback_plans("decode"), "seed 7", release)
    notices, plan = outcome(retry, running_out(1))
    assert plan == Plan("cpu")
    assert parts(networks) == ["decoder"]
    assert [notice.warning for notice in notices] == [False]
    notices, plan = outcome(retry, running_out(1))
    assert plan.strip_bytes < Plan("cpu").strip_bytes
    assert notices[0].warning
    assert "out of memory; retrying with" in notices[0].text


def test_where_nothing_is_left_to_try_it_is_an_error_with_what_to_do():
    retry = OOMRetry(Plan("cpu").fallback_plans("encode"), "the text encoder")
    with pytest.raises(NotEnoughMemory, match="the text encoder: not enough memory") as error:
        outcome(retry, running_out(5))
    assert error.value.hint
