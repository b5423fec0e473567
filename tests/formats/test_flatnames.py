from __future__ import annotations

from itertools import product

import pytest

from adaptc.formats.flatnames import flatten, has_several_encoders, kernel_of, module_of, stem_of, unflatten


def blocks() -> list[str]:
    """Module names of Stable Diffusion's UNet as diffusers builds it, the layers LoRA trainers adapt."""
    out = ["conv_in", "conv_out", "conv_norm_out", "time_embedding.linear_1", "time_embedding.linear_2",
           "add_embedding.linear_1"]
    places = [f"{side}_blocks.{i}" for side, i in product(("down", "up"), range(4))] + ["mid_block"]
    resnet = ["norm1", "conv1", "time_emb_proj", "norm2", "conv2", "conv_shortcut"]
    layer = ["norm1", "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_out.0", "ff.net.0.proj",
             "ff.net.2"]
    for place in places:
        out += [f"{place}.resnets.{i}.{leaf}" for i, leaf in product(range(3), resnet)]
        out += [f"{place}.attentions.0.{leaf}" for leaf in ("norm", "proj_in", "proj_out")]
        out += [f"{place}.attentions.1.transformer_blocks.{i}.{leaf}" for i, leaf in product((0, 9), layer)]
        out += [f"{place}.downsamplers.0.conv", f"{place}.upsamplers.0.conv"]
    return out


TEXT = [f"text_model.encoder.layers.{i}.{leaf}" for i in (0, 11, 31) for leaf in
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2",
         "layer_norm1")] + ["text_model.embeddings.token_embedding", "text_projection"]
T5 = ["encoder.block.23.layer.0.SelfAttention.q", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
      "encoder.block.5.layer.1.DenseReluDense.wi_0", "encoder.block.5.layer.1.DenseReluDense.wo", "shared"]
TRANSFORMER = ["transformer_blocks.18.attn.to_out.0", "transformer_blocks.0.attn.add_k_proj",
               "transformer_blocks.0.attn.to_add_out", "transformer_blocks.0.ff_context.net.0.proj",
               "transformer_blocks.0.norm1_context.linear", "single_transformer_blocks.37.proj_mlp",
               "single_transformer_blocks.37.proj_out", "single_transformer_blocks.0.norm.linear", "x_embedder",
               "time_text_embed.timestep_embedder.linear_1", "context_embedder", "norm_out.linear", "pos_embed.proj",
               "transformer_blocks.3.attn2.to_q"]
ORIGINAL = ["double_blocks.18.img_attn.qkv", "double_blocks.0.txt_attn.proj", "double_blocks.0.img_mlp.2",
            "double_blocks.0.img_mod.lin", "single_blocks.37.linear1", "single_blocks.0.modulation.lin",
            "time_in.in_layer", "vector_in.out_layer", "guidance_in.in_layer", "final_layer.adaLN_modulation.1",
            "joint_blocks.23.context_block.attn.qkv", "joint_blocks.0.x_block.mlp.fc1",
            "joint_blocks.0.x_block.adaLN_modulation.1", "blocks.39.self_attn.o", "blocks.0.cross_attn.k_img",
            "blocks.0.ffn.2", "time_embedding.0", "text_embedding.2"]


@pytest.mark.parametrize(("component", "paths"), [
    ("unet", blocks()), ("text_encoder", TEXT), ("text_encoder_2", TEXT), ("text_encoder_3", T5),
    ("transformer", TRANSFORMER), ("diffusion_model", ORIGINAL)])
def test_every_known_module_comes_back_from_its_stem(component: str, paths: list[str]) -> None:
    for path in paths:
        module = f"{component}.{path}"
        for several in (True, False):
            assert module_of(stem_of(module, several)) == module
        assert unflatten(flatten(path)) == path


@pytest.mark.parametrize(("stem", "module"), [
    (f"lora_unet_{flatten(p)}", f"transformer.{p}") for p in TRANSFORMER] + [
    ("lora_te_text_model_encoder_layers_0_mlp_fc1", "text_encoder.text_model.encoder.layers.0.mlp.fc1"),
    ("lora_te1_encoder_layers_0_mlp_fc1", "text_encoder.text_model.encoder.layers.0.mlp.fc1"),
    ("lycoris_transformer_blocks_0_attn_to_q", "transformer_blocks.0.attn.to_q"),
    ("lora_unet_blocks_0_attn1_to_q", "transformer.blocks.0.attn1.to_q"),
])
def test_the_first_word_tells_the_network(stem: str, module: str) -> None:
    assert module_of(stem) == module


