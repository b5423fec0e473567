from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from layouts import CONV, CONV_KEY, PLAIN, PLAIN_KEY, assert_verbatim, close, dense, put, read, round_trip, t, under
from torch import Tensor

import adaptc
from adaptc.adapter import Adapter, Origin, same
from adaptc.delta import Dense, LowRank, NeedsBase
from adaptc.errors import FormatError, LossError, UnsupportedError, UsageError
from adaptc.formats.sniff import recognise
from adaptc.formats.source import open_source
from adaptc.measure import relative_error
from adaptc.tensorfile import TensorFile

META = {"ss_network_module": "networks.lora", "ss_network_dim": "4", "ss_network_alpha": "2.0", "ss_v2": "False",
        "ss_network_args": '{"conv_dim": "3", "conv_alpha": "1"}', "ss_sd_model_name": "base.safetensors",
        "sshs_model_hash": "ab", "sshs_legacy_hash": "cd", "note": "kept \u00e9"}


def pair(m: int = 12, n: int = 20, r: int = 4, seed: int = 0, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    return {"lora_down": t(r, n, seed=seed, dtype=dtype), "lora_up": t(m, r, seed=seed + 1, dtype=dtype)}


def convolution(r: int = 3, k: int = 3) -> dict[str, Tensor]:
    return {"lora_down": t(r, 5, k, k), "lora_up": t(8, r, 1, 1)}


def whole() -> dict[str, Tensor]:
    return {**under(PLAIN, **pair(), alpha=torch.tensor(2.0, dtype=torch.float16)),
            **under(CONV, **convolution(), alpha=torch.tensor(1.0)),
            **under("lora_unet_mystery_block_7_to_q", **pair(seed=3)),
            **under("lora_te_text_model_encoder_layers_0_mlp_fc1", **pair(seed=5), alpha=torch.tensor(0)),
            "bundle_emb.token.string_to_param.*": t(2, 6)}


@pytest.mark.parametrize(("alpha", "s"), [
    (None, 1.0), (torch.tensor(0.0), 1.0), (torch.tensor(2.0), 0.5), (torch.tensor(0.3, dtype=torch.float16), None),
    (torch.tensor(-1.5), -0.375), (torch.tensor([6]), 1.5), (torch.tensor(1 / 3, dtype=torch.float64), (1 / 3) / 4)])
def test_scale_is_alpha_over_rank(tmp_path: Path, alpha: Tensor | None, s: float | None) -> None:
    p = pair()
    a = read(tmp_path, under(PLAIN, **p, **({} if alpha is None else {"alpha": alpha})))
    want = float(torch.tensor(0.3, dtype=torch.float16)) / 4 if s is None else s
    delta = a.deltas[PLAIN_KEY]
    assert isinstance(delta, LowRank)
    assert delta.scale == want
    assert close(dense(a, PLAIN_KEY), p["lora_up"].double() @ p["lora_down"].double() * want)
    assert_verbatim(tmp_path / "in.safetensors", adaptc.save(a, tmp_path / "out.safetensors"))


@pytest.mark.parametrize("k", [1, 3])
def test_convolutions_keep_their_kernel(tmp_path: Path, k: int) -> None:
    c = convolution(k=k)
    a = read(tmp_path, under(CONV, **c, alpha=torch.tensor(1.5)))
    want = torch.einsum("or,rikl->oikl", c["lora_up"][..., 0, 0].double(), c["lora_down"].double()) / 2
    assert a.deltas[CONV_KEY].shape == (8, 5, k, k)
    assert close(dense(a, CONV_KEY), want)
    out = adaptc.save(adaptc.compress(a, rank=2), tmp_path / "out.safetensors")
    assert TensorFile(out)[f"{CONV}.lora_down.weight"].shape == (2, 5, k, k)
    assert TensorFile(out)[f"{CONV}.lora_up.weight"].shape == (8, 2, 1, 1)


@pytest.mark.parametrize(("shape", "axis"), [((12, 1), 0), ((1, 20), 1), ((12,), 0)])
def test_dora_scale_tells_rows_from_columns(tmp_path: Path, shape: tuple[int, ...], axis: int) -> None:
    p, m = pair(dtype=torch.float32), t(*shape).abs()
    a = read(tmp_path, under(PLAIN, **p, alpha=torch.tensor(2.0), dora_scale=m))
    delta = a.deltas[PLAIN_KEY]
    assert isinstance(delta, NeedsBase)
    w0 = t(12, 20, seed=9).double()
    v = w0 + p["lora_up"].double() @ p["lora_down"].double() / 2
    norm = v.norm(dim=1 - axis, keepdim=True)
    assert close(delta.resolve(w0).dense(), m.double().reshape(norm.shape) / norm * v - w0)
    assert_verbatim(tmp_path / "in.safetensors", adaptc.save(a, tmp_path / "out.safetensors"))
    b = adaptc.compress(a, rank=2)
    out = adaptc.save(b, tmp_path / "r2.safetensors")
    assert torch.equal(TensorFile(out)[f"{PLAIN}.dora_scale"], m)
    assert same(adaptc.load(out), b)


def test_dora_of_a_convolution(tmp_path: Path) -> None:
    for shape, over in (((8, 1, 1, 1), (1, 2, 3)), ((1, 5, 1, 1), (0, 2, 3))):
        c, m = convolution(), t(*shape).abs()
        a = read(tmp_path, under(CONV, **c, dora_scale=m))
        w0 = t(8, 5, 3, 3, seed=9).double()
        v = w0 + torch.einsum("or,rikl->oikl", c["lora_up"][..., 0, 0].double(), c["lora_down"].double())
        want = m.double() / torch.linalg.vector_norm(v, dim=over, keepdim=True) * v - w0
        assert close(a.deltas[CONV_KEY].resolve(w0).dense(), want)  # type: ignore[union-attr]


def test_an_untouched_file_comes_back_bit_for_bit(tmp_path: Path) -> None:
    source = put(tmp_path / "in.safetensors", whole(), META)
    a = adaptc.load(source)
    assert set(a.deltas) == {PLAIN_KEY, CONV_KEY, "lora_unet_mystery_block_7_to_q.weight",
                             "text_encoder.text_model.encoder.layers.0.mlp.fc1.weight"}
    assert list(a.extra) == ["bundle_emb.token.string_to_param.*"]
    assert a.origin.base_model == "base.safetensors"
    assert "1 flattened module names stay as they are, first lora_unet_mystery_block_7_to_q" in a.origin.notes
    assert_verbatim(source, adaptc.save(a, tmp_path / "out.safetensors"))


def test_compression_brings_the_training_notes_up_to_date(tmp_path: Path) -> None:
    b = adaptc.compress(read(tmp_path, whole(), META), rank=2)
    out = adaptc.save(b, tmp_path / "out.safetensors")
    held = TensorFile(out)
    assert same(adaptc.load(out), b)
    assert [s.spec for s in adaptc.load(out).history] == ["truncate{rank=2}"]
    assert not {"sshs_model_hash", "sshs_legacy_hash"} & set(held.metadata)
    assert (held.metadata["ss_network_dim"], held.metadata["ss_network_alpha"]) == ("2", "2.0")
    assert json.loads(held.metadata["ss_network_args"]) == {"conv_dim": "2", "conv_alpha": "2.0"}
    assert held.metadata["note"] == META["note"]
    assert held["lora_unet_mystery_block_7_to_q.lora_down.weight"].shape == (2, 20)
    assert "lora_unet_mystery_block_7_to_q.alpha" not in held  # none before, none needed
    assert float(held[f"{PLAIN}.alpha"]) == 2.0
    assert held[f"{PLAIN}.alpha"].dtype == torch.float16


def test_ranks_that_differ_are_called_dynamic(tmp_path: Path) -> None:
    tensors = {**under(PLAIN, **pair(r=4)), **under(PLAIN.replace("to_q", "to_k"), **pair(r=2))}
    b = adaptc.compress(read(tmp_path, tensors, META), dtype="fp32")
    metadata = TensorFile(adaptc.save(b, tmp_path / "out.safetensors")).metadata
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("Dynamic", "Dynamic")


def test_a_budget_counts_every_byte(tmp_path: Path) -> None:
    a = read(tmp_path, whole(), META)
    b = adaptc.compress(a, size=3200)
    out = adaptc.save(b, tmp_path / "out.safetensors")
    assert 2400 < out.stat().st_size <= 3200
    assert same(adaptc.load(out), b)


def foreign(deltas: dict[str, object], **origin: object) -> Adapter:
    return Adapter(deltas, {}, Origin("peft", **origin))  # type: ignore[arg-type]


def test_names_that_flattening_loses_are_kept_in_the_metadata(tmp_path: Path) -> None:
    keys = sorted(["unet.custom_block.0.to_q.weight", "unet.custom.block_0.to_k.weight", "model.layers.0.q_proj.weight",
                   PLAIN_KEY])
    a = foreign({k: LowRank(t(2, 6, seed=i), t(5, 2, seed=i), None, 0.1 * i, (5, 6)) for i, k in enumerate(keys, 1)})
    out = adaptc.save(a, tmp_path / "out.safetensors", dialect="kohya")
    names = json.loads(TensorFile(out).metadata["adaptc.names"])
    assert names["lora_unet_custom_block_0_to_q"] == "unet.custom_block.0.to_q"
    assert PLAIN not in names
    back = adaptc.load(out)
    assert same(back, a)
    assert_verbatim(out, adaptc.save(back, tmp_path / "again.safetensors"))


def test_a_scale_of_zero_is_not_mistaken_for_one(tmp_path: Path) -> None:
    a = foreign({PLAIN_KEY: LowRank(t(2, 6), t(5, 2), None, 0.0, (5, 6))})
    assert float(dense(round_trip(a, tmp_path, "kohya"), PLAIN_KEY).norm()) == 0.0


def test_scales_of_rslora_come_back_to_the_last_bit_or_next_to_it(tmp_path: Path) -> None:
    for r in (1, 2, 3, 5, 7, 8, 48):
        s = 16 / math.sqrt(r)
        a = foreign({PLAIN_KEY: LowRank(t(r, 60), t(50, r), None, s, (50, 60))})
        folder = tmp_path / str(r)
        delta = round_trip(a, folder, "kohya").deltas[PLAIN_KEY]
        assert isinstance(delta, LowRank)
        assert abs(delta.scale - s) <= math.ulp(s)


def test_a_core_is_multiplied_into_up(tmp_path: Path) -> None:
    delta = LowRank(t(3, 6), t(5, 2), t(2, 3), 0.5, (5, 6))
    back = round_trip(foreign({PLAIN_KEY: delta}), tmp_path, "kohya")
    assert relative_error(delta, back.deltas[PLAIN_KEY]) < 1e-7


@pytest.mark.parametrize(("key", "delta", "layout", "says"), [
    ("unet.conv_in.weight", Dense(t(4, 6), 1.0, (4, 6)), "", "dense delta has no low-rank factors"),
    ("unet.conv_in.bias", Dense(t(4), 1.0, (4,)), "", "a change of a bias has no key"),
    ("unet.x.weight", LowRank(t(2, 3, 6), t(2, 5, 3), None, 1.0, (2, 5, 6)), "", "experts is no linear layer"),
    ("emb.weight", LowRank(t(2, 6), t(5, 2), None, 1.0, (5, 6)), "embedding", "embedding is no linear layer"),
    ("a.in_proj_weight", LowRank(t(2, 6), t(5, 2), None, 1.0, (5, 6)), "", "is not the weight or bias of a module"),
    ("unet:3.weight", LowRank(t(2, 6), t(5, 2), None, 1.0, (5, 6)), "", "its module name needs the base"),
    ("x.weight", NeedsBase("ia3", {"l": t(4)}, {}, (4, 6)), "", "ia3 changes the base weight"),
])
def test_what_kohya_cannot_say_is_refused(tmp_path: Path, key: str, delta: object, layout: str, says: str) -> None:
    good = LowRank(t(2, 6), t(5, 2), None, 1.0, (5, 6))
    a = foreign({key: delta, PLAIN_KEY: good}, layout={key: layout} if layout else {})
    with pytest.raises(LossError, match=f"{key}: .*{says}"):
        adaptc.save(a, tmp_path / "out.safetensors", dialect="kohya")
    out = adaptc.save(a, tmp_path / "out.safetensors", dialect="kohya", allow_loss=True)
    assert list(adaptc.load(out).deltas) == [PLAIN_KEY]


def test_names_that_fall_together_replacements_and_pickles_are_refused(tmp_path: Path) -> None:
    one = LowRank(t(2, 6), t(5, 2), None, 1.0, (5, 6))
    with pytest.raises(LossError, match=r"unet\.a_b\.weight: flattens to lora_unet_a_b, as unet\.a\.b does"):
        adaptc.save(foreign({"unet.a.b.weight": one, "unet.a_b.weight": one}), tmp_path / "x.safetensors",
                    dialect="kohya")
    replaced = Adapter({PLAIN_KEY: one}, {"head.weight": t(2, 2)}, Origin("peft"), (), {"state": t(1)})
    with pytest.raises(LossError, match=r"1 replaced tensors, first head.weight; 1 carried tensors, first state"):
        adaptc.save(replaced, tmp_path / "x.safetensors", dialect="kohya")
    with pytest.raises(UsageError, match=r"x\.pt: kohya files are written as safetensors, not \.pt"):
        adaptc.save(foreign({PLAIN_KEY: one}), tmp_path / "x.pt", dialect="kohya")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("tensors", "error", "says"), [
    (under(PLAIN, lora_down=t(4, 20)), FormatError, "lora_down.weight has no lora_up.weight, half an adapter"),
    (under(PLAIN, lora_up=t(12, 4), lora_down=t(0, 20)), FormatError,
     r"lora_down.weight: shape \(0, 20\) holds no factor"),
    (under(PLAIN, lora_up=t(12, 3), lora_down=t(4, 20)), FormatError, "lora_up has rank 3, lora_down has rank 4"),
    (under(PLAIN, lora_up=t(12, 4, 3, 3), lora_down=t(4, 5, 1, 1)), FormatError, "its kernel must be 1"),
    (under(PLAIN, **pair(), alpha=torch.tensor(float("nan"))), FormatError, "alpha is nan"),
    (under(PLAIN, **pair(), dora_scale=t(7, 1)), FormatError, r"dora_scale has shape \(7, 1\)"),
    (under(PLAIN, **pair(), dora_scale=torch.zeros(0)), FormatError, r"dora_scale has shape \(0,\)"),
    (under(PLAIN, **pair(), scalar=t(1)), UnsupportedError, "scalar: not a known kohya parameter"),
    ({**under(PLAIN, **pair()), f"{CONV}.alpha": torch.tensor(1.0)}, FormatError, "lora_down.weight is missing"),
    ({**under(PLAIN, **pair()), "loose": t(2)}, FormatError, "loose: is no parameter of a module"),
    ({**under("lora_te_text_model_encoder_layers_0_mlp_fc1", **pair()),
      **under("lora_te1_text_model_encoder_layers_0_mlp_fc1", **pair())}, FormatError, "both name text_encoder"),
    (under(PLAIN, lora_up=t(12, 4).to(torch.int8), lora_down=t(4, 20)), FormatError, "dtype int8 holds codes"),
])
def test_damage_is_one_clause(tmp_path: Path, tensors: dict[str, Tensor], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says) as caught:
        read(tmp_path, tensors)
    assert "\n" not in str(caught.value)


def test_a_map_of_names_that_is_none_is_refused(tmp_path: Path) -> None:
    for text in ("[]", "{", '{"a": 1}'):
        with pytest.raises(FormatError, match=r"metadata adaptc\.names is not a map of names"):
            read(tmp_path, under(PLAIN, **pair()), {"adaptc.names": text})


def test_recognition_says_why(tmp_path: Path) -> None:
    for metadata, strength in (({}, 2), (META, 3)):
        fmt, evidence = recognise(open_source(put(tmp_path / "x.safetensors", under(PLAIN, **pair()), metadata)))
        assert (fmt.id, evidence.strength) == ("kohya", strength)
