"""LoRA files in the containers that trainers write, and a transformer's weights with them merged.

A file adds ΔW = factor · B·A to the weight of a layer (arXiv 2106.09685), or in LoKr's case
ΔW = factor · w1 ⊗ w2 (arXiv 2309.14859). The factor is alpha / rank: see `_factor`. Merged weights
are cast(float32(W) + Σ scale · ΔW), one cast, before anything else is done with W.

Modules are called by their published names or by NVlabs' (`original_names`), behind a prefix that
tells the container. The keys of diffusers, PEFT, LyCORIS and OneTrainer were read in their sources;
that files of other tools put NVlabs' names behind ComfyUI's and Kohya's prefixes is inferred.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sana_cli.errors import BrokenModel, UsageError
from sana_cli.models.architectures import TRANSFORMERS
from sana_cli.models.configs import DiTConfig
from sana_cli.models.dit import DiT
from sana_cli.weights.catalogue import PACKAGE, known_models
from sana_cli.weights.checkpoint import WEIGHT_DTYPES, on_meta, read_tensors
from sana_cli.weights.config_files import read_config
from sana_cli.weights.headers import FLOATS, NAMES_SHOWN, open_safetensors
from sana_cli.weights.layout import ADAPTER_CONFIG, Tensors, read_json, refuse_pickle
from sana_cli.weights.original_names import published_modules

CONTAINERS = {  # by the prefix of the names in it; without one it is diffusers' or NVlabs'
    "base_model.model.": "PEFT",
    "model.diffusion_model.": "ComfyUI",
    "diffusion_model.": "ComfyUI",
    "transformer.": "diffusers",
    "lora_transformer_": "OneTrainer",
    "lora_unet_": "Kohya",
    "lycoris_": "LyCORIS",
}
PARAMETERS = {
    **{f".{name}.weight": "A" for name in ("lora_A", "lora_down", "lora.down")},
    **{f".{name}.weight": "B" for name in ("lora_B", "lora_up", "lora.up")},
    ".lora_linear_layer.down.weight": "A",
    ".lora_linear_layer.up.weight": "B",
    ".lora_B.bias": "bias",
    ".lora_up.bias": "bias",
    ".alpha": "alpha",
    **{f".lokr_{name}": name for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")},
}
ADAPTER_NAME = re.compile(
    r"\.default(?=\.(weight|bias)$)"
)  # PEFT's, in what it has not saved itself
REFUSED = (
    (
        r"(lora_te|lora_text_encoder|text_encoder|te\d?\.).*",
        "changes the text encoder, which stays as it is in every Sana model",
        "train or export it for the transformer alone",
    ),
    (
        r"bundle_emb\..*",
        "holds embeddings of new words, which sana does not add to the text encoder",
        "export it from OneTrainer without additional embeddings",
    ),
    (
        r".*\.(dora_scale|magnitude|lora_magnitude_vector(\..*)?)",
        "is a DoRA, whose magnitudes are not supported",
        "train or convert it as a plain LoRA",
    ),
    (
        r".*\.(hada_\w+|oft_\w+(\.\w+)?|lokr_t\w+|lora_mid\.weight|diff|diff_b|[wb]_norm|on_input)",
        "is of a kind of adapter that is not supported",
        "LoRA and LoKr without Tucker factors are",
    ),
)
AGAIN = "fetch it again, or export it again"
# diffusers' entry of the header: PEFT's config as JSON, which PEFT itself saves in a file beside.
METADATA = "lora_adapter_metadata"
PEFT_DEFAULT = 8  # rank and alpha where a config of PEFT's states none
BASE_MODEL_KEYS = ("ss_sd_model_name", "ss_base_model_version", "modelspec.architecture")
# Modules that read tokens of the transformer's width, which so tells what it was made for.
READS_WIDTH = re.compile(r".*\.(attn[12]\.to_[qkv]|attn[12]\.to_out\.0|ff\.conv_inverted)")


@dataclass(frozen=True)
class Update:
    """The part of a LoRA file for one module: the names and shapes of its tensors."""

    module: str  # as the file calls it, without the container's prefix
    keys: dict[str, str]  # by parameter, as in PARAMETERS
    shapes: dict[str, tuple[int, ...]]
    rank: int | None  # None for a LoKr of two whole matrices
    alpha: float | None  # None where nothing states one, and the factor is 1
    factor: float

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of ΔW as a matrix."""
        if "A" in self.shapes:
            return self.shapes["B"][0], math.prod(self.shapes["A"][1:])
        return (
            self._kron_shape("w1", "a", 0) * self._kron_shape("w2", "a", 0),
            self._kron_shape("w1", "b", 1) * self._kron_shape("w2", "b", 1),
        )

    def _kron_shape(self, which: str, half: str, axis: int) -> int:
        shape = self.shapes.get(which) or self.shapes[f"{which}_{half}"]
        return math.prod(shape[1:]) if axis else shape[0]

    def rows(self, file: Any, first: int, last: int, scale: float) -> Tensor:
        """Read rows of scale · ΔW, float32 (last - first, columns), from the open file."""

        def matrix(name: str) -> Tensor:
            return file.get_tensor(self.keys[name]).float().flatten(1)

        if "A" in self.keys:
            up = file.get_tensor(self.keys["B"])[first:last].float().flatten(1)
            return (up * (scale * self.factor)) @ matrix("A")
        left, right = (
            matrix(which) if which in self.keys else matrix(f"{which}_a") @ matrix(f"{which}_b")
            for which in ("w1", "w2")
        )
        return torch.kron(left * (scale * self.factor), right)[first:last]

    def bias_rows(self, file: Any, first: int, last: int, scale: float) -> Tensor:
        """Read rows of the update of the bias, float32."""
        return file.get_tensor(self.keys["bias"])[first:last].float() * (scale * self.factor)


