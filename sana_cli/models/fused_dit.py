"""The Linear DiT in the form that runs: the function of `dit.DiT` with nothing computed twice.

What depends on the text alone, on the timestep alone or on the control image alone is computed once
an image. The rest is a sequence of the operations in `kernels/`, token-major throughout, on
`row_chunk` rows of the latent grid at a time where memory is short. The result equals that of the
plain model up to rounding.

Shapes as in `dit.py`: D width, h w the latent grid, N = h·w tokens, L text tokens. A *stream* is
one evaluation of the network on the same latents: unconditional and conditional are two.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from sana_cli.kernels.linear import linear
from sana_cli.kernels.modulation import modulate
from sana_cli.models import w8a8
from sana_cli.models.configs import ControlNetConfig, DiTConfig
from sana_cli.models.controlnet import ControlNet
from sana_cli.models.cross_attention import TextContext
from sana_cli.models.cuda_graph import RepeatedCall
from sana_cli.models.dit import Block, DiT
from sana_cli.models.fused_controlnet import ControlBranch, ControlContext, FusedControlNet
from sana_cli.models.fused_layers import FusedBlock, FusedPatchEmbed, frozen
from sana_cli.system.memory import PeakMemory

# With equal shapes, for a CUDA graph to pay. The first call runs without one, and capturing takes
# Python as long as a call, while the GPU idles; a replay saves a part of that.
LEAST_CALLS = 4


class TimeModulation(NamedTuple):
    """What a timestep determines."""

    modulation: Tensor  # (6, D), shared by all blocks
    embedding: Tensor  # (D,), for the last norm
    control: Tensor  # (6, D), shared by the blocks of the ControlNet; (0, 6, D) without one


class FusedDiT(nn.Module):
    """Takes over the weights of a `DiT` and of its `ControlNet`; use neither afterwards.

    With a ControlNet, contexts and time modulations serve both networks, and every evaluation may
    be controlled or not. ValueError if the ControlNet was made for another transformer.
    """

    def __init__(self, dit: DiT, controlnet: ControlNet | None = None) -> None:
        super().__init__()
        self.config = dit.config
        self.row_chunk: int | None = None  # rows of the latent grid to run at once; None: all
        self.graph = RepeatedCall()
        if controlnet is not None:
            controlnet.config.check_matches(dit.config)
        blocks = [cast(Block, block) for block in dit.transformer_blocks]
        self.patch_embed = FusedPatchEmbed(dit.patch_embed)
        self.time_embed = dit.time_embed
        self.caption_projection, self.caption_norm = dit.caption_projection, dit.caption_norm
        self.tables = frozen(torch.stack([block.scale_shift_table for block in blocks]))
        self.last_table = frozen(dit.scale_shift_table)
        self.proj_out = dit.proj_out
        self.blocks = nn.ModuleList()
        while blocks:  # each is freed before the next is merged
            del dit.transformer_blocks[0]
            self.blocks.append(FusedBlock(blocks.pop(0)))
        self.controlnet = FusedControlNet(controlnet) if controlnet is not None else None

    def to_device(self, device: str, row_chunk: int | None) -> None:
        """Move to a device and run on `row_chunk` rows of the latent grid at a time (None: all)."""
        target = torch.empty(0, device=device).device  # "cuda" with its index
        if row_chunk != self.row_chunk or target != self.tables.device:
            self.graph.forget()
        self.row_chunk = row_chunk
        self.to(target)

    def pack(self, mapped: bool) -> None:
        """Pack the projections of all blocks: see `FusedBlock.pack`. The results stay the same."""
        for network in (self, self.controlnet):
            if network is not None:
                for block in network.blocks:
                    cast(FusedBlock, block).pack(mapped)

    def encode_text(self, text: Tensor, padded: int = 1, fold: bool = True) -> list[TextContext]:
        """Text states (1, L, caption_channels) -> a context for every block.

        Those of the ControlNet's blocks follow those of the transformer's. See
        `TextAttention.encode_text` for `padded` and `fold`.
        """
        contexts: list[TextContext] = []
        for network in (self, self.controlnet):
            if network is not None:
                caption = network.caption_norm(network.caption_projection(text))
                attentions = [cast(FusedBlock, block).text_attention for block in network.blocks]
                contexts += [one.encode_text(caption, padded, fold) for one in attentions]
        return contexts

    def time_modulations(
        self, timesteps: Sequence[float], guidance: Tensor | None = None
    ) -> list[TimeModulation]:
        """Embed all timesteps of a run, given in the units that the model was trained with.

        `guidance` (1,), already scaled, for Sana-Sprint only.
        """
        times = torch.tensor(timesteps, device=self.tables.device)
        modulations, embeddings = self.time_embed(
            *([times] if guidance is None else [times, guidance])
        )
        if self.controlnet is None:
            controls = modulations.new_empty((len(timesteps), 0, *modulations.shape[1:]))
        else:
            controls, _ = self.controlnet.time_embed(times)
        return list(map(TimeModulation, modulations, embeddings, controls))

    def encode_control(self, latents: Tensor, scale: float = 1.0) -> ControlContext:
        """Latents (1, 32, h, w) of a control image -> what every step needs of them.

        The latents are scaled like those of an image to start from. `scale` multiplies what the
        ControlNet adds to the transformer.
        """
        assert self.controlnet is not None, "this transformer has no ControlNet"
        return self.controlnet.encode_control(latents, scale)

    def velocity(
        self,
        latents: Tensor,
        time: TimeModulation,
        texts: Sequence[list[TextContext]],
        control: ControlContext | None = None,
        pag_layers: Sequence[int] = (),
        left: int | None = None,
    ) -> Tensor:
        """`forward`; on CUDA through one graph from the second call with the same shapes on.

        left: how many such calls will follow, if that is known. There is no graph as long as these
        and those before are too few for it to pay.
        """
        if not latents.is_cuda or self.row_chunk:
            return self(latents, time, texts, control, pag_layers)
        contexts = chain.from_iterable(texts)
        inputs = [latents, *time, *chain.from_iterable(contexts), *(control or ())]
        forward = partial(self._forward_flat, texts, control is not None, pag_layers)
        pays = left is None or self.graph.calls + 1 + left >= LEAST_CALLS
        return self.graph(forward, inputs, (control is None, tuple(pag_layers)), pays)[0]

    def forward(
        self,
        latents: Tensor,
        time: TimeModulation,
        texts: Sequence[list[TextContext]],
        control: ControlContext | None = None,
        pag_layers: Sequence[int] = (),
    ) -> Tensor:
        """Velocities (streams, 32, h, w) of the same latents, one stream for each text.

        latents (1, 32, h, w) in the dtype of the weights, which the result has too. With
        `control`, the ControlNet takes part. With `pag_layers` a stream follows for
        perturbed-attention guidance: the last text once more, with identity self-attention in
        these blocks. Up to the first of them it equals the stream of that text, so it starts there.
        """
        if not all(0 <= layer < len(self.blocks) for layer in pag_layers):
            raise ValueError(f"pag_layers is {pag_layers}, of {len(self.blocks)} blocks")
        grid = latents.shape[2], latents.shape[3]
        x = self.patch_embed(latents)
        modulation = self.tables + time.modulation  # (layers, 6, D)
        branch = None
        if control is not None:
            assert self.controlnet is not None, "this transformer has no ControlNet"
            own_texts = [text[len(self.blocks) :] for text in texts]
            branch = ControlBranch(
                self.controlnet, latents, time.control, own_texts, control, self.row_chunk
            )
        for i, block in enumerate(self.blocks):
            contexts = [text[i] for text in texts]
            if pag_layers and i >= min(pag_layers):
                contexts.append(contexts[-1])
            rows, perturbed = modulation[i].unbind(), i in pag_layers
            x = block(x, rows, contexts, grid, self.row_chunk, perturbed)
            if branch is not None:
                branch.add_to(x, i)
        del branch
        shift, scale = (self.last_table + time.embedding).unbind()
        last = self.proj_out
        chunks = x.split(self.row_chunk * grid[1] if self.row_chunk else x.shape[1], dim=1)
        tokens = (modulate(chunk, shift, scale, self.config.norm_eps) for chunk in chunks)
        x = torch.cat([linear(chunk, last.weight, last.bias) for chunk in tokens], dim=1)
        return x.transpose(1, 2).unflatten(-1, grid)

    def _forward_flat(
        self,
        like: Sequence[list[TextContext]],
        controlled: bool,
        pag_layers: Sequence[int],
        inputs: Sequence[Tensor],
    ) -> tuple[Tensor]:
        """`forward` with its tensors as one flat list; `like` tells the kinds of its contexts."""
        latents, *rest = inputs
        tensors = iter(rest)
        time = TimeModulation(*islice(tensors, len(TimeModulation._fields)))
        texts = [[type(one)(*islice(tensors, len(one))) for one in text] for text in like]
        control = ControlContext(*tensors) if controlled else None
        return (self(latents, time, texts, control, pag_layers),)


def peak_bytes(
    config: DiTConfig,
    dtype: torch.dtype,
    grid: tuple[int, int],
    text_lengths: Sequence[int],
    steps: int,
    *,
    row_chunk: int | None = None,
    batched_cfg: bool = True,
    fold: bool = True,
    controlnet: ControlNetConfig | None = None,
    perturbed: bool = False,
    quantised: bool = False,
) -> int:
    """Predict the most bytes that denoising one image takes, weights included.

    grid: (h, w) of the latents. text_lengths: tokens of each text, the prompt last. batched_cfg:
    whether all texts run in one batch, or each by itself. fold: as in `FusedDiT.encode_text`.
    controlnet: the one that takes part. perturbed: whether the prompt has a second stream for
    perturbed-attention guidance. quantised: whether the projections are in 8 bits.
    """
    with torch.device("meta"):
        weights = _parameters(DiT(config)) * dtype.itemsize
        # A block frees its activations before the next one runs, so two blocks stand for all: the
        # first, which starts streams, and one that follows.
        dit = DiT(replace(config, num_layers=2)).requires_grad_(False).to(dtype)
        branch, control = None, None
        if controlnet is not None:
            weights += _parameters(ControlNet(controlnet)) * dtype.itemsize
            branch = ControlNet(replace(controlnet, num_layers=1)).requires_grad_(False).to(dtype)
        fused = FusedDiT(dit, branch)
        fused.row_chunk = row_chunk
        blocks = config.num_layers + (controlnet.num_layers if controlnet is not None else 0)
        if quantised:
            before = nbytes(fused.blocks[0])
            w8a8.install(fused, w8a8.quantise(fused))
            weights -= blocks * (before - nbytes(fused.blocks[0]))
        sample = torch.empty((1, config.in_channels, *grid))
        states = torch.empty((1, max(text_lengths), config.caption_channels), dtype=dtype)
        modulation = torch.empty((6, config.width), dtype=dtype)
    texts = [fused.encode_text(states[:, :length], fold=fold) for length in text_lengths]
    time = TimeModulation(modulation, modulation[0], modulation if controlnet else modulation[:0])
    pag_layers = (0,) if perturbed else ()
    if controlnet is not None:
        control = fused.encode_control(sample)
    with PeakMemory() as memory:
        latents = sample.to(dtype)
        fused(latents, time, texts if batched_cfg else texts[-1:], control, pag_layers)
    contexts = [sum(tensor.nbytes for tensor in text[0]) for text in texts]  # of one block
    if fold and config.qk_norm is None:
        # A shorter prompt may take more than a long one: up to D² numbers a block once folded.
        contexts[-1] = max(contexts[-1], config.width**2 * dtype.itemsize)
    constants = blocks * sum(contexts) + sum(tensor.nbytes for tensor in control or ())
    constants += steps * sum(tensor.nbytes for tensor in time)
    # In float32 the sampler holds the sample, two estimates of x₀, the noise, and the velocities.
    sampler = (4 + 2 + perturbed) * sample.nbytes
    return weights + constants + memory.peak + sampler


def quantising_bytes(
    config: DiTConfig, dtype: torch.dtype, controlnet: ControlNetConfig | None = None
) -> int:
    """Bound the bytes of the networks while their weights are quantised: both kinds are held."""
    with torch.device("meta"):
        weights = _parameters(DiT(config))
        if controlnet is not None:
            weights += _parameters(ControlNet(controlnet))
    return weights * (dtype.itemsize + 1)


def nbytes(network: nn.Module) -> int:
    """Return the bytes of all tensors of a network."""
    return sum(t.nbytes for t in chain(network.parameters(), network.buffers()))


def _parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())
