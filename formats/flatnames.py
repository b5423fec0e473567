"""Flattened module names of kohya and LyCORIS, and the dotted names they stand for."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

from adaptc.formats import ldm_names

# Attribute names of diffusers' and the original UNets and transformers and of the CLIP and T5 text encoders. Only names
# made of these (and of list indices) are unflattened: an unknown word could carry underscores of its own.
_WORDS = """
adaLN_modulation adaln_single add_embedding add_k_proj add_q_proj add_v_proj aspect_ratio_embedder attentions attn
attn1 attn2 block blocks caption_embedder caption_norm caption_projection condition_embedder context_block
context_embedder context_refiner conv conv1 conv2 conv_depth conv_in conv_inverted conv_norm_out conv_out conv_point
conv_shortcut cross_attn DenseReluDense double_blocks double_stream_modulation_img double_stream_modulation_txt
down_blocks downsamplers emb emb_layers embed_tokens embedder_1 embedder_2 embeddings encoder fc1 fc2 feed_forward
ff ff_context ffn ffn_norm1 ffn_norm2 final_layer final_layer_norm gate guidance_embedder guidance_in head img_attn
img_emb img_in img_mlp img_mod img_norm1 img_norm2 in_layer in_layers input_blocks joint_blocks
joint_transformer_blocks k k_img k_proj key_norm label_emb layer layer_norm layer_norm1 layer_norm2 layers lin
linear linear1 linear2 linear_1 linear_2 linear_3 linear_in linear_out mid_block middle_block mlp modulation net
noise_refiner norm norm1 norm1_context norm2 norm2_context norm3 norm_added_k norm_added_q norm_final norm_k
norm_k_img norm_out norm_q o op out out_layer out_layers out_proj out_projection output_blocks patch_embed
patch_embedding pos_embed position_embedding proj proj_in proj_mlp proj_out q q_proj qkv query_norm refiner_blocks
relative_attention_bias resnets resolution_embedder self_attn SelfAttention shared single_blocks
single_stream_modulation single_transformer_blocks skip_connection t_embedder text_embedder text_embedding
text_model text_proj text_projection time_caption_embed time_emb_proj time_embed time_embedder time_embedding
time_guidance_embed time_in time_proj time_projection time_step_proj time_text_embed timestep_embedder to_add_out
to_k to_out to_q to_qkv_mlp_proj to_v token_embedding token_refiner transformer_blocks txt_attn txt_in txt_mlp
txt_mod txt_norm txt_norm1 txt_norm2 up_blocks upsamplers v v_img v_proj vector_in w1 w2 w3 wi wi_0 wi_1 wo x_block
x_embedder y_embedder
"""
WORDS = frozenset(_WORDS.split())
_LONGEST = max(w.count("_") for w in WORDS) + 1

# kohya says "unet" for whatever denoises; the first word of the module tells which network it is. diffusers' own names
# are prefixed as diffusers prefixes them, the original (BFL, Stability, Wan) names as everybody does: diffusion_model.
_FIRST_WORDS = {
    "unet": "down_blocks up_blocks mid_block conv_in conv_out conv_norm_out add_embedding",
    "transformer": "transformer_blocks single_transformer_blocks joint_transformer_blocks context_embedder x_embedder "
                   "time_text_embed norm_out proj_out pos_embed adaln_single caption_projection condition_embedder "
                   "layers context_refiner noise_refiner",
    "diffusion_model": "double_blocks single_blocks joint_blocks blocks img_in txt_in time_in vector_in guidance_in "
                       "final_layer img_emb text_embedding time_projection patch_embedding head t_embedder y_embedder",
}
_ROOTS = {word: component for component, words in _FIRST_WORDS.items() for word in words.split()}

# Flattened prefix -> component; "" where the first word of the module decides. Longest first.
PREFIXES = {"lora_transformer_": "transformer", "lora_prior_": "prior", "lora_unet_": "", "lora_te1_": "text_encoder",
            "lora_te2_": "text_encoder_2", "lora_te3_": "text_encoder_3", "lora_te_": "text_encoder", "lycoris_": None}
_CLIP_PARTS = ("encoder.layers.", "embeddings.", "final_layer_norm")
COMPONENTS = ("unet", "transformer", "transformer_2", "diffusion_model", "text_encoder", "text_encoder_2",
              "text_encoder_3", "prior")


def flatten(module: str) -> str:
    """Return a dotted module path with underscores for dots, as kohya writes it; what was which is lost."""
    return module.replace(".", "_")


@cache
def unflatten(flat: str) -> str | None:
    """Return the dotted path of a flattened one, None unless it splits into known words and indices.

    Longest words first, so "to_out_0" is to_out.0 and "linear_1" stays whole; flatten(unflatten(x)) == x.
    """
    parts = flat.split("_")
    ends: list[int | None] = [None] * len(parts) + [len(parts)]  # end of the word that starts here, if the rest splits
    for at in reversed(range(len(parts))):
        longest = range(min(len(parts), at + _LONGEST), at, -1)
        ends[at] = next((e for e in longest if ends[e] is not None and _is_word(parts[at:e])), None)
    path, at = [], 0
    while at < len(parts):
        end = ends[at]
        if end is None:
            return None
        path.append("_".join(parts[at:end]))
        at = end
    return ".".join(path)


def _is_word(parts: list[str]) -> bool:
    word = "_".join(parts)
    return word in WORDS or (len(parts) == 1 and word.isascii() and word.isdigit())


def module_of(stem: str) -> str | None:
    """Return the module path, component first, that a kohya stem stands for; None when it cannot be told.

    lora_unet_down_blocks_0_attentions_0_proj_in -> unet.down_blocks.0.attentions.0.proj_in. The original Stable
    Diffusion block names (input_blocks, ...) become diffusers' (down_blocks, ...).
    """
    prefix = next((p for p in PREFIXES if stem.startswith(p)), None)
    path = unflatten(stem[len(prefix):]) if prefix is not None else None
    if prefix is None or path is None or path[0].isdigit():
        return None
    component = PREFIXES[prefix]
    if component is None:
        return path
    if component:
        return with_text_model(f"{component}.{path}")
    if path.startswith(ldm_names.ROOTS):
        mapped = ldm_names.to_diffusers(path)
        return f"unet.{mapped}" if mapped else None
    found = root_component(path)
    return f"{found}.{path}" if found else None


def with_text_model(module: str) -> str:
    """Return the module path of a CLIP text encoder with the wrapper that transformers 5.6 dropped from its names."""
    component, _, path = module.partition(".")
    bare = component.startswith("text_encoder") and path.startswith(_CLIP_PARTS)
    return f"{component}.text_model.{path}" if bare else module


def root_component(path: str) -> str | None:
    """Return the component whose network has this module path, by its first word; None where that does not tell."""
    root = path.partition(".")[0]
    if root == "time_embedding":  # a UNet's has linear_1, Wan's an index
        return "unet" if "linear" in path else "diffusion_model"
    if root == "blocks" and (".attn" in path or ".net." in path):  # Wan as diffusers names it
        return "transformer"
    return _ROOTS.get(root)


def stem_of(module: str, several_encoders: bool) -> str:
    """Return the kohya stem of a module path: the component's prefix and the flattened rest.

    `several_encoders` chooses lora_te1_ over lora_te_ for text_encoder. A path without a known component gets the
    prefix lycoris_; one that is a kohya stem already is returned as it is.
    """
    if "." not in module and module.startswith(tuple(PREFIXES)):
        return module
    component, _, path = module.partition(".")
    prefixes = {"unet": "lora_unet_", "diffusion_model": "lora_unet_", "transformer": "lora_transformer_",
                "prior": "lora_prior_", "text_encoder": "lora_te1_" if several_encoders else "lora_te_",
                "text_encoder_2": "lora_te2_", "text_encoder_3": "lora_te3_"}
    if component in prefixes and path:
        return prefixes[component] + flatten(path)
    return "lycoris_" + flatten(module)


def has_several_encoders(keys: Iterable[str]) -> bool:
    """Return whether these parameters belong to a model with more than one text encoder (SDXL, SD3, Flux, ...).

    Told by a second encoder, by a transformer in the UNet's place, or by SDXL's deeper attention blocks: Stable
    Diffusion 1 and 2 have one transformer block in each.
    """
    others = ("text_encoder_2.", "text_encoder_3.", "transformer.", "diffusion_model.")
    return any(k.startswith(others) or (k.startswith("unet.") and ".transformer_blocks.1." in k) for k in keys)


def kernel_of(module: str, columns: int, unet_width: int | None) -> tuple[int, ...]:
    """Return the kernel of a UNet convolution whose factors are stored flat, () for a linear layer or no UNet.

    `columns` is in * kernel size; `unet_width` the input width of attn2.to_k: 768 marks Stable Diffusion 1, whose
    proj_in and proj_out are 1x1 convolutions where later models have linear layers.
    """
    if not module.startswith("unet."):
        return ()
    leaf = module.rpartition(".")[2]
    if leaf == "conv_shortcut" or (leaf in ("proj_in", "proj_out") and unet_width == 768):
        return (1, 1)
    if leaf in ("conv", "conv1", "conv2", "conv_in", "conv_out") and columns % 9 == 0:
        return (3, 3)
    return ()