@dataclass(frozen=True)
class Lora:
    """A LoRA file whose header was read and checked. Its tensors stay in the file."""

    path: Path
    sha256: str  # of the file and, where its factors are stated beside it, of those
    container: str
    updates: tuple[Update, ...]
    base_model: str | None  # what the file says it was trained on

    @property
    def width(self) -> int | None:
        """Width of the transformer it was made for; None if none of its modules shows it."""
        for update in self.updates:
            modules = published_modules(update.module, guided=False)
            if modules and READS_WIDTH.fullmatch(modules[0]):
                return update.shape[1]
        return None

    @property
    def blocks(self) -> list[int]:
        """Indices of the blocks that it changes."""
        found = (re.search(r"blocks[._](\d+)[._]", f".{u.module}") for u in self.updates)
        return sorted({int(match[1]) for match in found if match})

    @property
    def families(self) -> list[str]:
        """The sizes of Sana ("0.6B" …) that it fits, by width and number of blocks."""
        least = max(self.blocks, default=-1) + 1
        fitting = {
            name: config.num_layers
            for name, config in families().items()
            if config.width == self.width and config.num_layers >= least
        }
        # What changes just the blocks that a model has was made for that model.
        return [name for name, depth in fitting.items() if depth == least] or list(fitting)


class Rows(NamedTuple):
    """The rows of an update that are added to one tensor."""

    update: Update
    first: int
    last: int
    bias: bool = False

    def read(self, file: Any, scale: float) -> Tensor:
        read = self.update.bias_rows if self.bias else self.update.rows
        return read(file, self.first, self.last, scale)


# --- reading -----------------------------------------------------------------------------------


