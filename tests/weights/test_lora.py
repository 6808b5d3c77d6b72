"""LoRA files of every container: against diffusers and PEFT where those read them, otherwise the
same update in another container."""

import json
import math
import random
from pathlib import Path

import pytest
import torch
from diffusers import SanaPipeline, SanaTransformer2DModel
from hypothesis import given
from hypothesis import strategies as st
from peft import LoKrConfig, LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file

from loras import BLOCKS, lora_for, merged, written
from reference import LIKE_0_6B
from sana_cli.errors import UsageError
from sana_cli.models.architectures import TRANSFORMERS
from sana_cli.models.configs import DiTConfig
from sana_cli.models.dit import DiT
from sana_cli.weights.checkpoint import load_weights, on_meta
from sana_cli.weights.config_files import read_config
from sana_cli.weights.lora import (
    MergedTensors,
    describe,
    fit,
    read_lora,
    remarks,
    transformer_shapes,
)
from sana_cli.weights.original_names import published_modules

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
FEED_FORWARD = ("ff.conv_inverted", "ff.conv_point")
# What can be changed in a block under NVlabs' names; the fused ones are several published modules.
ORIGINAL = (
    *("attn.qkv", "attn.proj", "cross_attn.q_linear", "cross_attn.kv_linear", "cross_attn.proj"),
    *("mlp.inverted_conv.conv", "mlp.point_conv.conv"),
)


def trained(folder: Path, seed: int, adapter: LoraConfig, metadata: bool = True) -> Path:
    """A LoRA as diffusers' trainer writes it, its second factor random instead of zero."""
    torch.manual_seed(seed)
    transformer = SanaTransformer2DModel(num_layers=BLOCKS, caption_channels=64, **LIKE_0_6B)
    transformer.add_adapter(adapter)
    for name, parameter in transformer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    SanaPipeline.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(transformer),
        transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict()
        if metadata
        else None,
    )
    return folder / "pytorch_lora_weights.safetensors"


def velocity(model) -> torch.Tensor:
    torch.manual_seed(7)
    latents, text, timestep = torch.randn(1, 32, 5, 9), torch.randn(1, 7, 64), torch.tensor([817])
    with torch.no_grad():
        if isinstance(model, DiT):
            return model(latents, timestep, model.project_text(text))
        return model(latents, text, timestep).sample


def our_velocity(base, config, *loras) -> torch.Tensor:
    chosen = [(read_lora(path), scale) for path, scale in loras]
    source = MergedTensors([base], chosen, config, torch.float32)
    dit = on_meta(DiT, config, base)
    return velocity(load_weights(dit, [source], torch.float32))


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


# --- what diffusers reads ----------------------------------------------------------------------

KINDS = {
    "as the trainer does": LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_k", "to_v"]),
    "every layer": LoraConfig(r=3, lora_alpha=3, target_modules=[*ATTENTION, *FEED_FORWARD]),
    "the layers around": LoraConfig(
        r=2,
        lora_alpha=5,
        target_modules=[
            "proj_out",
            "patch_embed.proj",
            "linear_1",
            "linear_2",
            "time_embed.linear",
        ],
    ),
    "rsLoRA": LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=list(ATTENTION)),
    "patterns": LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=list(ATTENTION),
        rank_pattern={"transformer_blocks.1.attn1.to_q": 7, "to_v": 2},
        alpha_pattern={"attn2.to_k": 1, "transformer_blocks.0.attn1.to_q": 16},
    ),
    "bias": LoraConfig(
        r=2, lora_alpha=6, lora_bias=True, target_modules=["to_out.0", "attn2.to_k"]
    ),
}


