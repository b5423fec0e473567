from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from layouts import PLAIN_KEY, assert_verbatim, close, dense, put, read, t
from torch import Tensor

import adaptc
from adaptc.adapter import Adapter, Origin, Rows, same
from adaptc.delta import Dense, LowRank, NeedsBase
from adaptc.errors import FormatError, LossError, UnsupportedError
from adaptc.formats.sniff import recognise
from adaptc.formats.source import open_source
from adaptc.tensorfile import TensorFile

ATTN = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
TEXT = "text_model.encoder.layers.3.self_attn"
KEY = "lora_adapter_metadata"
DOWN, UP = t(4, 20), t(12, 4)


def generations() -> dict[str, tuple[str, str, str]]:
    """name -> (key of the a factor, key of the b factor, parameter)."""
    return {
        "modern": (f"unet.{ATTN}.to_q.lora_A.weight", f"unet.{ATTN}.to_q.lora_B.weight", f"unet.{ATTN}.to_q"),
        "named": (f"unet.{ATTN}.to_q.lora_A.default_0.weight", f"unet.{ATTN}.to_q.lora_B.default_0.weight",
                  f"unet.{ATTN}.to_q"),
        "lora": (f"unet.{ATTN}.to_out.0.lora.down.weight", f"unet.{ATTN}.to_out.0.lora.up.weight",
                 f"unet.{ATTN}.to_out.0"),
        "processor": (f"unet.{ATTN}.processor.to_out_lora.down.weight", f"unet.{ATTN}.processor.to_out_lora.up.weight",
                      f"unet.{ATTN}.to_out.0"),
        "bare processor": (f"{ATTN}.processor.to_q_lora.down.weight", f"{ATTN}.processor.to_q_lora.up.weight",
                           f"unet.{ATTN}.to_q"),
        "text": (f"text_encoder.{TEXT}.q_proj.lora_linear_layer.down.weight",
                 f"text_encoder.{TEXT}.q_proj.lora_linear_layer.up.weight", f"text_encoder.{TEXT}.q_proj"),
        "text processor": (f"text_encoder.{TEXT}.to_out_lora.down.weight", f"text_encoder.{TEXT}.to_out_lora.up.weight",
                           f"text_encoder.{TEXT}.out_proj"),
        "flattened CLIP": ("text_encoder_2.encoder.layers.3.mlp.fc1.lora_A.weight",
                           "text_encoder_2.encoder.layers.3.mlp.fc1.lora_B.weight",
                           "text_encoder_2.text_model.encoder.layers.3.mlp.fc1"),
        "dotted kohya": ("diffusion_model.blocks.0.self_attn.q.lora_down.weight",
                         "diffusion_model.blocks.0.self_attn.q.lora_up.weight", "diffusion_model.blocks.0.self_attn.q"),
        "bare Flux": ("double_blocks.0.img_attn.qkv.lora_A.weight", "double_blocks.0.img_attn.qkv.lora_B.weight",
                      "diffusion_model.double_blocks.0.img_attn.qkv"),
        "transformer": ("transformer.single_transformer_blocks.0.proj_out.lora_A.weight",
                        "transformer.single_transformer_blocks.0.proj_out.lora_B.weight",
                        "transformer.single_transformer_blocks.0.proj_out"),
    }


@pytest.mark.parametrize("name", list(generations()))
def test_every_generation_is_read_and_written_as_it_came(tmp_path: Path, name: str) -> None:
    down, up, module = generations()[name]
    a = read(tmp_path, {down: DOWN, up: UP})
    assert recognise(open_source(tmp_path / "in.safetensors"))[0].id == "diffusers"
    assert list(a.deltas) == [f"{module}.weight"]
    assert close(dense(a, f"{module}.weight"), UP.double() @ DOWN.double())
    assert_verbatim(tmp_path / "in.safetensors", adaptc.save(a, tmp_path / "out.safetensors"))
    b = adaptc.compress(a, rank=2)
    out = adaptc.save(b, tmp_path / "r2.safetensors")
    held = TensorFile(out)
    assert set(held) == {down, up}
    assert (held[down].shape, held[up].shape) == ((2, 20), (12, 2))
    assert KEY not in held.metadata
    assert same(b, adaptc.load(out))