def read_lora(path: Path) -> Lora:
    """Read the LoRA in a safetensors file, in any container.

    UsageError if there is no file; BrokenModel for one that is not a LoRA, or holds anything that
    could not be applied.
    """
    if not path.is_file():
        raise UsageError(f"the LoRA {path} does not exist", "check the path, or name a repository")
    refuse_pickle(path)
    with open_safetensors(path) as file:
        names = list(file.keys())
        header = file.metadata() or {}
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
        dtypes = {name: file.get_slice(name).get_dtype() for name in names}
        alphas = {
            name: file.get_tensor(name).double().flatten().tolist()
            for name in names
            if name.endswith(".alpha")
        }
    container, modules = _modules(path, names)
    quantised = sorted(n for n in names if dtypes[n] not in FLOATS and n not in alphas)
    if quantised:
        raise BrokenModel(
            f"{path}: {quantised[0]} is {dtypes[quantised[0]]}; quantised LoRAs are not supported",
            "use its float16 or bfloat16 file",
        )
    config_file = path.parent / ADAPTER_CONFIG
    beside = container == "PEFT" and METADATA not in header and config_file.is_file()
    config = _peft_config(path, read_json(config_file) if beside else header.get(METADATA))
    if config is not None and config.get("use_dora"):
        raise BrokenModel(f"{path} {REFUSED[2][1]}", REFUSED[2][2])
    updates = []
    for module, keys in modules.items():
        alpha = alphas.get(keys.pop("alpha", ""))
        if alpha is not None and (len(alpha) != 1 or not math.isfinite(alpha[0])):
            raise BrokenModel(
                f"{path}: alpha of {module} is {str(alpha)[:80]}, not a number", AGAIN
            )
        sizes = {name: shapes[key] for name, key in keys.items()}
        updates.append(_update(path, module, keys, sizes, alpha[0] if alpha else None, config))
    named = [(config or {}).get("base_model_name_or_path"), *map(header.get, BASE_MODEL_KEYS)]
    return Lora(
        path,
        _sha256(path, config_file if beside else None),
        container,
        tuple(updates),
        next((name for name in named if isinstance(name, str) and name), None),
    )


def unchanged_lora(path: Path, sha256: str) -> Lora:
    """Read a LoRA again; BrokenModel if its file has changed."""
    lora = read_lora(path)
    if lora.sha256 != sha256:
        raise BrokenModel(f"{path} has changed since it was first read", "start again")
    return lora


def _modules(path: Path, names: list[str]) -> tuple[str, dict[str, dict[str, str]]]:
    """Return the container and the names of each module's parameters."""
    for pattern, reason, hint in REFUSED:
        refused = sorted(name for name in names if re.fullmatch(pattern, name))
        if refused:
            raise BrokenModel(f"{path} {reason} ({_some(refused)})", hint)
    containers: set[str] = set()
    modules: dict[str, dict[str, str]] = {}
    unknown = []
    for name in names:
        plain = ADAPTER_NAME.sub("", name)
        suffix = next((suffix for suffix in PARAMETERS if plain.endswith(suffix)), None)
        prefix = next((prefix for prefix in CONTAINERS if plain.startswith(prefix)), "")
        module = plain.removeprefix(prefix).removesuffix(suffix or "")
        known = published_modules(module, guided=False) or published_modules(module, guided=True)
        if suffix is None or known is None:
            unknown.append(name)
            continue
        own = "diffusers" if module in known else "NVlabs"
        containers.add(CONTAINERS.get(prefix, own))
        keys = modules.setdefault(module, {})
        if PARAMETERS[suffix] in keys:
            raise BrokenModel(f"{path} has {module}{suffix} twice, under two names", AGAIN)
        keys[PARAMETERS[suffix]] = name
    if not modules:
        whole = any(name.endswith("scale_shift_table") for name in names)
        raise BrokenModel(
            f"{path} holds no LoRA for Sana ({_some(names) if names else 'it is empty'})",
            f"it is a whole model: --model {path}" if whole else "is it for another model?",
        )
    if unknown:
        raise BrokenModel(
            f"{path} holds {len(unknown)} tensors that no part of Sana's transformer takes:"
            f" {_some(sorted(unknown))}",
            "was it made for another model?",
        )
    return " and ".join(sorted(containers)), modules


