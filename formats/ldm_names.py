"""Block names of the original Stable Diffusion UNet, and diffusers' names for the same modules.

Both UNets have a first convolution, levels of two residual blocks down and three up, and a resampler between levels:
input_blocks.1..2 are level 0, .3 its downsampler, .4..5 level 1, and so on; output_blocks.0..2 are level 0.
"""

from __future__ import annotations

import re

ROOTS = ("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "label_emb.", "out.")

_FIXED = {
    "input_blocks.0.0": "conv_in", "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2", "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_RESNET = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
           "out_layers.3": "conv2", "skip_connection": "conv_shortcut"}
_PART = {"0": "resnets.{}", "1": "attentions.{}"}
_BLOCK = re.compile(r"(?:(input|output)_blocks\.(\d+)|middle_block)\.(\d+)\.(.+)")


def to_diffusers(path: str) -> str | None:
    """Return diffusers' name of an original UNet module, None where the path fits no block."""
    if path in _FIXED:
        return _FIXED[path]
    found = _BLOCK.fullmatch(path)
    if not found:
        return None
    side, block, part, rest = found.groups()
    if side is None:
        return _join("mid_block", {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}.get(part), rest)
    if side == "input":
        level, index = divmod(int(block) - 1, 3)
        if index == 2:
            return f"down_blocks.{level}.downsamplers.0.conv" if part == "0" and rest == "op" else None
        return _join(f"down_blocks.{level}", _PART[part].format(index) if part in _PART else None, rest)
    level, index = divmod(int(block), 3)
    if rest == "conv":
        return f"up_blocks.{level}.upsamplers.0.conv" if index == 2 and part in "12" else None
    return _join(f"up_blocks.{level}", _PART[part].format(index) if part in _PART else None, rest)


def _join(block: str, place: str | None, rest: str) -> str | None:
    """Return the full path where a residual block holds a residual layer and an attention block anything else."""
    if place is None or place.startswith("resnets") != (rest in _RESNET):
        return None
    return f"{block}.{place}.{_RESNET.get(rest, rest)}"
