"""A round trip through any two dialects changes nothing."""

from __future__ import annotations

import itertools
import math
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import assert_verbatim, close, dense, put, read, round_trip, t, under
from torch import Tensor

import adaptc
from adaptc.adapter import Adapter, Origin, same, tensors
from adaptc.delta import Hadamard, Kron, LowRank, NeedsBase
from adaptc.measure import relative_error

DIALECTS = ("kohya", "lycoris", "diffusers", "peft")
ATTN = "unet.mid_block.attentions.0.transformer_blocks.0.attn1"
KEYS = (f"{ATTN}.to_q.weight", f"{ATTN}.to_out.0.weight", "unet.down_blocks.1.resnets.0.conv1.weight",
        "unet.down_blocks.1.resnets.0.conv_shortcut.weight", "unet.odd_name.weight", "transformer.x_embedder.weight",
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.weight",
        "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj.weight",
        "diffusion_model.double_blocks.0.img_attn.qkv.weight")
KERNELS = {KEYS[2]: (3, 3), KEYS[3]: (1, 1)}
# alpha as trainers store it, and multipliers no alpha was rounded for
SCALES = st.one_of(st.tuples(st.floats(2**-6, 512, width=16), st.integers(1, 128)).map(lambda x: x[0] / x[1]),
                   st.just(1.0), st.integers(1, 64).map(lambda r: 16 / math.sqrt(r)))
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


@st.composite
def adapters(draw: st.DrawFn) -> Adapter:
    deltas = {}
    for i, key in enumerate(sorted(draw(st.sets(st.sampled_from(KEYS), min_size=1)))):
        kernel, r, dtype = KERNELS.get(key, ()), draw(st.integers(1, 5)), draw(DTYPES)
        a = t(r, 6 * math.prod(kernel), seed=i, dtype=dtype)
        deltas[key] = LowRank(a, t(7, r, seed=i, dtype=dtype), None, draw(SCALES), (7, 6, *kernel))
    return Adapter(deltas, {}, Origin("peft", {"peft_type": "LORA"}, {"format": "pt"}))


def nearly_same(x: Adapter, y: Adapter) -> bool:
    """Factors bit for bit; scales too, or next to each other where no double divides to the one given."""
    if set(x.deltas) != set(y.deltas):
        return False
    pairs = [(d, y.deltas[k]) for k, d in x.deltas.items()]
    scales = [(d.scale, e.scale) for d, e in pairs if isinstance(d, LowRank) and isinstance(e, LowRank)]
    return len(scales) == len(pairs) and all(abs(s - q) <= 2 * math.ulp(s) for s, q in scales) and all(
        torch.equal(v, tensors(y.deltas[k])[n]) and v.dtype == tensors(y.deltas[k])[n].dtype
        for k, d in x.deltas.items() for n, v in tensors(d).items())


@settings(max_examples=6, deadline=None)
@pytest.mark.parametrize("through", list(itertools.product(DIALECTS, DIALECTS)))
@given(adapter=adapters())
def test_through_any_two_dialects(through: tuple[str, str], adapter: Adapter) -> None:
    with tempfile.TemporaryDirectory() as folder:
        assert nearly_same(adapter, round_trip(adapter, Path(folder), *through, "peft"))


@settings(max_examples=30, deadline=None)
@given(alpha=st.one_of(st.none(), st.floats(-64, 64, width=16)), r=st.integers(1, 9), dtype=DTYPES,
       through=st.lists(st.sampled_from(DIALECTS), min_size=1, max_size=3))
def test_alphas_of_trainers_come_back_exactly(
        alpha: float | None, r: int, dtype: torch.dtype, through: list[str]) -> None:
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    extra = {} if alpha is None else {"alpha": torch.tensor(alpha, dtype=torch.float16)}
    with tempfile.TemporaryDirectory() as folder:
        a = read(Path(folder), under(stem, lora_down=t(r, 6, dtype=dtype), lora_up=t(7, r, dtype=dtype), **extra))
        assert same(a, round_trip(a, Path(folder), *through, "kohya"))