def _update(
    path: Path,
    module: str,
    keys: dict[str, str],
    shapes: dict[str, tuple[int, ...]],
    alpha: float | None,
    config: Mapping[str, Any] | None,
) -> Update:
    """Build a module's update after checking that its tensors belong together."""
    halves = [{which} if which in keys else {f"{which}_a", f"{which}_b"} for which in ("w1", "w2")]
    whole = {"A", "B"} if keys.keys() & {"A", "B", "bias"} else halves[0] | halves[1]
    if keys.keys() - {"bias"} != whole:
        lacking, extra = whole - keys.keys(), keys.keys() - whole - {"bias"}
        said = f"lacks {', '.join(sorted(lacking))}" if lacking else f"also has {sorted(extra)[0]}"
        raise BrokenModel(f"{path}: the update of {module} {said}", AGAIN)
    matrices = [shape for name, shape in shapes.items() if name != "bias"]
    products = [("A", "B")] if "A" in keys else [(f"{w}_b", f"{w}_a") for w in ("w1", "w2")]
    products = [pair for pair in products if pair[0] in keys]
    ranks = {shapes[down][0] if shapes[down] else 0 for down, _ in products}
    ranks |= {math.prod(shapes[up][1:]) for _, up in products}
    if len(ranks) > 1 or any(0 in s or len(s) < 2 for s in matrices):
        said = ", ".join(f"{name} {shape}" for name, shape in sorted(shapes.items()))
        raise BrokenModel(f"{path}: the shapes of {module} do not multiply: {said}", AGAIN)
    rank = ranks.pop() if ranks else None
    alpha, factor = _factor(path, module, rank, alpha, config)
    return Update(module, keys, shapes, rank, alpha, factor)


def _factor(
    path: Path,
    module: str,
    rank: int | None,
    alpha: float | None,
    config: Mapping[str, Any] | None,
) -> tuple[float | None, float]:
    """Return alpha and the factor of B·A for a module.

    A tensor `alpha` gives alpha / rank, and 1 where two whole matrices have no rank, as LyCORIS
    does. Otherwise PEFT's config decides: alpha / rank, or alpha / √rank of an rsLoRA
    (arXiv 2312.03732). Where neither is there the factor is 1, which is what diffusers takes.
    """
    if alpha is not None:
        return alpha, alpha / rank if rank else 1.0
    if config is None:
        return None, 1.0
    stated = _of_module(path, config, "rank_pattern", module)
    stated = config.get("r", PEFT_DEFAULT) if stated is None else stated
    alpha = _of_module(path, config, "alpha_pattern", module)
    if alpha is None:  # LoKr's config calls it alpha
        alpha = config.get("lora_alpha", config.get("alpha", PEFT_DEFAULT))
    for value in (stated, alpha):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
            raise BrokenModel(
                f"{path}: its metadata gives {module} the rank or alpha {value!r}", AGAIN
            )
    if rank not in (None, stated):
        raise BrokenModel(
            f"{path}: {module} has rank {rank}, its metadata says {stated}",
            AGAIN,
        )
    return alpha, alpha / (math.sqrt(stated) if config.get("use_rslora") else stated)


def _of_module(path: Path, config: Mapping[str, Any], pattern: str, module: str) -> Any:
    """Find a module's entry in `rank_pattern` or `alpha_pattern`, by name or end of name.

    PEFT matches regular expressions; those that are more than a name are refused, as a stranger's
    expression can run for ever.
    """
    for key, value in (config.get(pattern) or {}).items():
        name = key.removeprefix("^").removesuffix("$").replace(r"\.", ".")
        if not re.fullmatch(r"[\w.]+", name):
            raise BrokenModel(
                f"{path}: {pattern} holds {key[:80]!r}, which is not a module's name", AGAIN
            )
        if f".{module}".endswith(f".{name}"):
            return value
    return None


