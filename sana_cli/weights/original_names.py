"""The names of the transformer's modules: NVlabs' original ones and the published ones.

NVlabs fuses projections of the same input: its rows are those of the published modules, in order.
The table is that of diffusers' scripts/convert_sana_to_diffusers.py, which made the published
weights. The names of q/k norms (Sana 1.5, Sprint) and of the guidance embedder (Sprint) are taken
from that script alone; no released checkpoint under them was compared with it.
"""

import re

BLOCK_MODULES: dict[str, tuple[str, ...]] = {  # in blocks.N: in transformer_blocks.N
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": ("attn1.to_out.0",),
    "attn.q_norm": ("attn1.norm_q",),
    "attn.k_norm": ("attn1.norm_k",),
    "cross_attn.q_linear": ("attn2.to_q",),
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
    "cross_attn.proj": ("attn2.to_out.0",),
    "cross_attn.q_norm": ("attn2.norm_q",),
    "cross_attn.k_norm": ("attn2.norm_k",),
    "mlp.inverted_conv.conv": ("ff.conv_inverted",),
    "mlp.depth_conv.conv": ("ff.conv_depth",),
    "mlp.point_conv.conv": ("ff.conv_point",),
}
OTHER_MODULES: dict[str, tuple[str, ...]] = {
    "x_embedder.proj": ("patch_embed.proj",),
    "t_embedder.mlp.0": ("time_embed.emb.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("time_embed.emb.timestep_embedder.linear_2",),
    "t_block.1": ("time_embed.linear",),
    "y_embedder.y_proj.fc1": ("caption_projection.linear_1",),
    "y_embedder.y_proj.fc2": ("caption_projection.linear_2",),
    "attention_y_norm": ("caption_norm",),
    "final_layer.linear": ("proj_out",),
}
# Of Sprint, which embeds the strength of guidance beside the time.
GUIDED_MODULES = OTHER_MODULES | {
    "t_embedder.mlp.0": ("time_embed.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("time_embed.timestep_embedder.linear_2",),
    "cfg_embedder.mlp.0": ("time_embed.guidance_embedder.linear_1",),
    "cfg_embedder.mlp.2": ("time_embed.guidance_embedder.linear_2",),
}
TABLE = "scale_shift_table"  # a tensor of a block, and of the last layer
BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


def published_tensors(name: str, guided: bool) -> tuple[str, ...] | None:
    """Return the published tensors whose rows, in order, make up an original tensor.

    None for a name that is not in the table. `guided` if the network is one of Sprint.
    """
    if name == f"final_layer.{TABLE}":
        return (TABLE,)
    module, _, kind = name.rpartition(".")
    if kind not in ("weight", "bias"):
        block = BLOCK.fullmatch(name)
        found = block is not None and block[2] == TABLE
        return (f"transformer_{name}",) if found else None
    if block := BLOCK.fullmatch(module):
        modules = BLOCK_MODULES.get(block[2])
        return modules and tuple(f"transformer_blocks.{block[1]}.{m}.{kind}" for m in modules)
    modules = (GUIDED_MODULES if guided else OTHER_MODULES).get(module)
    return modules and tuple(f"{m}.{kind}" for m in modules)


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _both_spellings(table: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    own = {_flat(module): (module,) for modules in table.values() for module in modules}
    return own | {_flat(original): modules for original, modules in table.items()}


FLAT_BLOCK = re.compile(r"(?:transformer_)?blocks_(\d+)_(.+)")
FLAT_BLOCK_MODULES = _both_spellings(BLOCK_MODULES)
FLAT_MODULES = {
    guided: _both_spellings(GUIDED_MODULES if guided else OTHER_MODULES) for guided in (False, True)
}


def published_modules(name: str, guided: bool) -> tuple[str, ...] | None:
    """Return the published names of a module under either naming, or None.

    Dots may be underscores, as in files of OneTrainer, Kohya and LyCORIS.
    """
    flat = _flat(name)
    if block := FLAT_BLOCK.fullmatch(flat):
        modules = FLAT_BLOCK_MODULES.get(block[2])
        return modules and tuple(f"transformer_blocks.{block[1]}.{m}" for m in modules)
    return FLAT_MODULES[guided].get(flat)
