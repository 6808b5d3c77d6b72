"""The cases of diffusers' model tests, on its dummy networks: ours give the same results."""

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from dummies import CONTROLNET, KINDS, TRANSFORMERS, VAE, autoencoder_input, transformer_inputs
from networks import relative_error
from sana_cli.errors import BrokenModel
from sana_cli.models.fused_dit import FusedDiT
from sana_cli.models.streaming.autoencoder import decode
from sana_cli.weights.checkpoint import load_weights, on_meta
from sana_cli.weights.lora import MergedTensors, describe, read_lora

GUIDANCE = torch.tensor([0.45, 0.6])
EACH = pytest.mark.parametrize("kind", KINDS)
EACH_TRANSFORMER = pytest.mark.parametrize("kind", TRANSFORMERS)
DTYPES = {torch.float16: 1e-2, torch.bfloat16: 5e-2}  # and how far results of one may be apart


def residuals(controlnet, inputs) -> tuple[torch.Tensor, ...]:
    control = torch.flip(inputs["hidden_states"], [0])
    call = {**inputs, "controlnet_cond": control, "conditioning_scale": 1.0}
    return controlnet(**call, return_dict=False)[0]


@torch.no_grad()
def theirs(kind: str, network, dtype=torch.float32) -> torch.Tensor:
    """Of the ControlNet, what its transformer of two layers makes of it."""
    if kind == "autoencoder":
        return network(autoencoder_input().to(dtype)).sample
    inputs = {
        n: t.to(dtype) if t.is_floating_point() else t for n, t in transformer_inputs().items()
    }
    if kind == "sprint":
        inputs["guidance"] = GUIDANCE.to(dtype)
    if kind == "controlnet":
        base = TRANSFORMERS["transformer"].build(num_layers=2).to(dtype)
        return base(**inputs, controlnet_block_samples=residuals(network, inputs)).sample
    return network(**inputs).sample


@torch.no_grad()
def ours(kind: str, network, folder, dtype=torch.float32) -> torch.Tensor:
    if kind == "autoencoder":
        return network.decode(network.encode(autoencoder_input().to(dtype)))
    inputs = transformer_inputs()
    latents, text = (inputs[n].to(dtype) for n in ("hidden_states", "encoder_hidden_states"))
    if kind == "controlnet":
        TRANSFORMERS["transformer"].build(num_layers=2).save_pretrained(folder / "base")
        base = TRANSFORMERS["transformer"].load(folder / "base", dtype)
        mask = torch.ones(text.shape[:2], dtype=torch.bool)
        return network(base, latents, latents.flip(0), inputs["timestep"], text, mask, 1.0)
    guidance = GUIDANCE.to(dtype) if kind == "sprint" else None
    return network(latents, inputs["timestep"], network.project_text(text), None, guidance)


@EACH
def test_what_diffusers_has_saved_gives_the_same_output(kind, tmp_path):
    network = KINDS[kind].build()
    network.save_pretrained(tmp_path)
    loaded = KINDS[kind].load(tmp_path)
    got = ours(kind, loaded, tmp_path)
    assert relative_error(got, theirs(kind, network)) < 1e-5
    assert torch.equal(got, ours(kind, loaded, tmp_path)), "the same bits twice"


@EACH
@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
def test_variants_and_shards_are_found(kind, shards, tmp_path):
    network = KINDS[kind].build()
    network.save_pretrained(
        tmp_path, variant="fp16", **({"max_shard_size": "3KB"} if shards else {})
    )
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == shards
    got = ours(kind, KINDS[kind].load(tmp_path), tmp_path)
    assert relative_error(got, theirs(kind, network)) < 1e-5


@EACH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_half_precision_files_load_and_run_in_their_dtype(kind, dtype, tmp_path):
    network = KINDS[kind].build().to(dtype)
    network.save_pretrained(tmp_path)
    loaded = KINDS[kind].load(tmp_path, None)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    got, want = ours(kind, loaded, tmp_path, dtype), theirs(kind, network, dtype)
    assert got.dtype == want.dtype == dtype
    assert relative_error(got, want) < DTYPES[dtype]


# --- the transformer ---------------------------------------------------------------------------