def test_pickles_are_read_and_written_as_safetensors(tmp_path: Path) -> None:
    down, up, module = generations()["bare processor"]
    torch.save({up: UP, down: DOWN}, tmp_path / "pytorch_lora_weights.bin")
    a = adaptc.load(tmp_path / "pytorch_lora_weights.bin")
    held = TensorFile(adaptc.save(a, tmp_path / "out.safetensors"))
    assert torch.equal(held[down], DOWN)
    assert torch.equal(held[up], UP)
    assert list(a.deltas) == [f"{module}.weight"]


def described(**config: object) -> dict[str, str]:
    return {"format": "pt", KEY: json.dumps({f"unet.{k}": v for k, v in config.items()}, indent=2, sort_keys=True)}


PAIRS = {f"unet.{ATTN}.{m}.lora_{f}.weight": x for m in ("to_q", "to_k") for f, x in (("A", DOWN), ("B", UP))}


@pytest.mark.parametrize(("config", "q", "k"), [
    ({"r": 4, "lora_alpha": 6}, 1.5, 1.5),
    ({"r": 4, "lora_alpha": 6.5, "alpha_pattern": {"attn1.to_q": 3}}, 0.75, 1.625),
    ({"r": 9, "lora_alpha": 2, "rank_pattern": {"to_q": 4, "to_k": 4}}, 0.5, 0.5),
    ({"r": 4, "lora_alpha": 5, "use_rslora": True}, 2.5, 2.5),
])
def test_metadata_tells_the_scale(tmp_path: Path, config: dict[str, object], q: float, k: float) -> None:
    other = {f"text_encoder.{TEXT}.q_proj.lora_A.weight": DOWN, f"text_encoder.{TEXT}.q_proj.lora_B.weight": UP}
    source = put(tmp_path / "in.safetensors", {**PAIRS, **other}, described(**config))
    a = adaptc.load(source)
    scales = {key.split(".")[-2]: d.scale for key, d in a.deltas.items() if isinstance(d, LowRank)}
    assert scales == {"to_q": q, "to_k": k, "q_proj": 1.0}
    assert_verbatim(source, adaptc.save(a, tmp_path / "out.safetensors"))


def test_metadata_says_what_compression_made(tmp_path: Path) -> None:
    source = put(tmp_path / "in.safetensors", PAIRS, described(r=4, lora_alpha=6, target_modules=["to_k", "to_q"]))
    b = adaptc.compress(adaptc.load(source), rank=2)
    out = adaptc.save(b, tmp_path / "out.safetensors")
    config = json.loads(TensorFile(out).metadata[KEY])
    assert (config["unet.r"], config["unet.lora_alpha"], config["unet.target_modules"]) == (2, 2, ["to_k", "to_q"])
    assert same(b, adaptc.load(out))


def test_a_file_of_one_model_has_no_prefixes(tmp_path: Path) -> None:
    tensors = {k.removeprefix("unet."): v for k, v in PAIRS.items()}
    source = put(tmp_path / "in.safetensors", tensors, {KEY: json.dumps({"r": 4, "lora_alpha": 8})})
    a = adaptc.load(source)
    assert {k for k in a.deltas} == {f"unet.{ATTN}.to_q.weight", f"unet.{ATTN}.to_k.weight"}
    assert {d.scale for d in a.deltas.values() if isinstance(d, LowRank)} == {2.0}
    assert_verbatim(source, adaptc.save(a, tmp_path / "out.safetensors"))
    b = adaptc.compress(a, rank=1)
    assert same(b, adaptc.load(adaptc.save(b, tmp_path / "r1.safetensors")))


def test_patterns_fit_a_clip_encoder_with_and_without_its_wrapper(tmp_path: Path) -> None:
    keys = {f"text_encoder.{w}encoder.layers.{i}.mlp.fc1.lora_{f}.weight": x for i, w in enumerate(("text_model.", ""))
            for f, x in (("A", DOWN), ("B", UP))}
    for pattern, scales in (("encoder.layers.0.mlp.fc1", (0.5, 1.0)),
                            ("text_model.encoder.layers.1.mlp.fc1", (1.0, 0.5))):
        config = {"text_encoder.r": 4, "text_encoder.lora_alpha": 4, "text_encoder.alpha_pattern": {pattern: 2}}
        a = read(tmp_path, keys, {KEY: json.dumps(config)})
        assert tuple(d.scale for d in a.deltas.values() if isinstance(d, LowRank)) == scales
    out = adaptc.save(Adapter(a.deltas, {}, Origin("peft")), tmp_path / "out.safetensors", dialect="diffusers")
    config = json.loads(TensorFile(out).metadata[KEY])
    assert config["text_encoder.target_modules"] == ["encoder.layers.0.mlp.fc1", "encoder.layers.1.mlp.fc1"]
    assert same(adaptc.load(out), a)


