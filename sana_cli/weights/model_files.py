"""A model as its configs describe it: where its parts lie, and what its networks are."""

from dataclasses import dataclass, replace
from pathlib import Path

from sana_cli.errors import BrokenModel, MissingModel
from sana_cli.models.architectures import architecture
from sana_cli.models.configs import ControlNetConfig, DCAEConfig, DiTConfig, GemmaConfig
from sana_cli.weights.catalogue import Model
from sana_cli.weights.config_files import read_config
from sana_cli.weights.headers import refuse_quantised
from sana_cli.weights.layout import INDEX, Part, Parts, read_json
from sana_cli.weights.single_file import SingleFile, architecture_of, native_side

# diffusers' pipelines over the same networks, the one that every model can be drawn with first.
PIPELINES = ("SanaPipeline", "SanaPAGPipeline", "SanaControlNetPipeline")
SPRINT_PIPELINES = ("SanaSprintPipeline", "SanaSprintImg2ImgPipeline")


@dataclass(frozen=True)
class ModelFiles:
    """The files of a model, and the facts in their configs that a recipe depends on."""

    parts: Parts
    dit: DiTConfig
    vae: DCAEConfig
    text: GemmaConfig
    flow_shift: float | None  # None for Sana-Sprint, whose solver has none
    unknown_keys: tuple[str, ...]  # of the configs: what they ask for is not done
    controlnet: ControlNetConfig | None = None  # of the part "controlnet", if there is one

    @property
    def is_sprint(self) -> bool:
        """Whether the model is distilled to few steps, with embedded guidance."""
        return self.dit.guidance_embeds

    @property
    def side(self) -> int:
        return self.dit.sample_size * self.vae.compression


def released_model(model: Model) -> ModelFiles:
    """Return the published configs of a released model whose files are not on this machine."""
    if model.architecture is None or model.side is None:
        raise MissingModel(
            f"{model.name} is not on this machine, and its configuration is unknown until it is",
            f"fetch it with: sana models pull {model.name}",
        )
    known = architecture(model.architecture, model.side)
    return ModelFiles({}, known.dit, known.vae, known.text, known.flow_shift, ())


def open_model(parts: Parts) -> ModelFiles:
    """Read every config of a model, no weights. BrokenModel names what is wrong."""
    index = parts["transformer"].folder.parent / INDEX
    kind = read_json(index).get("_class_name")
    known = (*PIPELINES, *SPRINT_PIPELINES)
    if kind not in (None, *known):
        raise BrokenModel(f"{index} names a {kind}", f"only {', '.join(known)} can be drawn")
    for part in parts.values():
        refuse_quantised(part)
    dit, strange = read_config(DiTConfig, parts["transformer"].config)
    if dit.guidance_embeds != (kind in SPRINT_PIPELINES):
        has = "has" if dit.guidance_embeds else "lacks"
        raise BrokenModel(
            f"{parts['transformer'].config} {has} guidance_embeds, but {INDEX} names"
            f" {kind or 'no kind'}"
        )
    vae, text, more = _around(dit, parts)
    shift = None if kind in SPRINT_PIPELINES else _flow_shift(parts["scheduler"].folder)
    return ModelFiles(parts, dit, vae, text, shift, (*strange, *more))


def open_single_file(file: SingleFile, shared: Parts, side: int | None = None) -> ModelFiles:
    """Combine a transformer in one file with the text encoder and autoencoder in `shared`.

    Its config and flow shift are those of the released architecture that its shapes have, at the
    native `side` in pixels: see `native_side` for what is taken where none is given.
    """
    for part in shared.values():
        refuse_quantised(part)
    known = architecture(architecture_of(file), native_side(file) if side is None else side)
    parts = shared | {"transformer": Part(file.path.parent, (file,))}
    vae, text, unknown = _around(known.dit, parts)
    return ModelFiles(parts, known.dit, vae, text, known.flow_shift, tuple(unknown))


def _around(dit: DiTConfig, parts: Parts) -> tuple[DCAEConfig, GemmaConfig, list[str]]:
    """Read the configs of the networks around a transformer, and their unknown keys.

    BrokenModel if they do not go together.
    """
    vae, unknown = read_config(DCAEConfig, parts["vae"].config)
    path = parts["text_encoder"].config
    text, _ = read_config(GemmaConfig, path)
    if text.hidden_size != dit.caption_channels:
        raise BrokenModel(
            f"{path}: hidden_size is {text.hidden_size}, the transformer reads"
            f" {dit.caption_channels}"
        )
    if dit.in_channels != vae.latent_channels or dit.out_channels != vae.latent_channels:
        raise BrokenModel(
            f"{parts['vae'].config}: {vae.latent_channels} latent channels, the transformer's"
            f" are {dit.in_channels} in and {dit.out_channels} out"
        )
    return vae, text, unknown


def with_vae(files: ModelFiles, part: Part) -> ModelFiles:
    """Replace the autoencoder. BrokenModel if it is quantised or its latents are not the same."""
    refuse_quantised(part)
    vae, unknown = read_config(DCAEConfig, part.config)
    own = files.vae
    if (vae.latent_channels, vae.compression) != (own.latent_channels, own.compression):
        raise BrokenModel(
            f"{part.config}: {vae.latent_channels} latent channels at 1/{vae.compression} of the"
            f" size, where the model has {own.latent_channels} at 1/{own.compression}",
            "use an autoencoder of the same latents, such as --vae lite",
        )
    parts = files.parts | {"vae": part}
    return replace(files, parts=parts, vae=vae, unknown_keys=(*files.unknown_keys, *unknown))


def with_controlnet(files: ModelFiles, part: Part) -> ModelFiles:
    """Add a ControlNet. BrokenModel if it is quantised or was made for another transformer."""
    refuse_quantised(part)
    config, unknown = read_config(ControlNetConfig, part.config)
    try:
        config.check_matches(files.dit)
    except ValueError as error:
        raise BrokenModel(f"{part.config}: {error}", "use the ControlNet of this model") from None
    parts = files.parts | {"controlnet": part}
    keys = (*files.unknown_keys, *unknown)
    return replace(files, parts=parts, controlnet=config, unknown_keys=keys)


def _flow_shift(folder: Path) -> float:
    scheduler = folder / "scheduler_config.json"
    facts = read_json(scheduler)
    # Flow-DPM configs call it flow_shift, Flow-Euler ones shift.
    shift = facts.get("flow_shift", facts.get("shift"))
    if not isinstance(shift, int | float) or isinstance(shift, bool) or not 0 < shift < 1000:
        raise BrokenModel(f"{scheduler}: the flow shift is {shift!r}")
    return float(shift)