@pytest.mark.parametrize(("original", "diffusers"), [
    ("input_blocks.0.0", "conv_in"), ("input_blocks.1.1.proj_in", "down_blocks.0.attentions.0.proj_in"),
    ("input_blocks.2.0.in_layers.2", "down_blocks.0.resnets.1.conv1"),
    ("input_blocks.3.0.op", "down_blocks.0.downsamplers.0.conv"),
    ("input_blocks.4.0.skip_connection", "down_blocks.1.resnets.0.conv_shortcut"),
    ("input_blocks.8.1.transformer_blocks.9.attn2.to_out.0",
     "down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_out.0"),
    ("middle_block.0.emb_layers.1", "mid_block.resnets.0.time_emb_proj"),
    ("middle_block.1.transformer_blocks.0.ff.net.0.proj", "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj"),
    ("middle_block.2.out_layers.3", "mid_block.resnets.1.conv2"),
    ("output_blocks.0.1.proj_out", "up_blocks.0.attentions.0.proj_out"),
    ("output_blocks.2.2.conv", "up_blocks.0.upsamplers.0.conv"),
    ("output_blocks.2.1.conv", "up_blocks.0.upsamplers.0.conv"),
    ("output_blocks.8.0.out_layers.0", "up_blocks.2.resnets.2.norm2"), ("label_emb.0.2", "add_embedding.linear_2"),
    ("time_embed.0", "time_embedding.linear_1"), ("out.2", "conv_out"),
])
def test_original_stable_diffusion_names_become_those_of_diffusers(original: str, diffusers: str) -> None:
    assert module_of(f"lora_unet_{flatten(original)}") == f"unet.{diffusers}"


@pytest.mark.parametrize("stem", [
    "lora_unet_down_blocks_0_mystery_to_q", "lora_unet_", "lora_unet_0", "lora_te_what_is_this", "something_else",
    "lora_unet_input_blocks_3_1_proj_in", "lora_unet_middle_block_1_in_layers_2", "lora_unet_input_blocks_1_7_proj_in",
    "lora_unet_resnets_0_conv1", "lora_unet_down__blocks", "lora_unet_to_q", "lora_unet_down_blocks_٣_conv1",
])
def test_what_cannot_be_told_is_not_guessed(stem: str) -> None:
    assert module_of(stem) is None


def test_long_names_take_no_longer_than_they_are() -> None:
    assert unflatten("norm_out_" * 5000 + "x") is None
    assert unflatten("_".join(["norm_out"] * 5000)) == ".".join(["norm_out"] * 5000)


def test_a_stem_is_its_own_stem_and_unknown_components_get_the_general_prefix() -> None:
    assert stem_of("lora_unet_mystery", False) == "lora_unet_mystery"
    assert stem_of("model.layers.0.q_proj", False) == "lycoris_model_layers_0_q_proj"


def test_kernels_of_flat_convolutions() -> None:
    assert kernel_of("unet.down_blocks.0.resnets.0.conv1", 2880, 768) == (3, 3)
    assert kernel_of("unet.up_blocks.0.upsamplers.0.conv", 2880, None) == (3, 3)
    assert kernel_of("unet.up_blocks.0.resnets.0.conv_shortcut", 640, None) == (1, 1)
    assert kernel_of("unet.down_blocks.0.attentions.0.proj_in", 320, 768) == (1, 1)
    assert kernel_of("unet.down_blocks.0.attentions.0.proj_in", 640, 2048) == ()
    assert kernel_of("unet.down_blocks.0.resnets.0.conv1", 2881, 768) == ()
    assert kernel_of("text_encoder.text_model.conv1", 9, 768) == ()


@pytest.mark.parametrize(("key", "several"), [
    ("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight", False),
    ("unet.mid_block.attentions.0.transformer_blocks.1.attn1.to_q.weight", True),
    ("text_encoder.text_model.encoder.layers.0.mlp.fc1.weight", False), ("text_encoder_2.shared.weight", True),
    ("transformer.transformer_blocks.0.attn.to_q.weight", True), ("diffusion_model.blocks.0.ffn.0.weight", True)])
def test_models_with_several_encoders_are_told_by_their_names(key: str, several: bool) -> None:
    assert has_several_encoders([key]) is several