@pytest.mark.parametrize("alpha", [torch.tensor(2.0), torch.tensor(0.3, dtype=torch.float16), torch.tensor([0.0])])
def test_alpha_tensors_win_and_stay(tmp_path: Path, alpha: Tensor) -> None:
    down, up, module = generations()["dotted kohya"]
    a = read(tmp_path, {down: DOWN, up: UP, f"{module}.alpha": alpha})
    delta = a.deltas[f"{module}.weight"]
    assert isinstance(delta, LowRank)
    assert delta.scale == (float(alpha) / 4 or 1.0)
    assert_verbatim(tmp_path / "in.safetensors", adaptc.save(a, tmp_path / "out.safetensors"))
    b = adaptc.compress(a, rank=2)
    out = adaptc.save(b, tmp_path / "r2.safetensors")
    assert float(TensorFile(out)[f"{module}.alpha"]) in (2.0, 0.0)
    assert same(b, adaptc.load(out))


def test_a_generation_without_a_place_for_scale_gets_it_folded_and_noted(tmp_path: Path) -> None:
    for name in ("lora", "processor", "modern"):
        down, up, module = generations()[name]
        a = read(tmp_path, {down: DOWN, up: UP})
        key = f"{module}.weight"
        delta = a.deltas[key]
        assert isinstance(delta, LowRank)
        b = a.with_deltas({key: LowRank(delta.a, delta.b, None, 0.3, delta.shape)})
        out = adaptc.save(b, tmp_path / f"{name}.safetensors")
        held = TensorFile(out)
        assert torch.equal(held[up], (UP.double() * 0.3).float())
        assert torch.equal(held[down], DOWN)
        back = adaptc.load(out)
        assert close(dense(back, key), dense(b, key), 1e-7)
        assert back.origin.notes == (f"{module}: scale 0.3 was folded into its factors",)


def test_biases_magnitudes_differences_and_norms(tmp_path: Path) -> None:
    wan = "diffusion_model.blocks.0.self_attn.q"
    conv = "unet.down_blocks.0.resnets.0.conv1"
    tensors = {
        **PAIRS, f"unet.{ATTN}.to_q.lora_B.bias": t(12), f"unet.{ATTN}.to_q.lora_magnitude_vector": t(12, seed=1).abs(),
        f"unet.{ATTN}.to_k.dora_scale": t(12, 1, seed=2).abs(),
        f"{conv}.lora_A.weight": t(3, 5, 3, 3), f"{conv}.lora_B.weight": t(5, 3, 1, 1),
        f"{conv}.lora_magnitude_vector.weight": t(1, 5, 1, 1).abs(),
        f"{wan}.lora_down.weight": DOWN, f"{wan}.lora_up.weight": UP, f"{wan}.alpha": torch.tensor(8.0),
        f"{wan}.diff_b": t(12, seed=3), "diffusion_model.blocks.0.norm3.diff": t(12, seed=4),
        "diffusion_model.blocks.0.self_attn.norm_q.weight": t(12, seed=5),
    }
    source = put(tmp_path / "in.safetensors", tensors, described(r=4, lora_alpha=6, rank_pattern={"conv1": 3}))
    a = adaptc.load(source)
    bias = a.deltas[f"unet.{ATTN}.to_q.bias"]
    assert isinstance(bias, Dense)
    assert close(bias.dense(), t(12).double() * 1.5)
    assert close(dense(a, f"{wan}.bias"), t(12, seed=3).double())
    assert close(dense(a, f"{wan}.weight"), UP.double() @ DOWN.double() * 2)
    assert close(dense(a, "diffusion_model.blocks.0.norm3.weight"), t(12, seed=4).double())
    assert list(a.replaced) == ["diffusion_model.blocks.0.self_attn.norm_q.weight"]
    magnitudes = [d for d in a.deltas.values() if isinstance(d, NeedsBase)]
    assert [d.config["axis"] for d in magnitudes] == [0, 0, 0]
    w0 = t(5, 5, 3, 3, seed=7).double()
    v = w0 + dense(a, f"{conv}.weight")
    m = t(1, 5, 1, 1).abs().double().reshape(5, 1, 1, 1)
    want = m / torch.linalg.vector_norm(v, dim=(1, 2, 3), keepdim=True) * v - w0
    assert close(a.deltas[f"{conv}.weight"].resolve(w0).dense(), want)  # type: ignore[union-attr]
    assert_verbatim(source, adaptc.save(a, tmp_path / "out.safetensors"))
    b = adaptc.compress(a, rank=2)  # the pair beside the bias has scale 1 now, so the bias is stored multiplied
    c = adaptc.load(adaptc.save(b, tmp_path / "r2.safetensors"))
    assert list(c.deltas) == list(b.deltas)
    assert all(close(dense(c, k), dense(b, k), 1e-7 if k.endswith("bias") else 0.0) for k in b.deltas)


