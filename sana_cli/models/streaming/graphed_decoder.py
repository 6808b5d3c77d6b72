"""The decoder in the form that runs: through a CUDA graph where Python is slow to launch it."""

import time
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from sana_cli.models.cuda_graph import RepeatedCall
from sana_cli.models.dc_ae import Decoder
from sana_cli.models.streaming.autoencoder import decode_pipeline
from sana_cli.models.streaming.ops import Size
from sana_cli.models.streaming.strip_pipeline import Decoded

# Share of a decode's time that its launches take, from which on it pays to capture it. The GPU
# waits for Python in the first stages, whose maps are small, and not in the last ones. By the
# prediction in kernels/README.md a graph then saves a quarter of the decode or more.
LAUNCH_BOUND = 0.5


class GraphedDecoder(nn.Module):
    """Takes over a `Decoder`, prepared or not; do not move that one afterwards."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder
        self.graph = RepeatedCall()
        self._capturable = False  # as of the last decode without a graph
        self.launch_share = 0.0  # of the time of the last decode; not known of a first one

    def place(self, device: str, dtype: torch.dtype) -> None:
        """Move to a device, and convert to a precision, what is not there or not in it."""
        target = torch.empty(0, device=device).device  # "cuda" with its index
        if any((p.device, p.dtype) != (target, dtype) for p in self.parameters()):
            self.graph.forget()
            self.to(target, dtype)

    @torch.inference_mode()
    def decode(
        self,
        latent: Tensor,
        *,
        resized: Size | None,
        size: Size | None,
        strip_bytes: int,
        graphed: bool,
    ) -> Decoded:
        """`autoencoder.decode`; if `graphed`, with a CUDA graph for maps in one strip.

        From the second decode of equal shapes on, each is timed by this process's clock and by the
        GPU's. If one was bound by its launches, the next is captured. A graph that is held is freed
        unless `graphed`.
        """
        function = partial(self._decode_flat, resized, size, strip_bytes)
        if not latent.is_cuda:
            return function([latent]).on_cpu()
        if not graphed:
            self.graph.forget()
        stream = torch.cuda.current_stream(latent.device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began = time.perf_counter()
        stream.record_event(start)
        pays = graphed and self._capturable and self.launch_share >= LAUNCH_BOUND
        made = self.graph(function, [latent], (resized, size, strip_bytes), pays)
        stream.record_event(end)
        launching = 1000 * (time.perf_counter() - began)
        decoded = Decoded(*made).on_cpu()
        # The copy has waited for both events. A first decode also compiles and allocates.
        first = self.graph.calls == 1
        self.launch_share = 0.0 if first else launching / start.elapsed_time(end)
        return decoded

    def _decode_flat(
        self, resized: Size | None, size: Size | None, strip_bytes: int, inputs: Sequence[Tensor]
    ) -> Decoded:
        """Decode to pixels that are still on the device."""
        pipeline = decode_pipeline(self.decoder, inputs[0], strip_bytes)
        decoded = pipeline.to_image(resized, size)
        self._capturable = pipeline.capturable
        return decoded