@pytest.mark.parametrize("metadata", [True, False], ids=["alpha stated", "nothing stated"])
@pytest.mark.parametrize("kind", KINDS)
def test_two_loras_at_their_scales_are_what_diffusers_makes_of_them(
    tiny_model, base, config, tmp_path, kind, metadata
):
    files = [trained(tmp_path / f"{i}", i, KINDS[kind], metadata) for i in (1, 2)]
    pipe = SanaPipeline.from_pretrained(tiny_model)
    plain = velocity(pipe.transformer)
    for i, file in enumerate(files):
        pipe.load_lora_weights(file, adapter_name=f"lora{i}")
    pipe.set_adapters(["lora0", "lora1"], [0.8, -0.5])
    theirs = velocity(pipe.transformer)
    ours = our_velocity(base, config, (files[0], 0.8), (files[1], -0.5))
    assert relative_error(ours, theirs) < 2e-6
    assert relative_error(plain, theirs) > 1e-3
    pipe.fuse_lora(adapter_names=["lora0", "lora1"])
    pipe.unload_lora_weights()
    fused = pipe.transformer.state_dict()
    for name, tensor in merged(base, config, (files[0], 0.8), (files[1], -0.5)).items():
        assert torch.allclose(tensor, fused[name], atol=1e-6), name


