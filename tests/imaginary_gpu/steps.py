"""Steps with a ControlNet and perturbed-attention guidance on the second of the cards, as JSON."""

import json
import sys
from collections import Counter

import torch

from card import Cards, card
from sana_cli.models import cuda_graph, fused_dit
from sana_cli.models.architectures import NARROW
from sana_cli.models.configs import ControlNetConfig
from sana_cli.models.controlnet import ControlNet
from sana_cli.models.dit import DiT

CONTROLNET = ControlNetConfig(
    num_attention_heads=36,
    num_cross_attention_heads=16,
    cross_attention_head_dim=72,
    cross_attention_dim=1152,
)
DEVICE = "cuda:1"  # while cuda:0 is the current one
captured = []


class Counted(cuda_graph.GraphedCall):
    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        captured.append(len(launched))


with card() as launched, torch.inference_mode():
    dtype = torch.bfloat16
    cuda_graph.GraphedCall = Counted
    fused = fused_dit.FusedDiT(DiT(NARROW).to(dtype), ControlNet(CONTROLNET).to(dtype))
    fused.to_device(DEVICE, None)
    latents = torch.empty(1, 32, 32, 32, dtype=dtype, device=DEVICE)
    texts = [
        torch.empty(1, n, NARROW.caption_channels, dtype=dtype, device=DEVICE) for n in (1, 30)
    ]
    contexts = [fused.encode_text(text, 32) for text in texts]
    steps = fused.time_modulations([900.0, 700.0, 500.0, 300.0])
    control = fused.encode_control(latents, 0.8)
    shapes = [tuple(fused.velocity(latents, step, contexts, control, (8,)).shape) for step in steps]
    document = {
        "error": fused.graph.error,
        "graph_bytes": fused.graph.nbytes,
        "captures": len(captured),
        "shapes": shapes,
        "kernels": Counter(case.kernel.__name__ for case in launched),
    }
    # Two runs of two steps, with other shapes.
    document["captures_of_short_runs"] = []
    for step, left in zip(steps, (1, 0, 1, 0), strict=True):
        fused.velocity(latents[..., :8], step, contexts, left=left)
        document["captures_of_short_runs"].append(len(captured) - document["captures"])
    # With other shapes, and no memory for their graph.
    Cards.fail = torch.OutOfMemoryError("CUDA out of memory. Tried\nto allocate")
    for step in steps:
        fused.velocity(latents[..., :16], step, contexts)
    document |= {"without_graph": fused.graph.error, "left": fused.graph.nbytes}
    Cards.fail = None
    for step in steps:
        fused.velocity(latents, step, contexts)
    document["again"] = fused.graph.error, fused.graph.nbytes
sys.stdout.write(json.dumps(document))