def foreign(deltas: dict[str, object], **origin: object) -> Adapter:
    return Adapter(dict(sorted(deltas.items())), {}, Origin("peft", **origin))  # type: ignore[arg-type]


def low(m: int = 12, n: int = 20, r: int = 4, s: float = 1.0) -> LowRank:
    return LowRank(t(r, n), t(m, r), None, s, (m, n))


def test_conversions_get_todays_keys_with_metadata(tmp_path: Path) -> None:
    deltas = {PLAIN_KEY: low(s=1.5), PLAIN_KEY.replace("to_q", "to_k"): low(r=2, s=math.pi),
              "text_encoder.text_model.encoder.layers.0.mlp.fc1.weight": low(s=0.25),
              PLAIN_KEY.replace("weight", "bias"): Dense(t(12), 3.0, (12,))}
    a = foreign(deltas, metadata={"ss_note": "x", "sshs_model_hash": "ab"})
    out = adaptc.save(a, tmp_path / "out.safetensors", dialect="diffusers")
    held = TensorFile(out)
    config = json.loads(held.metadata[KEY])
    assert "sshs_model_hash" not in held.metadata
    assert held.metadata["ss_note"] == "x"
    assert config["unet.target_modules"] == [f"{ATTN}.to_k", f"{ATTN}.to_q"]
    assert (config["unet.lora_bias"], config["text_encoder.lora_bias"]) == (True, False)
    assert torch.equal(held[PLAIN_KEY.replace("weight", "lora_B.bias")], t(12) * 2)
    back = adaptc.load(out)
    for key, delta in a.deltas.items():
        assert close(back.deltas[key].dense(), delta.dense())  # type: ignore[union-attr]


@pytest.mark.parametrize(("deltas", "says"), [
    ({"lora_unet_mystery_7.weight": low(), "lora_unet_other_9.weight": low()},
     "2 of 2 parameters have flattened names that cannot be unflattened, first lora_unet_mystery_7.weight"),
    ({"model.layers.0.q_proj.weight": low()}, "1 of 1 parameters name no component"),
    ({"unet:0.weight": low()}, "1 of 1 parameters name no component"),
    ({"unet.a.weight": Dense(t(3, 4), 1.0, (3, 4))}, "unet.a.weight: dense delta has no low-rank factors"),
    ({"unet.a.bias": Dense(t(3), 1.0, (3,))}, "unet.a.bias: a bias change has no pair beside it"),
    ({"unet.a.weight": NeedsBase("oft", {"r": t(4)}, {}, (4, 6))}, "unet.a.weight: oft changes the base weight"),
    ({"unet.a.weight": NeedsBase("dora", {"magnitude": t(20)}, {"axis": 1}, (12, 20), low())}, "DoRA over columns"),
    ({"unet.a.weight": LowRank(t(2, 3, 6), t(2, 5, 3), None, 1.0, (2, 5, 6))}, "a stack of experts is no linear layer"),
])
def test_what_diffusers_cannot_say_is_refused(tmp_path: Path, deltas: dict[str, object], says: str) -> None:
    with pytest.raises(LossError, match=says):
        adaptc.save(foreign(deltas), tmp_path / "out.safetensors", dialect="diffusers")
    more = foreign({**deltas, PLAIN_KEY: low()})
    out = adaptc.save(more, tmp_path / "out.safetensors", dialect="diffusers", allow_loss=True)
    assert list(adaptc.load(out).deltas) == [PLAIN_KEY]


def test_token_rows_and_carried_state_are_refused(tmp_path: Path) -> None:
    a = Adapter({PLAIN_KEY: low()}, {"e.weight": Rows((1,), t(1, 4))}, Origin("peft"), (), {"state": t(1)})
    with pytest.raises(LossError, match=r"1 sets of token rows, first e\.weight; 1 carried tensors, first state"):
        adaptc.save(a, tmp_path / "out.safetensors", dialect="diffusers")


M = f"unet.{ATTN}.to_q"


