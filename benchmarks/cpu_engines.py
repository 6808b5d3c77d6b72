"""A step and a decode of the 0.6B on a CPU: `sana`, diffusers, diffusers compiled, and OpenVINO.

    pip install openvino
    python benchmarks/cpu_engines.py --save benchmarks/cpu-engines.json

Random weights in float32, one thread, all in one process: every engine is called in each round, and
the fewest seconds of CPU time count, which other programs disturb least. A step includes both
streams of guidance. `--layers` of the transformer's 28 blocks run, as they are alike and four
engines hold their weights. OpenVINO converts the modules of diffusers and runs them in float32.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from cpu import DIT, PADDED, inputs
from decode import RELEASED

Call = Callable[[], object]


def steps(layers: int, side: int) -> dict[str, Call]:
    """Return a step of every engine, on the same weights."""
    from diffusers import SanaTransformer2DModel

    from sana_cli.models.configs import DiTConfig
    from sana_cli.models.dit import DiT
    from sana_cli.models.fused_dit import FusedDiT

    torch.manual_seed(0)
    config = DIT | {"num_layers": layers}
    theirs = SanaTransformer2DModel(**config).eval().requires_grad_(False)
    plain = DiT(DiTConfig(**config))
    plain.load_state_dict(theirs.state_dict())
    ours = FusedDiT(plain.requires_grad_(False))
    ours.pack(mapped=False)
    sample, empty, text = inputs(side)
    time_modulation = ours.time_modulations([500.0])[0]
    texts = [ours.encode_text(states) for states in (empty, text)]
    states, mask = torch.zeros(2, PADDED, 2304), torch.zeros(2, PADDED)
    for i, one in enumerate((empty, text)):
        states[i, : one.shape[1]], mask[i, : one.shape[1]] = one, 1
    given = {
        "hidden_states": torch.cat([sample] * 2),
        "encoder_hidden_states": states,
        "timestep": torch.full((2,), 500.0),
        "encoder_attention_mask": mask,
    }
    compiled, converted = torch.compile(theirs), convert(Step(theirs), given)
    return {
        "sana": lambda: ours.velocity(sample, time_modulation, texts),
        "diffusers": lambda: theirs(**given, return_dict=False),
        "diffusers-compiled": lambda: compiled(**given, return_dict=False),
        "openvino": converted,
    }


def decodes(side: int) -> dict[str, Call]:
    """Return a decode by every engine, on the same weights."""
    from diffusers import AutoencoderDC

    from sana_cli.models.configs import DCAEConfig
    from sana_cli.models.dc_ae import Decoder
    from sana_cli.models.streaming.autoencoder import decode, prepare

    torch.manual_seed(0)
    theirs = AutoencoderDC(**RELEASED).decoder.eval().requires_grad_(False)
    ours = Decoder(DCAEConfig(**RELEASED)).requires_grad_(False)
    ours.load_state_dict(theirs.state_dict())
    prepare(ours, torch.float32)
    latent = inputs(side)[0]
    compiled, converted = torch.compile(theirs), convert(theirs, {"hidden_states": latent})
    return {
        "sana": lambda: decode(ours, latent),
        "diffusers": lambda: theirs(latent),
        "diffusers-compiled": lambda: compiled(latent),
        "openvino": converted,
    }


class Step(torch.nn.Module):
    """A transformer of diffusers that returns a tensor."""

    def __init__(self, plain: torch.nn.Module) -> None:
        super().__init__()
        self.plain = plain

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_attention_mask: torch.Tensor,
    ) -> torch.Tensor:
        given = hidden_states, encoder_hidden_states, timestep
        mask = encoder_attention_mask
        return self.plain(*given, encoder_attention_mask=mask, return_dict=False)[0]


def convert(module: torch.nn.Module, given: dict[str, torch.Tensor]) -> Call:
    import openvino

    example, shapes = tuple(given.values()), [list(tensor.shape) for tensor in given.values()]
    model = openvino.convert_model(module, example_input=example, input=shapes)
    hints = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = openvino.Core().compile_model(model, "CPU", hints)
    values = [tensor.numpy() for tensor in example]
    return lambda: compiled(values)


def fewest(ways: dict[str, Call], rounds: int) -> dict[str, float]:
    """Call every way in each round, after a warm-up; return the fewest CPU seconds of each."""
    for way in ways.values():
        way()
    seen: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            began = time.process_time()
            way()
            seen[name].append(time.process_time() - began)
    return {name: min(values) for name, values in seen.items()}


@torch.no_grad()
def main() -> None:
    from sana_cli.system.devices import reuse_freed_blocks

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--step-sides", type=int, nargs="*", default=[512, 1024])
    parser.add_argument("--decode-sides", type=int, nargs="*", default=[512])
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    reuse_freed_blocks()
    report = {
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": 1,
        "torch": torch.__version__,
        "layers": options.layers,
        "rounds": options.rounds,
        "rows": [],
    }
    sizes = [("step", side) for side in options.step_sides]
    sizes += [("decode", side) for side in options.decode_sides]
    for what, side in sizes:
        ways = steps(options.layers, side) if what == "step" else decodes(side)
        load = os.getloadavg()[0]
        row = {"what": what, "side": side, "seconds": fewest(ways, options.rounds)}
        report["rows"].append(row | {"load": [load, os.getloadavg()[0]]})
        del ways
        torch.compiler.reset()
        text = json.dumps(report, indent=1)
        if options.save:
            options.save.write_text(text + "\n")
        sys.stdout.write(json.dumps(report["rows"][-1]) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