@EACH_TRANSFORMER
@pytest.mark.parametrize("row_chunk", [None, 4])
def test_fused_projections_give_the_same_output(kind, row_chunk, tmp_path):
    """Ours are always fused; the network may also be run on a few rows at once."""
    network = TRANSFORMERS[kind].build()
    network.save_pretrained(tmp_path)
    fused = FusedDiT(TRANSFORMERS[kind].load(tmp_path))
    fused.row_chunk = row_chunk
    inputs = transformer_inputs()
    for row, want in enumerate(theirs(kind, network)):
        text = inputs["encoder_hidden_states"][row : row + 1]
        guidance = GUIDANCE[row : row + 1] if kind == "sprint" else None
        (time,) = fused.time_modulations([inputs["timestep"][row].item()], guidance)
        latents = inputs["hidden_states"][row : row + 1]
        assert relative_error(fused(latents, time, [fused.encode_text(text)])[0], want) < 1e-5


ADAPTERS = {
    "plain": LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]),
    "metadata": LoraConfig(r=4, lora_alpha=12, target_modules=["to_q"]),
    "ranks": LoraConfig(
        r=4, lora_alpha=8, target_modules=["to_q", "to_k"], rank_pattern={"to_k": 2}
    ),
    "bias": LoraConfig(r=4, lora_alpha=4, lora_bias=True, target_modules=["to_out.0"]),
}


def with_adapter(config: LoraConfig, folder):
    """A transformer of diffusers with an adapter, both saved."""
    network = TRANSFORMERS["transformer"].build()
    network.save_pretrained(folder)
    network.add_adapter(config)
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    network.save_lora_adapter(folder / "adapter")
    (file,) = (folder / "adapter").glob("*.safetensors")
    return network, file


def merged(folder, file):
    base = TRANSFORMERS["transformer"].load(folder)
    weights = folder / "diffusion_pytorch_model.safetensors"
    source = MergedTensors([weights], [(read_lora(file), 1.0)], base.config, torch.float32)
    return load_weights(on_meta(type(base), base.config, weights), [source], torch.float32)


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_saved_adapter_gives_the_same_output(name, tmp_path):
    network, file = with_adapter(ADAPTERS[name], tmp_path)
    want = theirs("transformer", network)
    assert relative_error(ours("transformer", merged(tmp_path, file), tmp_path), want) < 1e-5
    network.disable_adapters()
    assert relative_error(theirs("transformer", network), want) > 1e-3
    assert describe(file)["ranks"] == sorted({4, *ADAPTERS[name].rank_pattern.values()})


def test_an_adapter_with_nan_is_refused(tmp_path):
    _, file = with_adapter(ADAPTERS["plain"], tmp_path)
    tensors = load_file(file)
    tensors[min(tensors)].fill_(float("nan"))
    save_file(tensors, file)
    with pytest.raises(BrokenModel, match="not finite"):
        merged(tmp_path, file)


@pytest.mark.parametrize("change", ["missing", "unexpected", "none"])
def test_an_adapter_with_other_keys_is_refused(change, tmp_path):
    """diffusers warns of missing and unexpected keys, and logs where there are none."""
    _, file = with_adapter(ADAPTERS["plain"], tmp_path)
    tensors = load_file(file)
    if change == "missing":
        del tensors[min(tensors)]
    elif change == "unexpected":
        tensors["diffusion_model.nowhere.lora_A.weight"] = torch.ones(4, 8)
    else:
        tensors = {"weight": torch.ones(4, 8)}
    save_file(tensors, file)
    with pytest.raises(BrokenModel):
        merged(tmp_path, file)


# --- the autoencoder ---------------------------------------------------------------------------


def test_strips_and_single_images_are_the_batch_of_whole_ones(tmp_path):
    """Where diffusers cuts tiles and slices batches, ours decodes image by image in strips."""
    network = VAE.build()
    network.save_pretrained(tmp_path)
    loaded = VAE.load(tmp_path).to(memory_format=torch.channels_last)
    with torch.no_grad():
        latents = network.encode(autoencoder_input()).latent
        want = (network.decode(latents).sample * 0.5 + 0.5).clamp(0, 1)
        for one, image in zip(latents, want, strict=True):
            whole = one[None].contiguous(memory_format=torch.channels_last)
            pixels = decode(loaded.decoder, whole, size=(32, 32), strip_bytes=8_000).pixels
            levels = (image.movedim(0, -1) * 255).round()
            assert (pixels - levels).abs().max() <= 1


def test_a_branch_that_no_block_follows_is_refused(tmp_path):
    """Their pair has one layer each: nothing of the ControlNet reaches the transformer."""
    CONTROLNET.build().save_pretrained(tmp_path / "branch")
    TRANSFORMERS["transformer"].build().save_pretrained(tmp_path / "base")
    branch, base = CONTROLNET.load(tmp_path / "branch"), TRANSFORMERS["transformer"]
    with pytest.raises(ValueError, match="1 blocks, the transformer only 1"):
        FusedDiT(base.load(tmp_path / "base"), branch)