@pytest.mark.parametrize(("tensors", "error", "says"), [
    ({f"{M}.lora_A.weight": DOWN}, FormatError, "lora_A.weight has no up factor, half an adapter"),
    ({f"{M}.lora.up.weight": UP}, FormatError, "half an adapter"),
    ({f"{M}.lora_A.weight": DOWN, f"{M}.lora_B.weight": t(12, 3)}, FormatError,
     "lora_B.weight has rank 3, lora_A.weight has rank 4"),
    ({f"{M}.lora_A.weight": t(4, 0), f"{M}.lora_B.weight": UP}, FormatError, r"shape \(4, 0\) holds no factor"),
    ({f"{M}.lora_A.weight": DOWN, f"{M}.lora_B.weight": t(12, 4, 2)}, FormatError, "its kernel must be 1"),
    ({f"{M}.lora_A.weight": DOWN, f"{M}.lora.down.weight": DOWN, f"{M}.lora_B.weight": UP}, FormatError,
     "are the same factor"),
    ({f"{M}.lora_A.weight": DOWN, f"{M}.lora_B.weight": UP, f"{M}.alpha": torch.tensor(float("nan"))}, FormatError,
     "alpha is nan"),
    ({f"{M}.lora_A.weight": DOWN, f"{M}.lora_B.weight": UP, f"{M}.lora_magnitude_vector": t(3)}, FormatError,
     "lora_magnitude_vector has 3 entries for 12 outputs"),
    ({f"{M}.lora_A.weight": DOWN, f"{M}.lora_B.weight": UP, f"{M}.lora_B.bias": t(0)}, FormatError, "no difference"),
    ({f"{M}.lora_A.weight": DOWN, f"{M}.lora_B.weight": UP, "unet.x.lora_B.bias": t(3)}, FormatError,
     "unet.x.lora_B.bias has no factors beside it"),
    ({f"{M}.lora_A.weight": DOWN, f"{M}.lora_B.weight": UP, f"{M}.diff": t(12, 20)}, FormatError,
     "a LoRA pair and a full difference"),
    ({f"{M}.lora_A.weight": DOWN, f"{M}.lora_B.weight": UP, "stray.weight": t(3)}, UnsupportedError,
     "under no component"),
    ({f"{M}.lora_A.weight": DOWN, f"{M}.lora_B.weight": UP, "unet.x.hada_w1_a": t(3)}, UnsupportedError,
     "not a known diffusers parameter"),
    ({"double_blocks.0.processor.qkv_lora1.down.weight": DOWN, "double_blocks.0.processor.qkv_lora1.up.weight": UP},
     UnsupportedError, "XLabs"),
])
def test_damage_is_one_clause(tmp_path: Path, tensors: dict[str, Tensor], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says) as caught:
        read(tmp_path, tensors)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "says"), [
    ("{", "is not JSON"), ("[]", "is not a JSON object"), ('{"unet.r": 5, "unet.lora_alpha": 5}', "says rank 5"),
    ('{"unet.r": 4, "unet.lora_alpha": "x"}', f"lora_alpha in {KEY} is 'x'")])
def test_metadata_that_lies_is_refused(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(FormatError, match=says):
        read(tmp_path, PAIRS, {KEY: text})


def test_bare_peft_files_are_not_taken_for_diffusers(tmp_path: Path) -> None:
    for key in ("base_model.model.unet.x.lora_A.weight", "blocks.0.attn.qkv.lora_A.weight", "layers.0.q.lora_A.weight"):
        tensors = {key: DOWN, key.replace("_A", "_B"): UP}
        assert recognise(open_source(put(tmp_path / "x.safetensors", tensors)))[0].id != "diffusers"


@pytest.mark.shared
@pytest.mark.parametrize("name", ["diffusers-sd-pokemon", "diffusers-sd15-catundchat-1"])
def test_real_files(shared: Path, tmp_path: Path, name: str) -> None:
    (file,) = (p for p in (shared / "corpus" / name).iterdir() if p.suffix in (".safetensors", ".bin"))
    tensors = open_source(file).tensors
    a = adaptc.load(file)
    assert len(a.deltas) == 128
    out = adaptc.save(a, tmp_path / "out.safetensors")
    held = TensorFile(out)
    assert set(held) == set(tensors)
    assert all(torch.equal(held[k], tensors[k]) for k in tensors)
    assert file.suffix == ".bin" or out.read_bytes() == file.read_bytes()
    b = adaptc.compress(a, rank=2)
    assert same(b, adaptc.load(adaptc.save(b, tmp_path / "r2.safetensors")))
