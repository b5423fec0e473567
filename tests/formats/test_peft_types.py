"""Every PEFT type and option adaptc accepts, made here by PEFT on a toy network and compared with PEFT's own merge."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import toy
from peft_oracle import Held, distance, merged

import adaptc
from adaptc.adapter import Rows
from adaptc.delta import LowRank, NeedsBase, Sparse
from adaptc.errors import FormatError, NeedsError, UnsupportedError
from adaptc.formats.peft_types import REFUSED, TYPES
from adaptc.resolve import RESOLVERS, resolved
from adaptc.tensorfile import TensorFile, write_tensors

LIN: dict[str, Any] = {"target_modules": ["lin", "lin2"]}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "adalora": ("AdaLora", {"init_r": 4, "target_r": 2, "total_step": 100, "lora_alpha": 0}),
    "bdlora on inputs": ("Lora", {"r": 4, "use_bdlora": {"nblocks": 2, "target_modules_bd_a": ["lin2"],
                                                         "target_modules_bd_b": [], "match_strict": False}}),
    "bdlora on outputs": ("Lora", {"r": 4, "use_bdlora": {"nblocks": 2, "target_modules_bd_a": [],
                                                          "target_modules_bd_b": ["lin2"], "match_strict": False}}),
    "boft": ("BOFT", {"boft_block_size": 2}),
    "c3a": ("C3A", {"block_size": 2}),
    "deft qr": ("Deft", {"r": 3, "decomposition_method": "qr", "alpha": 5}),
    "deft qr para": ("Deft", {"r": 3, "decomposition_method": "qr", "para": True}),
    "deft relu": ("Deft", {"r": 3, "decomposition_method": "relu", "alpha": 5}),
    "delora": ("Delora", {"r": 3}),
    "fourierft pattern": ("FourierFT", {"n_frequency": 20, "n_frequency_pattern": {"lin2": 9}}),
    "frod": ("Frod", {"progressbar": False}),
    "glora vectors": ("Glora", {"r": 3, "config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"}),
    "glora constants": ("Glora", {"r": 3, "config_A_B": "constant", "config_C": "none", "config_D_E": "none"}),
    "glora biases": ("Glora", {"r": 3, "config_A_B": "none", "config_C": "lora", "config_D_E": "constant"}),
    "gralora": ("Gralora", {"r": 4, "alpha": 3, "gralora_k": 2, "hybrid_r": 0}),
    "hira": ("Hira", {"r": 3, "target_modules": ["lin", "lin2", "c1d", "emb"], "rank_pattern": {"lin2": 2}}),
    "hra conv": ("HRA", {"r": 3, "target_modules": ["conv", "lin"]}),
    "ia3 regex": ("IA3", {"target_modules": ["lin", "lin2", "c1d", "conv"], "feedforward_modules": ".*lin2|conv"}),
    "kasa": ("Lora", {"r": 3, "kasa_config": {}}),
    "loha patterns": ("LoHa", {"r": 2, "alpha": 5, "target_modules": ["lin", "lin2", "conv1"],
                               "rank_pattern": {"lin2": 3}, "alpha_pattern": {"^lin": 9}}),
    "lokr both sides": ("LoKr", {"r": 2, "alpha": 5, "target_modules": ["lin", "lin2", "conv"],
                                 "decompose_both": True}),
    "lokr patterns": ("LoKr", {"r": 2, "alpha": 5, "rank_pattern": {"lin2": 3}, "alpha_pattern": {"^lin": 9},
                               "decompose_factor": 2}),
    "lokr conv1d": ("LoKr", {"r": 2, "alpha": 5, "target_modules": ["conv1"]}),
    "mica": ("Lora", {"r": 3, "init_lora_weights": "mica"}),
    "miss mini": ("Miss", {"r": 2, "mini_r": 2, "init_weights": "mini"}),
    "oft 1 term": ("OFT", {"oft_block_size": 2, "use_cayley_neumann": True, "num_cayley_neumann_terms": 1}),
    "oft 2 terms": ("OFT", {"oft_block_size": 2, "use_cayley_neumann": True, "num_cayley_neumann_terms": 2}),
    "oft 3 terms": ("OFT", {"oft_block_size": 2, "use_cayley_neumann": True, "num_cayley_neumann_terms": 3}),
    "oft 6 terms": ("OFT", {"oft_block_size": 2, "use_cayley_neumann": True, "num_cayley_neumann_terms": 6}),
    "olora": ("Lora", {"r": 3, "init_lora_weights": "olora", "lora_alpha": 5}),
    "osf": ("OSF", {"effective_rank": 3}),
    "peanut": ("Peanut", {"r": 3, "depth": 2, "scaling": 0.5}),
    "pissa": ("Lora", {"r": 3, "init_lora_weights": "pissa", "lora_alpha": 5, "target_modules": ["lin", "c1d"]}),
    "psoft series": ("Psoft", {"r": 3, "use_cayley_neumann": True, "psoft_alpha": 5}),
    "psoft bounded": ("Psoft", {"r": 3, "use_cayley_neumann": True, "cayley_neumann_eps": 0.3,
                                "num_cayley_neumann_terms": 4}),
    "psoft free": ("Psoft", {"r": 3, "psoft_orth": False, "psoft_mag_a": False}),
    "psoft pissa": ("Psoft", {"r": 3, "ab_svd_init": "pissa_init"}),
    "pvera": ("Pvera", {"r": 3}),
    "randlora": ("RandLora", {"r": 3}),
    "road": ("Road", {"variant": "road_4", "group_size": 2}),
    "shira": ("Shira", {"r": 1}),
    "supertuning": ("Supertuning", {"save_precomputed_indices": True}),
    "tinylora tied": ("TinyLora", {"r": 2, "u": 3, "target_modules": ".*lin2?", "weight_tying": 0.5}),
    "tinylora one": ("TinyLora", {"r": 2, "u": 3, "weight_tying": 1.0}),
    "unilora": ("UniLora", {"r": 2, "theta_d_length": 32, "save_indices": True}),
    "vblora": ("VBLoRA", {"r": 2, "num_vectors": 10, "vector_length": 2, "topk": 3}),
    "vera": ("Vera", {"r": 3}),
    "waveft plain": ("WaveFT", {"n_frequency": 20, "use_idwt": False}),
    "waveft proportional": ("WaveFT", {"n_frequency": 20, "proportional_parameters": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_reads_what_peft_merges(case: str, tmp_path: Path) -> None:
    kind, config = CASES[case]
    if not hasattr(toy.peft, f"{kind}Config"):
        pytest.skip(f"this PEFT has no {kind}")
    folder = toy.trained(tmp_path / "adapter", kind, **{**LIN, **config})
    adapter = adaptc.load(folder)
    made = merged(adapter, toy.weights(toy.base()), toy.CONV1D)
    assert distance(made, toy.reloaded(folder)) <= 1e-6


def test_types_that_need_only_shapes_say_so_and_count_shared_tensors_once(tmp_path: Path) -> None:
    adapter = adaptc.load(toy.trained(tmp_path / "vera", "Vera", r=3, **LIN))
    assert {d.kind for d in adapter.deltas.values() if isinstance(d, NeedsBase)} == {"vera"}
    assert adapter.nbytes == sum(t.nbytes for t in TensorFile(tmp_path / "vera/adapter_model.safetensors").values())
    with pytest.raises(NeedsError):
        adapter.deltas["lin.weight"].dense()
    free = resolved(adapter, Held(toy.weights(toy.base())))
    assert all(isinstance(d, LowRank) for d in free.deltas.values())
    assert not free.extra


def test_resolving_can_leave_kinds_alone(tmp_path: Path) -> None:
    adapter = adaptc.load(toy.trained(tmp_path / "dora", r=3, use_dora=True, **LIN))
    kept = resolved(adapter, Held({}), keep=("dora",))
    assert dict(kept.deltas) == dict(adapter.deltas)
    with pytest.raises(NeedsError, match="no parameter"):
        resolved(adapter, Held({}))


def test_full_rank_types_stay_small_after_resolving(tmp_path: Path) -> None:
    adapter = adaptc.load(toy.trained(tmp_path / "a", "FourierFT", n_frequency=20, **LIN))
    free = resolved(adapter, Held(toy.weights(toy.base())))
    assert all(d.nbytes <= 20 * (8 + 4) for d in free.deltas.values())  # an index and a value each


@pytest.mark.parametrize(("rows", "known"), [([0, 1, 2, 3, 0, 1, 2], True), ([0, 1, 2, 0, 1, 2, 0], False)])
def test_shira_knows_its_shape_when_the_last_row_and_column_are_there(rows: list[int], known: bool, tmp_path: Path
                                                                      ) -> None:
    indices = torch.tensor([rows, [0, 0, 0, 1, 1, 1, 2]], dtype=torch.int32)  # 1 * (4 + 3) entries of a 4 x 3 weight
    tensors = {"base_model.model.x.shira_weight": torch.ones(7), "base_model.model.x.shira_indices": indices}
    adapter = adaptc.load(written(tmp_path / "s", {"peft_type": "SHIRA", "r": 1}, tensors))
    assert isinstance(adapter.deltas["x.weight"], Sparse) == known
    free = resolved(adapter, Held({"x.weight": torch.zeros(4, 3)}))
    assert free.deltas["x.weight"].shape == (4, 3)
    assert int(free.deltas["x.weight"].dense().sum()) == 7


def test_pooled_inputs_of_qalora_are_written_out_as_its_forward_runs_them(tmp_path: Path) -> None:
    from peft.tuners.lora.variants import QALoraLinearVariant

    a, b, g = torch.randn(3, 4), torch.randn(5, 3), 2

    layer = SimpleNamespace(lora_A={"d": SimpleNamespace(weight=a)}, lora_B={"d": SimpleNamespace(weight=b)},
                            lora_dropout={"d": torch.nn.Identity()}, scaling={"d": 4 / 3}, qalora_group_size={"d": g},
                            in_features=8, training=False)
    x = torch.randn(6, 8)
    run = QALoraLinearVariant.forward(layer, "d", x, torch.zeros(6, 5))
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 4, "use_qalora": True, "qalora_group_size": g}
    adapter = adaptc.load(written(tmp_path / "q", config, {
        "base_model.model.x.lora_A.weight": a, "base_model.model.x.lora_B.weight": b}))
    assert torch.allclose(adapter.deltas["x.weight"].apply(x), run, atol=1e-5)
    adaptc.save(adapter, tmp_path / "plain")
    assert "use_qalora" not in json.loads((tmp_path / "plain/adapter_config.json").read_text())


def test_fused_projections_of_the_first_peft_versions_get_zero_rows_between(tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "enable_lora": [True, False, True]}
    a, b = torch.randn(4, 6), torch.randn(10, 2, 1)
    adapter = adaptc.load(written(tmp_path / "m", config, {
        "base_model.model.qkv.lora_A.weight": a, "base_model.model.qkv.lora_B.weight": b}))
    dw = adapter.deltas["qkv.weight"].dense()
    assert dw.shape == (15, 6)
    assert not dw[5:10].any()
    want = 2 * torch.cat([b[:5, :, 0] @ a[:2], b[5:, :, 0] @ a[2:]])
    assert torch.allclose(torch.cat([dw[:5], dw[10:]]), want.double(), atol=1e-6)


def test_token_rows_and_norms_are_written_back_as_they_came(tmp_path: Path) -> None:
    for kind, config in (("TrainableTokens", {"target_modules": ["emb"], "token_indices": [2, 5]}),
                         ("LNTuning", {"target_modules": ["lin"]})):
        folder = toy.trained(tmp_path / kind, kind, **config)
        adapter = adaptc.load(folder)
        assert not adapter.deltas
        assert kind != "TrainableTokens" or isinstance(adapter.replaced["emb.weight"], Rows)
        adaptc.save(adapter, tmp_path / f"{kind}-again")
        again = tmp_path / f"{kind}-again"
        x, y = (TensorFile(f / "adapter_model.safetensors") for f in (folder, again))
        assert x.keys() == y.keys()
        assert all(torch.equal(x[k], y[k]) for k in x)
        assert json.loads((folder / "adapter_config.json").read_text()) == json.loads(
            (again / "adapter_config.json").read_text())


@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_refused_types_name_the_reason(kind: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=f"^{kind} "):
        adaptc.load(written(tmp_path / "x", {"peft_type": kind}, {"base_model.model.x.weight": torch.zeros(2)}))


def test_every_type_of_the_installed_peft_is_read_or_refused_by_name() -> None:
    assert not {t.value for t in toy.peft.PeftType} - set(TYPES) - set(REFUSED)
    assert not set(TYPES) & set(REFUSED)


def test_unknown_types_list_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"peft_type FINEGATES is not known \(known: ADALORA, BEFT"):
        adaptc.load(written(tmp_path / "x", {"peft_type": "FINEGATES"}, {"a": torch.zeros(2)}))


@pytest.mark.parametrize(("kind", "config", "tensors", "message"), [
    ("OFT", {"peft_version": "0.13.2"}, {"oft_r": (2, 4, 4)}, "before PEFT 0.14"),
    ("OFT", {"peft_version": "0.17.0"}, {"oft_R.weight": (2, 6)}, "changed with PEFT 0.18"),
    ("OFT", {"coft": True, "peft_version": "0.21.0"}, {"oft_R.weight": (2, 6)}, "coft"),
    ("BOFT", {}, {"boft_R": (2, 3, 4, 4), "boft_s": (5, 1)}, "2 butterfly factors"),
    ("WAVEFT", {"wavelet_family": "sym2"}, {"waveft_spectrum": (4,)}, "sym2"),
    ("PEANUT", {"act_fn": "gelu"}, {"peanut_A.weight": (2, 3)}, "only relu"),
    ("PSOFT", {"psoft_svd": "lowrank"}, {"psoft_R.weight": (3,)}, "not portable"),
    ("TINYLORA", {}, {"tinylora_A": (2, 3), "tinylora_B": (4, 2)}, "tinylora_v is missing"),
    ("VERA", {}, {"vera_lambda_b": (4,), "vera_lambda_d": (2,)}, "save_projection"),
    ("UNILORA", {}, {}, "UNILORA without stored indices"),
    ("DELORA", {}, {"delora_A": (2, 3)}, "delora_B is missing"),
    ("C3A", {}, {"c3a_kernel": (2, 3)}, r"expected \(\*, \*, \*\)"),
    ("LOKR", {"r": 3}, {"lokr_w1": (2, 2), "lokr_w2_a": (2, 4), "lokr_w2_b": (4, 2)}, "says rank 3"),
    ("LORA", {"init_lora_weights": "loftq"}, {"lora_A.weight": (2, 3)}, "quantization error"),
    ("LORA", {"init_lora_weights": "pissa_niter_4"}, {"lora_A.weight": (2, 3)}, "without a seed"),
    ("LORA", {"r": 2, "kasa_config": {}}, {"lora_A.weight": (2, 3), "lora_B.weight": (4, 2)}, "lora_diag is missing"),
])
def test_what_cannot_be_read_right_is_refused(kind: str, config: dict[str, Any], tensors: dict[str, tuple[int, ...]],
                                              message: str, tmp_path: Path) -> None:
    held = {f"base_model.model.x.{k}": torch.zeros(s) for k, s in tensors.items()}
    held |= {"base_model.unilora_theta_d": torch.zeros(3)} if kind == "UNILORA" else {}
    with pytest.raises((FormatError, UnsupportedError, NeedsError), match=message):
        adaptc.load(written(tmp_path / "x", {"peft_type": kind, **config}, held))


def test_every_kind_that_readers_make_has_a_resolver() -> None:
    made = {CASES[c][0].lower() for c in CASES} & set(RESOLVERS)
    assert {"vera", "boft", "deft", "frod", "hira", "ia3", "osf", "peanut", "psoft", "road"} <= made


def written(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with (folder / "adapter_model.safetensors").open("wb") as f:
        write_tensors(f, tensors, {"format": "pt"})
    return folder
