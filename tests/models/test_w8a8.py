"""The fused transformer with its projections in 8 bits."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from examples import exhaustive
from kernel_checks import DEVICE, MIN_TRITON
from networks import DIT_KINDS, random_dit, relative_error
from sana_cli.kernels import dispatch, launch
from sana_cli.models import w8a8
from sana_cli.models.fused_dit import FusedDiT, nbytes, peak_bytes
from sana_cli.models.fused_layers import PROJECTIONS


def in_8_bits(**config) -> FusedDiT:
    fused = FusedDiT(random_dit(**config))
    w8a8.install(fused, w8a8.quantise(fused))
    return fused


def velocity(fused: FusedDiT, grid: tuple[int, int] = (7, 4), **options) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 32, *grid, generator=generator).to(fused.tables)
    texts = [
        fused.encode_text(torch.randn(1, n, 16, generator=generator).to(fused.tables))
        for n in (2, 5)
    ]
    return fused(latents, fused.time_modulations([700.0])[0], texts, **options)


@pytest.mark.parametrize("kind", DIT_KINDS.values(), ids=DIT_KINDS)
def test_every_kind_of_transformer_differs_by_the_rounding_alone(kind):
    error = relative_error(velocity(in_8_bits(**kind)), velocity(FusedDiT(random_dit(**kind))))
    assert 1e-4 < error < 0.03


def test_chunks_of_rows_give_the_same_numbers():
    fused = in_8_bits()
    whole = velocity(fused)
    fused.row_chunk = 3
    assert relative_error(velocity(fused), whole) < 1e-5


def test_the_perturbed_stream_has_the_quantised_weights_too():
    plain, fused = FusedDiT(random_dit()), in_8_bits()
    found, true = (velocity(one, pag_layers=(0,)) for one in (fused, plain))
    assert found.shape == true.shape == (3, 32, 7, 4)
    assert relative_error(found[2], true[2]) < 0.03


def test_only_the_four_projections_are_replaced():
    fused = in_8_bits()
    narrow = {name for name, buffer in fused.named_buffers() if buffer.dtype == torch.int8}
    assert narrow == {f"blocks.{i}.{name}" for i in range(2) for name in PROJECTIONS}
    assert all(p.dtype == torch.float32 for p in fused.parameters())


def test_less_memory_is_held_and_planned():
    """Six blocks, so that they are most of the network."""
    plain = FusedDiT(random_dit(num_layers=6))
    fused = in_8_bits(num_layers=6)
    saved = nbytes(plain) - nbytes(fused)
    assert saved > 0.4 * nbytes(plain)
    with torch.device("meta"):
        options = plain.config, torch.float32, (4, 4), (1, 5), 2
        planned = peak_bytes(*options) - peak_bytes(*options, quantised=True)
    assert 0.8 * saved < planned <= saved  # a product may need its weight in float32 for a moment


def test_tensors_of_another_network_are_not_taken():
    fused, other = FusedDiT(random_dit()), FusedDiT(random_dit(num_layers=1))
    tensors = w8a8.quantise(fused)
    assert w8a8.is_quantised_from(fused, tensors)
    assert not w8a8.is_quantised_from(other, tensors)
    tensors["blocks.0.qkv_scales"] = tensors["blocks.0.qkv_scales"].double()
    assert not w8a8.is_quantised_from(fused, tensors)


class Launches(TorchDispatchMode):
    """Counts what a GPU has to be given to do: operations other than views and allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        allocates = func.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.new_empty)
        self.count += not (func.is_view or allocates)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["0.6B", "qk-norm"])
def test_quantisation_adds_no_launch(kind):
    found = []
    for build in (in_8_bits, lambda **config: FusedDiT(random_dit(**config))):
        fused = build(**DIT_KINDS[kind]).to("meta")
        # The launches of Triton are recorded, those of torch counted.
        with launch.meta_launches((8, 9)) as cases, Launches() as launches:
            velocity(fused)
        found.append((len(cases), launches.count))
        names = {case.kernel.__name__ for case in cases}
        assert ("linear_silu8_kernel" in names) == (build is in_8_bits)
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", ["0.6B", *exhaustive("qk-norm")])
def test_in_triton_it_gives_what_torch_gives(kind, monkeypatch):
    pytest.importorskip("triton", minversion=MIN_TRITON)
    fused = in_8_bits(num_layers=1, **DIT_KINDS[kind]).to(DEVICE)
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "uses_triton", lambda *given: False)
        true = velocity(fused, (3, 2))
    monkeypatch.setattr(dispatch, "uses_triton", lambda *given: True)
    # Activations half-way between two integers may go either way, and then on.
    assert relative_error(velocity(fused, (3, 2)), true) < 3e-3