def test_an_adapter_saved_by_the_transformer_itself(tiny_model, base, config, tmp_path):
    transformer = SanaPipeline.from_pretrained(tiny_model).transformer
    transformer.add_adapter(LoraConfig(r=4, lora_alpha=2, target_modules=["to_q"]))
    for name, parameter in transformer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    transformer.save_lora_adapter(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    assert relative_error(our_velocity(base, config, (file, 1.0)), velocity(transformer)) < 2e-6
    assert describe(file)["container"] == "diffusers"


@pytest.mark.parametrize(
    "kind",
    [
        LoraConfig(r=4, lora_alpha=6, target_modules=[*ATTENTION, *FEED_FORWARD]),
        LoKrConfig(r=4, alpha=6, decompose_factor=8, target_modules=[*ATTENTION, *FEED_FORWARD]),
        LoKrConfig(r=2, alpha=6, decompose_both=True, target_modules=list(ATTENTION)),
        LoKrConfig(r=500, alpha=250, target_modules=["to_q", "ff.conv_depth"]),
    ],
    ids=["LoRA", "LoKr", "LoKr of four factors", "LoKr of two matrices"],
)
def test_a_folder_of_peft_with_the_config_beside(tiny_model, base, config, tmp_path, kind):
    transformer = SanaTransformer2DModel.from_pretrained(tiny_model / "transformer")
    model = get_peft_model(transformer, kind)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "lokr_" in name:
            torch.nn.init.normal_(parameter, std=0.08)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    theirs = velocity(model.base_model.model)
    plain = velocity(SanaTransformer2DModel.from_pretrained(tiny_model / "transformer"))
    assert relative_error(our_velocity(base, config, (file, 1.0)), theirs) < 2e-6
    assert relative_error(plain, theirs) > 1e-3
    before = read_lora(file).sha256
    settings = tmp_path / "adapter_config.json"
    settings.write_text(settings.read_text().replace('alpha": ', 'alpha": 1'))
    assert read_lora(file).sha256 != before, "another alpha is another picture"


# --- the other containers ----------------------------------------------------------------------


def shape_of(module: str, shapes) -> tuple[int, int]:
    """Of the update of a module, under either naming."""
    weights = [shapes[f"{name}.weight"] for name in published_modules(module, guided=False)]
    return sum(s[0] for s in weights), math.prod(weights[0][1:])


def updates(modules, rank: int, seed: int, shapes) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Random factors, A (rank, columns) and B (rows, rank), by module."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for module in modules:
        rows, columns = shape_of(module, shapes)
        down = torch.randn(rank, columns, generator=generator) * 0.1
        made[module] = down, torch.randn(rows, rank, generator=generator) * 0.1
    return made


def in_diffusers_form(factors, alphas, shapes) -> dict[str, torch.Tensor]:
    """The same updates under diffusers' names, the factor alpha / rank in B."""
    tensors = {}
    for module, (down, up) in factors.items():
        up = up * (alphas[module] / down.shape[0] if module in alphas else 1)
        names = published_modules(module, guided=False)
        heights = [shapes[f"{name}.weight"][0] for name in names]
        for name, rows in zip(names, up.split(heights), strict=True):
            tensors[f"transformer.{name}.lora_A.weight"] = down
            tensors[f"transformer.{name}.lora_B.weight"] = rows.contiguous()
    return tensors


def underscored(prefix: str):
    def write(factors, alphas):
        tensors = {}
        for module, (down, up) in factors.items():
            name = prefix + module.replace(".", "_")
            tensors[f"{name}.lora_down.weight"] = down
            tensors[f"{name}.lora_up.weight"] = up
            if module in alphas:
                tensors[f"{name}.alpha"] = torch.tensor(alphas[module])
        return tensors

    return write


def dotted(prefix: str, down_name: str, up_name: str):
    def write(factors, alphas):
        tensors = {}
        for module, (down, up) in factors.items():
            if "conv" in module:  # as layers of convolution are stored
                down, up = down[..., None, None], up[..., None, None]
            tensors[f"{prefix}{module}.{down_name}.weight"] = down
            tensors[f"{prefix}{module}.{up_name}.weight"] = up
            if module in alphas:
                tensors[f"{prefix}{module}.alpha"] = torch.tensor([alphas[module]])
        return tensors

    return write


PUBLISHED_MODULES = [f"transformer_blocks.{i}.{m}" for i in range(BLOCKS) for m in (
    *(f"attn1.{m}" for m in ATTENTION), *(f"attn2.{m}" for m in ATTENTION), *FEED_FORWARD
)]  # fmt: skip
ORIGINAL_MODULES = [f"blocks.{i}.{module}" for i in range(BLOCKS) for module in ORIGINAL]
WRITERS = {  # the container that is told, what it names, and how it is written
    "diffusers": ("diffusers", PUBLISHED_MODULES, dotted("transformer.", "lora_A", "lora_B")),
    "old diffusers": (
        *("diffusers", PUBLISHED_MODULES),
        dotted("transformer.", "lora.down", "lora.up"),
    ),
    "older diffusers": (
        *("diffusers", PUBLISHED_MODULES),
        dotted("transformer.", "lora_linear_layer.down", "lora_linear_layer.up"),
    ),
    "PEFT": ("PEFT", PUBLISHED_MODULES, dotted("base_model.model.", "lora_A", "lora_B")),
    "PEFT, unsaved": (
        *("PEFT", PUBLISHED_MODULES),
        dotted("base_model.model.", "lora_A.default", "lora_B.default"),
    ),
    "OneTrainer": ("OneTrainer", PUBLISHED_MODULES, underscored("lora_transformer_")),
    "OneTrainer's backup": (
        *("diffusers", PUBLISHED_MODULES),
        dotted("transformer.", "lora_down", "lora_up"),
    ),
    "Kohya": ("Kohya", PUBLISHED_MODULES, underscored("lora_unet_")),
    "Kohya, original names": ("Kohya", ORIGINAL_MODULES, underscored("lora_unet_")),
    "LyCORIS": ("LyCORIS", PUBLISHED_MODULES, underscored("lycoris_")),
    "ComfyUI": ("ComfyUI", ORIGINAL_MODULES, dotted("diffusion_model.", "lora_A", "lora_B")),
    "ComfyUI, published names": (
        *("ComfyUI", PUBLISHED_MODULES),
        dotted("diffusion_model.", "lora_A", "lora_B"),
    ),
    "a checkpoint's names": (
        *("ComfyUI", ORIGINAL_MODULES),
        dotted("model.diffusion_model.", "lora_down", "lora_up"),
    ),
    "NVlabs": ("NVlabs", ORIGINAL_MODULES, dotted("", "lora_A", "lora_B")),
}


@pytest.mark.parametrize(("container", "modules", "write"), WRITERS.values(), ids=WRITERS)
def test_a_container_is_the_same_update_in_diffusers_form(
    base, config, tmp_path, container, modules, write
):
    shapes = transformer_shapes(config)
    factors = updates(modules, 3, 1, shapes)
    alphas = dict.fromkeys(modules[::2], 1.5)
    file = written(tmp_path / "other.safetensors", write(factors, alphas))
    same = written(tmp_path / "same.safetensors", in_diffusers_form(factors, alphas, shapes))
    theirs = merged(base, config, (same, 0.7))
    for name, tensor in merged(base, config, (file, 0.7)).items():
        assert torch.allclose(tensor, theirs[name], atol=1e-6), name
    assert describe(file)["container"] == container


@given(
    writer=st.sampled_from(sorted(WRITERS)),
    rank=st.integers(1, 9),
    scales=st.lists(st.floats(-2, 2, width=16), min_size=1, max_size=3),
    seed=st.integers(0, 2**20),
    half=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_a_merged_weight_is_the_weight_and_the_sum_of_the_scaled_updates(
    base, config, tmp_path_factory, writer, rank, scales, seed, half
):
    shapes = transformer_shapes(config)
    choose = random.Random(seed)
    _, modules, write = WRITERS[writer]
    expected = {name: tensor.contiguous().clone() for name, tensor in load_file(base).items()}
    loras = []
    for i, scale in enumerate(scales):
        chosen = choose.sample(modules, choose.randint(1, len(modules)))
        factors = {
            module: (down.to(half), up.to(half))
            for module, (down, up) in updates(chosen, rank, seed + i, shapes).items()
        }
        alphas = {module: choose.uniform(0.1, 20) for module in chosen if choose.random() < 0.5}
        path = tmp_path_factory.getbasetemp() / f"property-{i}.safetensors"
        loras.append((written(path, write(factors, alphas)), scale))
        for module, (down, up) in factors.items():
            factor = alphas[module] / rank if module in alphas else 1
            names = published_modules(module, guided=False)
            rows = (scale * factor * (up.double() @ down.double())).chunk(len(names))
            for name, part in zip(names, rows, strict=True):
                weight = expected[f"{name}.weight"]
                weight += part.view(weight.shape).float()
    for name, tensor in merged(base, config, *loras).items():
        assert torch.allclose(tensor, expected[name], atol=2e-5, rtol=1e-5), name


@pytest.mark.parametrize("decomposed", ["neither", "second", "both"])
@pytest.mark.parametrize("module", ["attn2.to_k", "ff.conv_inverted", "ff.conv_depth"])
def test_lokr_of_lycoris_is_a_scaled_kronecker_product(base, config, tmp_path, decomposed, module):
    """alpha / rank counts where a factor is a product; LyCORIS writes any alpha where none is."""
    torch.manual_seed(0)
    full = f"transformer_blocks.1.{module}"
    weight = load_file(base)[f"{full}.weight"]
    rows, columns = weight.shape[0], math.prod(weight.shape[1:])
    left = (8, 4) if columns % 4 == 0 else (8, 1)
    right = (rows // left[0], columns // left[1])
    name, tensors, halves = f"lycoris_{full.replace('.', '_')}", {}, []
    for which, shape in (("w1", left), ("w2", right)):
        if decomposed == "both" or (decomposed == "second" and which == "w2"):
            up, down = torch.randn(shape[0], 2) * 0.3, torch.randn(2, shape[1]) * 0.3
            tensors |= {f"{name}.lokr_{which}_a": up, f"{name}.lokr_{which}_b": down}
            halves.append(up @ down)
        else:
            halves.append(torch.randn(shape) * 0.3)
            tensors[f"{name}.lokr_{which}"] = halves[-1]
    if decomposed == "neither" and module == "ff.conv_depth":  # as a kernel, not a matrix
        tensors[f"{name}.lokr_w2"] = halves[1].view(right[0], 1, 3, 3)
    tensors[f"{name}.alpha"] = torch.tensor(10_000.0 if decomposed == "neither" else 1.0)
    file = written(tmp_path / "lokr.safetensors", tensors)
    factor = 1.0 if decomposed == "neither" else 0.5
    expected = weight + 0.25 * factor * torch.kron(*halves).view(weight.shape)
    assert torch.allclose(merged(base, config, (file, 0.25))[f"{full}.weight"], expected, atol=1e-6)
    assert describe(file)["kind"] == "LoKr"


def test_a_depthwise_convolution_takes_an_update_that_stays_depthwise(base, config, tmp_path):
    """As LyCORIS writes it: the first factor reads one channel."""
    name = "transformer_blocks.0.ff.conv_depth"
    weight = load_file(base)[f"{name}.weight"]
    down, up = torch.randn(4, 1, 3, 3), torch.randn(len(weight), 4, 1, 1)
    key = f"lycoris_{name.replace('.', '_')}"
    file = written(
        tmp_path / "depthwise.safetensors",
        {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up},
    )
    expected = weight + (up.flatten(1) @ down.flatten(1)).view(weight.shape)
    assert torch.allclose(merged(base, config, (file, 1.0))[f"{name}.weight"], expected, atol=1e-5)


def test_time_embedding_of_sprint_under_either_name(tmp_path, tiny_sprint):
    config, _ = read_config(DiTConfig, tiny_sprint / "transformer" / "config.json")
    down, up = torch.randn(2, 256), torch.randn(288, 2)
    for prefix, name in (
        ("transformer.", "time_embed.guidance_embedder.linear_1"),
        ("diffusion_model.", "cfg_embedder.mlp.0"),
    ):
        file = written(
            tmp_path / "sprint.safetensors",
            {f"{prefix}{name}.lora_A.weight": down, f"{prefix}{name}.lora_B.weight": up},
        )
        assert set(fit(read_lora(file), config)) == {"time_embed.guidance_embedder.linear_1.weight"}
        with pytest.raises(UsageError, match="the model has no"):
            fit(
                read_lora(file), DiTConfig(**{"num_layers": 2, "caption_channels": 64, **LIKE_0_6B})
            )


# --- what is told of it ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "blocks", "fits"),
    [
        ("sana-0.6b", range(28), ["0.6B"]),
        ("sana-1.6b", range(20), ["1.6B"]),
        ("sana1.5-4.8b", range(60), ["4.8B"]),
        ("sana1.5-4.8b", [30], ["4.8B"]),
        ("sana-1.6b", [3, 4], ["1.6B", "4.8B"]),
    ],
)
def test_the_released_sizes_that_a_lora_fits(tmp_path, architecture, blocks, fits):
    file = lora_for(TRANSFORMERS[architecture], tmp_path / "lora.safetensors", blocks)
    assert describe(file)["fits"] == fits


def test_the_description_of_a_file(config, tmp_path):
    file = trained(tmp_path, 0, KINDS["patterns"])
    said = describe(file)
    assert said["container"] == "diffusers"
    assert said["kind"] == "LoRA"
    assert said["ranks"] == [2, 4, 7]
    assert said["alphas"] == [1, 8, 16]
    assert said["modules"] == 16
    assert said["blocks"] == [0, 1]
    assert said["width"] == 288
    assert said["bytes"] == file.stat().st_size
    assert len(said["sha256"]) == 64
    json.dumps(said)


def test_a_lora_that_seems_to_be_for_another_model_is_remarked_on(tmp_path):
    wide, deep = TRANSFORMERS["sana-1.6b"], TRANSFORMERS["sana1.5-4.8b"]
    told = {"lora_adapter_metadata": json.dumps({"transformer.r": 2, "transformer.lora_alpha": 2,
            "transformer.base_model_name_or_path": "someone/base"})}  # fmt: skip
    file = read_lora(lora_for(wide, tmp_path / "lora.safetensors", range(20), **told))
    assert remarks(file, wide, ["mine", "someone/base"]) == []
    assert remarks(file, wide, ["mine"]) == [
        "lora.safetensors says that it was trained on someone/base"
    ]
    assert remarks(file, deep, ["someone/base"]) == [
        "lora.safetensors changes the first 20 of 60 blocks: was it made for the 1.6B?"
    ]