def _peft_config(path: Path, stated: Any) -> Mapping[str, Any] | None:
    """Return PEFT's config of the transformer's adapter without the prefix of diffusers."""
    if isinstance(stated, str):
        try:
            stated = json.loads(stated)
        except (ValueError, RecursionError) as error:
            raise BrokenModel(f"{path}: {METADATA} is not JSON: {error}", AGAIN) from None
    if stated is None:
        return None
    if not isinstance(stated, dict):
        raise BrokenModel(f"{path}: {METADATA} is not a JSON object", AGAIN)
    prefix = "transformer."
    own = {k.removeprefix(prefix): v for k, v in stated.items() if k.startswith(prefix)}
    config = own or {key: value for key, value in stated.items() if "." not in key}
    for pattern in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(pattern) or {}, dict):
            raise BrokenModel(f"{path}: {pattern} of {METADATA} is not a JSON object", AGAIN)
    return config or None


def _sha256(path: Path, config: Path | None) -> str:
    with open(path, "rb") as file:
        state = hashlib.file_digest(file, "sha256")
    if config is not None:
        state.update(config.read_bytes())
    return state.hexdigest()


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more


# --- what it fits ------------------------------------------------------------------------------


@cache
def families() -> dict[str, DiTConfig]:
    """Return the transformers that a LoRA can be for, by size ("0.6B")."""
    sizes = {name.split("-")[-1].upper(): config for name, config in TRANSFORMERS.items()}
    demo, _ = read_config(DiTConfig, PACKAGE / "demo" / "transformer" / "config.json")
    return sizes | {"demo": demo}


def fit(lora: Lora, config: DiTConfig) -> dict[str, Rows]:
    """Map each published tensor that a LoRA changes to the rows of its update.

    UsageError if it was made for another one.
    """
    if lora.width not in (None, config.width):
        raise UsageError(
            f"{lora.path} was made for {_made_for(lora)} (width {lora.width}); this model is"
            f" {config.width} wide",
            _other_model(lora),
        )
    last = max(lora.blocks, default=0)
    if last >= config.num_layers:
        raise UsageError(
            f"{lora.path} was made for {_made_for(lora)}: it changes block {last + 1}, and this"
            f" model has {config.num_layers}",
            _other_model(lora),
        )
    shapes = transformer_shapes(config)
    rows: dict[str, Rows] = {}
    problems = []
    for update in lora.updates:
        modules = published_modules(update.module, config.guidance_embeds) or (update.module,)
        weights = [f"{module}.weight" for module in modules]
        absent = [name for name in weights if name not in shapes]
        if absent:
            problems.append(f"the model has no {absent[0]}")
            continue
        wanted = (sum(shapes[name][0] for name in weights), math.prod(shapes[weights[0]][1:]))
        if update.shape != wanted:
            problems.append(_misfit(update, wanted))
            continue
        kinds = ["weight", "bias"] if "bias" in update.keys else ["weight"]
        if "bias" in update.keys and update.shapes["bias"] != wanted[:1]:
            problems.append(f"the bias of {update.module} has shape {update.shapes['bias']}")
            continue
        for kind in kinds:
            first = 0
            for module in modules:
                name = f"{module}.{kind}"
                end = first + shapes[f"{module}.weight"][0]
                if name not in shapes:
                    problems.append(f"{module} has no bias to add one to")
                elif name in rows:
                    problems.append(f"{module} is changed twice")
                else:
                    rows[name] = Rows(update, first, end, kind == "bias")
                first = end
    if problems:
        raise UsageError(
            f"{lora.path} does not fit this model: {'; '.join(problems[:NAMES_SHOWN])}",
            "was it made for another model?",
        )
    return rows


def remarks(lora: Lora, config: DiTConfig, names: Sequence[str]) -> list[str]:
    """Describe what suggests that a LoRA that fits was made for another model.

    `names` are those that the model goes by: its own and its repository's.
    """
    found = []
    if lora.base_model is not None and lora.base_model not in names:
        found.append(f"{lora.path.name} says that it was trained on {lora.base_model}")
    changed = max(lora.blocks, default=-1) + 1
    others = [
        name
        for name, other in families().items()
        if other.width == config.width and other.num_layers == changed != config.num_layers
    ]
    if others:
        found.append(
            f"{lora.path.name} changes the first {changed} of {config.num_layers} blocks: was it"
            f" made for the {others[0]}?"
        )
    return found