@pytest.mark.parametrize("through", DIALECTS)
@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_dora_through_every_dialect(tmp_path: Path, through: str, kernel: tuple[int, ...]) -> None:
    key = KEYS[2] if kernel else KEYS[0]
    inner = LowRank(t(2, 6 * math.prod(kernel)), t(7, 2), None, 0.5, (7, 6, *kernel))
    for first in DIALECTS:
        dora = NeedsBase("dora", {"magnitude": t(7).abs()}, {"axis": 0}, inner.shape, inner)
        a = Adapter({key: dora}, {}, Origin("peft"))
        b = round_trip(a, tmp_path / first, first, through, first)
        delta = b.deltas[key]
        assert isinstance(delta, NeedsBase)
        assert torch.equal(delta.tensors["magnitude"].flatten(), t(7).abs())
        w0 = t(7, 6, *kernel, seed=5).double()
        assert close(delta.resolve(w0).dense(), a.deltas[key].resolve(w0).dense())  # type: ignore[union-attr]


@pytest.mark.parametrize("through", [d for d in DIALECTS if d != "lycoris"])
def test_products_become_exact_pairs_on_the_way(tmp_path: Path, through: str) -> None:
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_"

    def h(*shape: int, seed: int = 0) -> Tensor:
        return t(*shape, seed=seed, dtype=torch.float16)

    a = read(tmp_path, {
        **under(f"{stem}q", lokr_w1=h(3, 2), lokr_w2_a=h(4, 2), lokr_w2_b=h(2, 5), alpha=torch.tensor(3.0)),
        **under(f"{stem}k", hada_w1_a=h(7, 2), hada_w1_b=h(2, 6), hada_w2_a=h(7, 2, seed=1),
                hada_w2_b=h(2, 6, seed=1))})
    assert {type(d) for d in a.deltas.values()} == {Kron, Hadamard}
    b = round_trip(a, tmp_path, through)
    assert {type(d) for d in b.deltas.values()} == {LowRank}
    for key in a.deltas:
        assert close(dense(b, key), dense(a, key))
    assert same(b, round_trip(b, tmp_path / "more", "lycoris", through))


def test_stability_names_and_several_encoders_agree_with_diffusers(tmp_path: Path) -> None:
    """The same SDXL adapter in kohya's and in diffusers' names has the same parameters and distance zero."""
    down, up = t(4, 20), t(12, 4)
    tail = "transformer_blocks_1_attn2_to_k"
    kohya = read(tmp_path, {
        **under(f"lora_unet_input_blocks_4_1_{tail}", lora_down=down, lora_up=up, alpha=torch.tensor(4.0)),
        **under("lora_te1_text_model_encoder_layers_0_mlp_fc1", lora_down=down, lora_up=up),
        **under("lora_te2_text_model_encoder_layers_0_mlp_fc1", lora_down=down, lora_up=up)})
    place = "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k"
    modules = [f"unet.{place}", "text_encoder.text_model.encoder.layers.0.mlp.fc1",
               "text_encoder_2.text_model.encoder.layers.0.mlp.fc1"]
    pairs = {f"{m}.lora_{f}.weight": x for m in modules for f, x in (("A", down), ("B", up))}
    diffusers = adaptc.load(put(tmp_path / "d.safetensors", pairs))
    assert set(kohya.deltas) == set(diffusers.deltas)
    assert all(relative_error(kohya.deltas[k], diffusers.deltas[k]) < 1e-14 for k in kohya.deltas)
    back = adaptc.save(diffusers, tmp_path / "k.safetensors", dialect="kohya")
    assert same(adaptc.load(back), kohya)


def test_the_container_hands_a_dialect_back_as_it_came(tmp_path: Path) -> None:
    stem = "lora_unet_mid_block_resnets_0_conv1"
    tucker = under(stem, lora_down=t(2, 6, 1, 1), lora_mid=t(2, 2, 3, 3), lora_up=t(7, 2, 1, 1),
                   dora_scale=t(7, 1, 1, 1), alpha=torch.tensor([0.3], dtype=torch.float16))
    norm = under("lora_unet_mid_block_resnets_0_norm1", w_norm=t(6), b_norm=t(6))
    source = put(tmp_path / "in.safetensors", {**tucker, **norm}, {"ss_network_module": "lycoris.kohya", "note": "x"})
    boxed = adaptc.load(adaptc.save(adaptc.load(source), tmp_path / "boxed.adaptc", dialect="adaptc"))
    assert_verbatim(source, adaptc.save(boxed, tmp_path / "out.safetensors", dialect="lycoris"))
