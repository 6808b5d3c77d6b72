"""Images of other tools: each is named, and what it says of its settings is read."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from recipes import RECIPE
from sana_cli.errors import SanaError
from sana_cli.images import a1111
from sana_cli.images.metadata import read, recipe_of

EXIF_TAGS = {"ImageDescription": 0x010E, "Make": 0x010F, "Model": 0x0110, "Software": 0x0131}
INNER_TAGS = {"UserComment": 0x9286, "MakerNote": 0x927C}
SIZE = (96, 64)


def png(folder: Path, **texts: str) -> str:
    info = PngImagePlugin.PngInfo()
    for key, text in texts.items():
        info.add_itxt(key.replace("__", ":"), text)
    Image.new("RGB", SIZE).save(folder / "a.png", pnginfo=info)
    return str(folder / "a.png")


def with_exif(folder: Path, name: str, **texts: str | bytes) -> str:
    exif = Image.Exif()
    for key, text in texts.items():
        if key in EXIF_TAGS:
            exif[EXIF_TAGS[key]] = text
        else:
            exif.get_ifd(0x8769)[INNER_TAGS[key]] = text
    Image.new("RGB", SIZE).save(folder / name, exif=exif.tobytes())
    return str(folder / name)


# --- what each tool writes ---------------------------------------------------------------------

EXPECTED = {
    **{"prompt": "a red fox\nin snow", "negative": "blurry", "seed": 123456, "steps": 28},
    **{"guidance": 6.5, "width": 96, "height": 64},
}


def graph(**changes) -> dict:
    """What ComfyUI runs for text to image; `changes` replace nodes."""
    nodes = {
        "4": ("CheckpointLoaderSimple", {"ckpt_name": "sd_xl_base_1.0.safetensors"}),
        "5": ("EmptyLatentImage", {"width": 96, "height": 64, "batch_size": 1}),
        "6": ("CLIPTextEncode", {"text": EXPECTED["prompt"], "clip": ["4", 1]}),
        "7": ("CLIPTextEncode", {"text": "blurry", "clip": ["4", 1]}),
        "3": (
            "KSampler",
            {
                **{"seed": 123456, "steps": 28, "cfg": 6.5, "sampler_name": "euler"},
                **{"scheduler": "normal", "denoise": 1.0, "model": ["4", 0]},
                **{"positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0]},
            },
        ),
        "8": ("VAEDecode", {"samples": ["3", 0], "vae": ["4", 2]}),
        "9": ("SaveImage", {"filename_prefix": "ComfyUI", "images": ["8", 0]}),
    }
    nodes |= changes
    return {
        key: {"class_type": node[0], "inputs": node[1], "_meta": {"title": node[0]}}
        for key, node in nodes.items()
        if node is not None
    }


GUIDER = graph(
    **{
        "3": (
            "SamplerCustomAdvanced",
            {
                **{"noise": ["10", 0], "guider": ["11", 0], "sampler": ["12", 0]},
                **{"sigmas": ["13", 0], "latent_image": ["5", 0]},
            },
        ),
        "5": ("EmptySD3LatentImage", {"width": 96, "height": 64, "batch_size": 1}),
        "10": ("RandomNoise", {"noise_seed": 123456}),
        "11": (
            "CFGGuider",
            {"model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0], "cfg": 6.5},
        ),
        "12": ("KSamplerSelect", {"sampler_name": "euler"}),
        "13": ("BasicScheduler", {"scheduler": "simple", "steps": 28, "denoise": 1.0}),
    }
)
# A second sampler refines what the first has drawn, a ControlNet changes what was encoded, and
# prompt, seed and wildcards come from nodes of their own.
LINKED = graph(
    **{
        "1": (
            "KSampler",
            {
                **{"seed": 9, "steps": 5, "cfg": 1.0, "sampler_name": "ddim", "model": ["4", 0]},
                **{"positive": ["6", 0], "negative": ["7", 0], "latent_image": ["3", 0]},
            },
        ),
        "6": ("CLIPTextEncode", {"text": ["20", 0], "clip": ["4", 1]}),
        "20": (
            "ImpactWildcardProcessor",
            {"wildcard_text": "a {red|blue} fox", "populated_text": EXPECTED["prompt"]},
        ),
        "21": (
            "ControlNetApplyAdvanced",
            {"positive": ["6", 0], "negative": ["7", 0], "control_net": ["23", 0]},
        ),
        "22": ("Seed (rgthree)", {"seed": 123456}),
        "23": ("ControlNetLoader", {"control_net_name": "x"}),
        "3": (
            "KSamplerAdvanced",
            {
                **{"noise_seed": ["22", 0], "steps": 28, "cfg": 6.5, "sampler_name": "euler"},
                **{"positive": ["21", 0], "negative": ["21", 1], "latent_image": ["5", 0]},
                **{"model": ["4", 0]},
            },
        ),
    }
)
WORKFLOW = {
    "last_node_id": 9,
    "nodes": [{"id": 3, "type": "KSampler"}],
    "links": [],
    "version": 0.4,
}
FLAT = {
    **{"prompt": EXPECTED["prompt"], "negative_prompt": "blurry", "seed": 123456, "steps": 28},
    **{"cfg_scale": 6.5, "width": 96, "height": 64, "scheduler": "euler"},
}
INVOKE = FLAT | {
    **{
        "positive_prompt": FLAT["prompt"],
        "app_version": "4.2.9",
        "generation_mode": "sdxl_txt2img",
    },
    "model": {"key": "3f0a", "name": "Juggernaut XL", "base": "sdxl", "type": "main"},
}
del INVOKE["prompt"]
INVOKE_2 = {
    **{"model": "stable diffusion", "model_weights": "sd-1.5", "app_version": "2.3.5"},
    "image": FLAT | {"prompt": [{"prompt": FLAT["prompt"], "weight": 1.0}], "sampler": "k_euler"},
}
SWARM = {
    "sui_image_params": {
        **{"prompt": FLAT["prompt"], "negativeprompt": "blurry", "seed": 123456, "steps": 28},
        **{"cfgscale": 6.5, "width": 96, "height": 64, "model": "OfficialStableDiffusion/sd_xl"},
        **{"sampler": "euler", "scheduler": "normal", "swarm_version": "0.9.2.1"},
    },
    "sui_extra_data": {"date": "2024-09-01", "generation_time": "0.1 (prep) and 2.2 (gen) seconds"},
}
FOOOCUS = {
    **{"adm_guidance": "(1.5, 0.8, 0.3)", "base_model": "juggernautXL_v8", "guidance_scale": 6.5},
    **{
        "loras": [["offset", 0.1, "4852"]],
        "metadata_scheme": "fooocus",
        "negative_prompt": "blurry",
    },
    **{"performance": "Speed", "prompt": FLAT["prompt"], "resolution": "(96, 64)"},
    **{"sampler": "dpmpp_2m_sde_gpu", "scheduler": "karras", "seed": "123456", "sharpness": 2.0},
    **{"steps": 28, "styles": "['Fooocus V2']", "vae": "Default", "version": "Fooocus v2.5.5"},
}
NOVELAI = {
    **{"prompt": FLAT["prompt"], "steps": 28, "height": 64, "width": 96, "scale": 6.5},
    **{"uncond_scale": 1.0, "seed": 123456, "n_samples": 1, "sampler": "k_euler", "uc": "blurry"},
    **{"noise_schedule": "native", "v4_prompt": {"caption": {"base_caption": FLAT["prompt"]}}},
}
NOVELAI_TEXTS = {
    **{"Title": "NovelAI generated image", "Description": FLAT["prompt"], "Software": "NovelAI"},
    **{"Source": "NovelAI Diffusion V4 37442FCA", "Comment": json.dumps(NOVELAI)},
}
MFLUX = {
    **{"mflux_version": "0.9.6", "model": "black-forest-labs/FLUX.1-dev", "base_model": "None"},
    **{"seed": 123456, "steps": 28, "guidance": 6.5, "precision": "mlx.core.bfloat16"},
    **{"quantize": 8, "generation_time_seconds": 61.2, "lora_paths": None, "width": 96},
    **{"height": 64, "prompt": FLAT["prompt"], "negative_prompt": "blurry"},
}
EASY = {
    **{"prompt": FLAT["prompt"], "negative_prompt": "blurry", "seed": "123456"},
    **{"num_inference_steps": "28", "guidance_scale": "6.5", "width": "96", "height": "64"},
    **{"use_stable_diffusion_model": "sd-v1-5", "sampler_name": "euler"},
}
DRAW_THINGS = {
    **{"c": FLAT["prompt"], "uc": "blurry", "seed": 123456, "steps": 28, "scale": 6.5},
    **{"size": "96x64", "sampler": "DPM++ 2M Karras", "model": "sd_xl_base.ckpt", "v2": {"x": 1}},
}
XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF><rdf:Description><exif:UserComment><rdf:Alt>'
    '<rdf:li xml:lang="x-default">{}</rdf:li></rdf:Alt></exif:UserComment></rdf:Description>'
    "</rdf:RDF></x:xmpmeta>"
)
LINES = f"{FLAT['prompt']}\nNegative prompt: blurry\n"
PAIRS = "Steps: 28, Sampler: Euler, CFG scale: 6.5, Seed: 123456, Size: 96x64"
SDNEXT = f"{LINES}{PAIRS}, Parser: native, Backend: Diffusers, App: SD.Next, Version: 04a5071"
SDNEXT_2023 = (
    "prompt: a red fox\nin snow\nNegative prompt: blurry\nVersion: aa62f6d, Pipeline: Original,\n"
    "Steps: 28 | Seed: 123456 | Sampler: Euler | CFG scale: 6.5 | Size: 96x64 | Parser: Full parser"
    " | Model: revAnimated_v122 | Operations: txt2img, hires | Hires upscaler: 4x-UltraSharp"
)
dumps = json.dumps
utf8 = str.encode


def unicode(text: str) -> bytes:
    return b"UNICODE\0" + text.encode("utf-16-be")


TOOLS = {
    "comfyui": ("ComfyUI", png, {"prompt": dumps(graph()), "workflow": dumps(WORKFLOW)}),
    "comfyui-guider": ("ComfyUI", png, {"prompt": dumps(GUIDER)}),
    "comfyui-linked": ("ComfyUI", png, {"prompt": dumps(LINKED)}),
    "comfyui-webp": (
        "ComfyUI",
        "webp",
        {"Model": f"prompt:{dumps(graph())}", "Make": f"workflow:{dumps(WORKFLOW)}"},
    ),
    "invokeai": ("InvokeAI 4.2.9", png, {"invokeai_metadata": dumps(INVOKE)}),
    "invokeai-2": ("InvokeAI 2.3.5", png, {"sd-metadata": dumps(INVOKE_2)}),
    "invokeai-dream": (
        "InvokeAI",
        png,
        {"Dream": '"a red fox" -s 28 -S 123456 -W 96 -H 64 -C 6.5 -A k_euler'},
    ),
    "swarmui": ("SwarmUI 0.9.2.1", png, {"parameters": dumps(SWARM, indent=2)}),
    "swarmui-jpeg": ("SwarmUI 0.9.2.1", "jpg", {"UserComment": unicode(dumps(SWARM))}),
    "fooocus": (
        "Fooocus v2.5.5",
        png,
        {"parameters": dumps(FOOOCUS), "fooocus_scheme": "fooocus"},
    ),
    "fooocus-jpeg": (
        "Fooocus v2.5.5",
        "jpg",
        {"UserComment": utf8(dumps(FOOOCUS)), "MakerNote": b"fooocus", "Software": "Fooocus"},
    ),
    "fooocus-a1111": (
        "Fooocus v2.5.5",
        png,
        {
            "parameters": f"{LINES}{PAIRS}, ADM Guidance: (1.5, 0.8, 0.3), Styles: ['a', 'b'],"
            " Version: Fooocus v2.5.5",
            "fooocus_scheme": "a1111",
        },
    ),
    "novelai": ("NovelAI", png, NOVELAI_TEXTS),
    "novelai-webp": ("NovelAI", "webp", {"UserComment": unicode(dumps(NOVELAI_TEXTS))}),
    "mflux": ("mflux 0.9.6", "png", {"UserComment": utf8(dumps(MFLUX))}),
    "mflux-jpeg": ("mflux 0.9.6", "jpg", {"UserComment": utf8(dumps(MFLUX))}),
    "easy-diffusion": ("Easy Diffusion", png, EASY),
    "easy-diffusion-jpeg": ("Easy Diffusion", "jpg", {"UserComment": unicode(dumps(EASY))}),
    "draw-things": (
        "Draw Things",
        png,
        {"XML__com.adobe.xmp": XMP.format(dumps(DRAW_THINGS).replace('"', "&quot;"))},
    ),
    "sd.next": ("SD.Next 04a5071", png, {"parameters": SDNEXT}),
    "sd.next-2023": ("SD.Next aa62f6d", png, {"parameters": SDNEXT_2023}),
    "forge": (
        "Forge f2.0.1v1.10.1",
        png,
        {"parameters": f"{LINES}{PAIRS}, Version: f2.0.1v1.10.1"},
    ),
    "a1111": ("A1111 v1.9.4", "jpg", {"UserComment": unicode(f"{LINES}{PAIRS}, Version: v1.9.4")}),
    "stable-diffusion.cpp": (
        "stable-diffusion.cpp",
        png,
        {"parameters": f"{LINES}{PAIRS}, RNG: cuda, Version: stable-diffusion.cpp"},
    ),
    "comfyui-a1111": (
        "ComfyUI",
        png,
        {"parameters": f"{LINES}{PAIRS}, Version: ComfyUI", "prompt": dumps(graph())},
    ),
}


def made_by(name: str, folder: Path) -> str:
    _, writer, texts = TOOLS[name]
    return png(folder, **texts) if writer is png else with_exif(folder, f"a.{writer}", **texts)


@pytest.mark.parametrize("name", TOOLS)
def test_the_tool_is_named_and_its_settings_are_read(tmp_path, name):
    found = read(made_by(name, tmp_path))
    assert found.tool == TOOLS[name][0]
    expected = dict(EXPECTED)
    if name == "invokeai-dream":
        expected |= {"prompt": "a red fox"}
        del expected["negative"]
    known = {key: found.recipe[key] for key in expected}
    assert known == expected
    assert set(found.recipe) <= {*EXPECTED, "solver"}
    assert "damaged" not in " ".join(found.notes)
    assert found.notes[0].startswith("read from ")


@pytest.mark.parametrize("name", TOOLS)
def test_what_does_not_map_is_listed_under_the_tools_own_names(tmp_path, name):
    found = read(made_by(name, tmp_path))
    listed = "; ".join(f"{name} {value}" for name, value in found.not_understood.items())
    for word in {
        "comfyui": ["scheduler", "normal", "sd_xl_base"],
        "invokeai": ["model", "Juggernaut XL", "generation_mode"],
        "fooocus": ["adm_guidance", "performance", "juggernautXL_v8", "dpmpp_2m_sde_gpu"],
        "fooocus-a1111": ["ADM Guidance (1.5, 0.8, 0.3)", "Styles ['a', 'b']"],
        "novelai": ["noise_schedule", "v4_prompt", "NovelAI Diffusion V4"],
        "mflux": ["quantize", "FLUX.1-dev"],
        "sd.next-2023": ["Operations", "txt2img, hires", "4x-UltraSharp"],
    }.get(name, []):
        assert word in listed


@pytest.mark.parametrize(
    ("texts", "tool"),
    [
        ({"workflow": dumps(WORKFLOW)}, "ComfyUI"),
        ({"prompt": dumps({"1": {"class_type": "LoadImage", "inputs": {}}})}, "ComfyUI"),
        ({"invokeai_graph": "{}"}, "InvokeAI"),
        ({"Software": "NovelAI"}, "NovelAI"),
    ],
    ids=["workflow", "no-sampler", "graph", "novelai"],
)
def test_a_tool_that_says_nothing_readable_is_still_named(tmp_path, sana, texts, tool):
    path = png(tmp_path, **texts)
    assert (read(path).tool, read(path).recipe) == (tool, {})
    with pytest.raises(SanaError, match=f"made by {tool}; no setting in it could be read"):
        recipe_of(path)
    run = sana("info", path)
    assert run.code == 0
    assert f"made by     {tool}" in run.out and "no setting in it could be read" in run.err


def test_people_see_the_tool_and_its_settings(tmp_path, sana):
    run = sana("info", made_by("comfyui", tmp_path))
    assert (run.code, run.out.startswith("a red fox\nin snow\n")) == (0, True)
    assert "made by     ComfyUI" in run.out
    assert "sampling    28 steps, flow-euler, guidance 6.5" in run.out
    assert "redraw      sana generate 'a red fox\n" in run.out
    document = json.loads(sana("info", "--json", made_by("fooocus", tmp_path)).out)["images"][0]
    assert (document["tool"], document["recipe"]["seed"]) == ("Fooocus v2.5.5", 123456)


# --- JSON that is not ours ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [dumps(SWARM), dumps({"a": 1}), "{broken", "{}", dumps({"Recipe": {}}), dumps(graph())],
    ids=["swarm", "object", "broken", "empty", "near", "graph"],
)
@pytest.mark.parametrize("other", [None, f"{LINES}{PAIRS}"], ids=["alone", "beside-a1111"])
def test_json_of_others_where_ours_would_be_is_not_called_damaged(tmp_path, text, other):
    texts: dict = {"ImageDescription": text}
    if other is not None:
        texts["UserComment"] = unicode(other)
    try:
        found = read(with_exif(tmp_path, "a.jpg", **texts))
    except SanaError as error:
        assert other is None and "holds no recipe" in error.message
    else:
        assert "damaged" not in " ".join(found.notes)
        assert found.recipe == {} or found.recipe["seed"] == 123456


def test_our_own_json_cut_short_is_called_damaged(tmp_path):
    with pytest.raises(SanaError, match="is damaged"):
        read(with_exif(tmp_path, "a.jpg", ImageDescription='{"recipe": {"prompt": "a f'))


def test_damaged_exif_hides_no_text_of_a_png(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", f"{LINES}{PAIRS}")
    Image.new("RGB", SIZE).save(tmp_path / "a.png", pnginfo=info, exif=b"Exif\0\0MM?!")
    assert read(str(tmp_path / "a.png")).recipe["seed"] == 123456


# --- A1111's text ------------------------------------------------------------------------------


def test_lines_below_the_settings_are_listed_and_hide_nothing():
    text = (
        f"{LINES}{PAIRS}, Version: v1.6.0\n"
        "Template: a {red|blue} fox, Steps: 99, {in snow|at sea}\nNegative Template: {a|b}, c\n"
        "something else"
    )
    found = a1111.read(text)
    assert (found.prompt, found.negative) == ("a red fox\nin snow", "blurry")
    assert found.pairs["Steps"] == "28"
    assert found.pairs["Template"] == "a {red|blue} fox, Steps: 99, {in snow|at sea}"
    assert found.pairs["Negative Template"] == "{a|b}, c"
    assert found.rest == ["something else"]


def test_settings_may_go_on_below_and_the_first_of_a_name_counts():
    found = a1111.read(f"{LINES}{PAIRS}\nSize: 8x8, Seed: 1, Clip skip: 2")
    assert (found.pairs["Size"], found.pairs["Clip skip"]) == ("96x64", "2")
    assert found.rest == ["Size: 8x8", "Seed: 1"]


def test_a_quoted_value_may_hold_line_breaks():
    text = f'{LINES}{PAIRS}, ADetailer prompt: "a face,\nSteps: 3, smiling", ADetailer model: x'
    found = a1111.read(text)
    assert found.pairs["ADetailer prompt"] == "a face,\nSteps: 3, smiling"
    assert found.pairs["ADetailer model"] == "x"


def test_nothing_inside_brackets_is_a_setting():
    resources = [{"type": "lora", "modelName": "More [v2], Steps: 99", "weight": 0.8}, {"x": [1]}]
    text = f"{LINES}Civitai resources: {dumps(resources)}, {PAIRS}, Hashes: {{'a': 'Seed: 7, b'}}"
    text = text.replace("Civitai resources", "Model: x, Civitai resources")
    found = a1111.read(text)
    assert json.loads(found.pairs["Civitai resources"]) == resources
    assert (found.pairs["Steps"], found.pairs["Seed"]) == ("28", "123456")
    assert found.pairs["Hashes"] == "{'a': 'Seed: 7, b'}"
    assert found.rest == []


def test_text_all_in_one_line_is_read():
    found = a1111.read(f"a red fox, Steps: many Negative prompt: blurry {PAIRS}")
    assert (found.prompt, found.negative) == ("a red fox, Steps: many", "blurry ")
    assert found.pairs["Seed"] == "123456"


def test_the_settings_are_the_last_line_of_them():
    trap = "Steps: 1, Seed: 2, Size: 8x8"
    found = a1111.read(f"{trap}\nNegative prompt: {trap}\n{trap}\n{PAIRS}")
    assert (found.prompt, found.negative, found.pairs["Seed"]) == (
        trap,
        f"{trap}\n{trap}",
        "123456",
    )


NAMES = st.lists(
    st.sampled_from(["Lora", "hashes", "Hires", "Mask", "x 2"]), min_size=1, max_size=3
)
NAMES = NAMES.map(" ".join)
TRAPS = st.sampled_from(
    [*("Steps: 99, ", '"', "'", "\\", "[", "]", "{", "}", "(", ")", ", ", ": ", "\n", " | ")]
    + ["Seed: 7", "a", "Negative prompt: x", "Size: 8x8, "]
)
VALUES = st.lists(TRAPS, max_size=8).map("".join)
JSON = st.recursive(
    VALUES | st.integers() | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(VALUES, inner, max_size=3),
    max_leaves=6,
).filter(lambda value: isinstance(value, list | dict))


@given(st.dictionaries(NAMES, VALUES | JSON, max_size=4), st.integers(0, 5), st.booleans())
@example({"Civitai resources": [{"modelName": "Steps: 99"}]}, 5, False)
def test_whatever_other_settings_hold_those_we_know_are_read(others, place, below):
    """As careful writers quote them: strings as JSON where they must be, lists and objects bare."""

    def written(value):
        if not isinstance(value, str):
            return dumps(value)
        plain = value == value.strip() and not re.search(r'[,:\n"(\[{]', value)
        return value if plain else dumps(value)

    pairs = PAIRS.split(", ")
    pairs[place:place] = [f"{name}: {written(value)}" for name, value in others.items()]
    if pairs[0] != PAIRS.split(", ")[0]:
        pairs.insert(0, pairs.pop(pairs.index("Steps: 28")))
    text = f"{LINES}{', '.join(pairs)}" + "\nTemplate: {a|b}, Steps: 99" * below
    found = a1111.read(text)
    assert (found.prompt, found.negative) == ("a red fox\nin snow", "blurry")
    known = {
        name: found.pairs.pop(name) for name in ("Steps", "Sampler", "CFG scale", "Seed", "Size")
    }
    assert known == dict(pair.split(": ") for pair in PAIRS.split(", "))
    found.pairs.pop("Template", None)
    assert found.pairs == {
        name: value if isinstance(value, str) else dumps(value) for name, value in others.items()
    }


@given(st.text())
@example(f"{PAIRS} [")
@example(f'{PAIRS}, x: "')
def test_any_text_is_read_or_is_not_in_the_form(text):
    found = a1111.read(text)
    assert found is None or isinstance(found.prompt, str)


@pytest.mark.parametrize(
    "hostile",
    [
        *('ab: "' * 30_000, "ab: [" * 30_000, "ab: {" * 30_000, "(" * 90_000, "[[" * 9000 + "\n"),
        *("Steps: 1 " * 20_000, "ab: (\n" * 20_000, "Steps: 1, Seed: 2, Size: 3\n" * 7000),
        *("a " * 90_000, 'ab: "x" ' * 20_000, "ab: [1, " * 20_000, "\n" * 90_000),
        "ab: [1, " * 20_000 + "]" * 20_000,
    ],
    ids=lambda text: repr(text[:12]),
)
def test_a_hostile_text_does_not_hang_it(hostile):
    """What is quadratic takes minutes for these."""
    a1111.read(f"a fox\n{PAIRS}, {hostile}")
    a1111.read(f"a fox\n{hostile}, {PAIRS}")


# --- hostile graphs ----------------------------------------------------------------------------

LINK = st.tuples(st.sampled_from("123456"), st.integers(0, 3)).map(list)
INPUTS = st.dictionaries(
    st.sampled_from(
        ["text", "positive", "negative", "latent_image", "model", "seed", "cfg", "width"]
    ),
    LINK
    | st.text(max_size=4)
    | st.integers()
    | st.floats()
    | st.none()
    | st.lists(LINK, max_size=2),
)
NODES = st.fixed_dictionaries(
    {
        "class_type": st.sampled_from(["KSampler", "CLIPTextEncode", "Reroute", "X", 7]),
        "inputs": INPUTS,
    }
)


@given(st.dictionaries(st.sampled_from("123456"), NODES | st.none() | st.text(), min_size=1))
def test_any_graph_gives_valid_fields_or_one_error(tmp_path, nodes):
    try:
        found = read(png(tmp_path, prompt=dumps(nodes)))
    except SanaError:
        return
    json.dumps(vars(found), allow_nan=False)
    assert found.tool == "ComfyUI"


def test_a_graph_of_circles_ends():
    every = {name: ["1", 0] for name in ("text", "positive", "model", "seed", "string", "value")}
    nodes = {"1": {"class_type": "KSampler", "inputs": every | {"latent_image": ["1", 0]}}}
    from sana_cli.images.other_tools import read as read_texts

    assert read_texts({"prompt": [dumps(nodes)]}).tool == "ComfyUI"


def test_a_recipe_of_ours_is_preferred_to_any_other_text(tmp_path):
    own = dumps({"recipe": RECIPE.as_dict()})
    found = read(png(tmp_path, sana=own, parameters=f"{LINES}{PAIRS}", prompt=dumps(graph())))
    assert (found.source, found.tool, found.recipe) == ("sana", "sana", RECIPE.as_dict())


@pytest.mark.parametrize(
    ("keyword", "text"),
    [
        ("parameters", {"sui_image_params": {"prompt": "x", "model": ["a"]}}),
        ("parameters", {"sui_image_params": {"swarm_version": "\ud800\x1b]0;title\x07"}}),
        ("sana", {"recipe": {"prompt": "x", "model": "m\x1b[31m\nforged"}, "made": {}}),
    ],
    ids=["a-list-of-models", "half-a-pair", "control-characters"],
)
@pytest.mark.parametrize(
    "verb", [("info",), ("info", "--json"), ("generate", "--dry-run", "--from")]
)
def test_nothing_of_a_strangers_text_ends_the_command_or_reaches_the_terminal(
    tmp_path, monkeypatch, sana, keyword, text, verb
):
    monkeypatch.chdir(tmp_path)
    info = PngImagePlugin.PngInfo()
    info.add_text(keyword, json.dumps(text))
    Image.new("RGB", (8, 8)).save("a.png", pnginfo=info)
    run = sana(*verb, "a.png")
    assert run.code in (0, 1, 2) and "Error" not in run.err, run.err
    listed = sana("info", ".")
    assert (listed.code, len(listed.out.splitlines())) == (0, 1)
    assert "\x1b" not in run.out + run.err + listed.out + listed.err