def transformer_shapes(config: DiTConfig) -> dict[str, torch.Size]:
    """Return the shape of every tensor of a transformer, by published name."""
    network = on_meta(DiT, config, Path("config.json"))
    return {name: tensor.shape for name, tensor in network.state_dict().items()}


def _misfit(update: Update, wanted: tuple[int, int]) -> str:
    if wanted[1] < update.shape[1] and "depth" in update.module:
        return (
            f"{update.module} is a depthwise convolution, and an update that mixes its channels"
            " cannot be merged into it"
        )
    return f"the update of {update.module} is {update.shape}, not {wanted}"


def _made_for(lora: Lora) -> str:
    return f"the {' or '.join(lora.families)}" if lora.families else "another model"


def _other_model(lora: Lora) -> str:
    for name, model in known_models().items():
        size = (model.architecture or name).split("-")[-1].upper()
        if size in lora.families or name in lora.families:
            return f"use a model of that size, such as --model {name}"
    return "use the model that it was trained on"


# --- merging -----------------------------------------------------------------------------------


class MergedTensors:
    """The weights of a transformer with LoRAs added, each at its scale: a `Tensors`.

    Tensors that no LoRA changes come as they are; the others are made one at a time, in `dtype`.
    UsageError if one of the LoRAs does not fit.
    """

    def __init__(
        self,
        base: Sequence[Path | Tensors],
        loras: Sequence[tuple[Lora, float]],
        config: DiTConfig,
        dtype: torch.dtype,
    ) -> None:
        self.base, self.loras, self.dtype = tuple(base), tuple(loras), dtype
        self.shapes = transformer_shapes(config)
        self.rows = [fit(lora, config) for lora, _ in loras]

    def __str__(self) -> str:
        return f"{self.base[0]} with {self._named()}"

    def tensors(self, only: str) -> Iterator[tuple[str, Tensor]]:
        """Yield the merged tensors. BrokenModel if a file is damaged or a tensor is not finite."""
        with ExitStack() as stack:
            files = [stack.enter_context(open_safetensors(lora.path)) for lora, _ in self.loras]
            for source in self.base:
                for name, tensor in read_tensors(source, only):
                    yield name, self._merged(only + name, tensor, files)

    def _merged(self, name: str, tensor: Tensor, files: list[Any]) -> Tensor:
        added: Tensor | None = None
        for (_, scale), rows, file in zip(self.loras, self.rows, files, strict=True):
            if name in rows:
                update = rows[name].read(file, scale)
                added = update if added is None else added.add_(update)
        # What does not fit its config is left for `load_weights` to report, with all the others.
        if added is None or tensor.shape != self.shapes[name] or tensor.dtype not in WEIGHT_DTYPES:
            return tensor
        merged = added.view(tensor.shape).to(tensor.device).add_(tensor.float()).to(self.dtype)
        if not all(end.isfinite() for end in merged.aminmax()):  # NaN is both ends
            raise BrokenModel(
                f"{name} is not finite with {self._named()}", "give a smaller scale: FILE:0.5"
            )
        return merged

    def _named(self) -> str:
        return ", ".join(f"{lora.path.name}:{scale:g}" for lora, scale in self.loras)


# --- telling -----------------------------------------------------------------------------------


def describe(path: Path) -> dict[str, Any]:
    """Describe a LoRA file without a model, as JSON values. Raises as `read_lora` does."""
    lora = read_lora(path)
    return {
        "path": str(path),
        "bytes": path.stat().st_size,
        "sha256": lora.sha256,
        "kind": "LoKr" if any("A" not in update.keys for update in lora.updates) else "LoRA",
        "container": lora.container,
        "ranks": sorted({update.rank for update in lora.updates if update.rank is not None}),
        "alphas": sorted({update.alpha for update in lora.updates if update.alpha is not None}),
        "modules": len(lora.updates),
        "blocks": lora.blocks,
        "width": lora.width,
        "fits": lora.families,
        "base_model": lora.base_model,
    }
