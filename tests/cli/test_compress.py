"""adaptc compress: goals, outputs, refusals, and the report against the files on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import adaptc as library
from adaptc.adapter import same


def dense(path) -> dict[str, torch.Tensor]:
    return {k: d.dense() for k, d in library.load(path).deltas.items()}


def disk(path: Path) -> int:
    return sum(p.stat().st_size for p in path.rglob("*")) if path.is_dir() else path.stat().st_size


def test_rank_is_the_best_one_and_the_report_says_so(adaptc, adapter):
    said = adaptc("compress", adapter, "--rank", 3, "--json")
    assert said.code == 0
    before, after = dense(adapter), dense("adapter-r3")
    for module in said.data["modules"]:
        w, k = before[module["name"]], after[module["name"]]
        s = torch.linalg.svdvals(w)
        best = float(s[3:].norm() / s.norm())
        assert float((w - k).norm() / w.norm()) == pytest.approx(best, rel=1e-5)
        assert module["error"] == pytest.approx(best, rel=1e-5)
        assert module["rank"] == {"before": 8, "after": 3}
    assert said.data["bytes"] == {"before": disk(adapter), "after": disk(Path("adapter-r3"))}
    lost = sum(float((before[k] - after[k]).square().sum()) for k in before)
    assert said.data["error"] == pytest.approx((lost / sum(float(w.square().sum()) for w in before.values())) ** 0.5)
    assert said.data["spec"] == "truncate{rank=3}" == library.load("adapter-r3").history[-1].spec
    assert said.data["carried"] == ["score.weight"]


@pytest.mark.parametrize(("goal", "name"), [
    (("--energy", "0.99"), "adapter-e0.99"), (("--max-error", "0.05"), "adapter-err0.05"),
    (("--size", "9KB"), "adapter-9KB"), (("--dtype", "fp16"), "adapter-fp16"),
    (("--rank", "2", "--method", "rsvd", "--seed", "3"), "adapter-r2"),
    (("--rank", "5", "--fit", "vllm"), "adapter-r5"),
])
def test_default_output_is_named_after_the_goal(goal, name, adaptc, adapter):
    said = adaptc("compress", adapter, *goal)
    assert (said.code, said.err) == (0, "")
    assert said.out.rstrip().splitlines()[-1].startswith(f"wrote {name}/: ")
    assert Path(name, "adapter_model.safetensors").is_file()


def test_size_is_kept_over_all_files(adaptc, adapter):
    assert adaptc("compress", adapter, "--size", "9000").code == 0
    assert 0.9 * 9000 < disk(Path("adapter-9KB")) <= 9000


def test_size_below_the_smallest_file_is_refused(adaptc, adapter):
    said = adaptc("compress", adapter, "--size", "500B")
    assert said.code == 2
    assert "size 500 bytes is below the smallest possible file" in said.err
    assert not list(Path().glob("adapter-*"))


def test_bare_file_in_bare_file_out(adaptc, adapter):
    assert adaptc("convert", adapter, "bare.safetensors", "--to", "peft").code == 0
    said = adaptc("compress", "bare.safetensors", "--rank", 2)
    assert said.code == 0
    assert "wrote bare.r2.safetensors: " in said.out
    assert all(torch.linalg.matrix_rank(w) == 2 for w in dense("bare.r2.safetensors").values())
    assert adaptc("compress", adapter, "--rank", 2, "--dtype", "fp32").code == 0
    assert same(library.load("bare.r2.safetensors"), library.load("adapter-r2"))


def test_bare_file_without_scale_asks_for_alpha(adaptc, adapter):
    bare = Path("bare.safetensors")
    bare.write_bytes((adapter / "adapter_model.safetensors").read_bytes())
    said = adaptc("compress", bare, "--rank", 2)
    assert said.code == 1
    assert "cannot tell its scale" in said.err
    assert "--alpha" in said.err
    assert adaptc("compress", bare, "--rank", 8, "--alpha", 16).code == 0
    for key, w in dense("bare.r8.safetensors").items():
        assert torch.equal(w, dense(adapter)[key])


@pytest.mark.parametrize("out", ["adapter", "adapter/adapter_model.safetensors", "."])
def test_input_is_never_overwritten(out, adaptc, adapter):
    before = {p.name: p.read_bytes() for p in adapter.iterdir()}
    said = adaptc("compress", adapter, "--rank", 2, "-o", out, "--force")
    assert said.code == 2
    assert "is the input and is never overwritten" in said.err
    assert {p.name: p.read_bytes() for p in adapter.iterdir()} == before


def test_one_file_wants_a_suffix(adaptc, adapter):
    said = adaptc("convert", adapter, "out", "--to", "kohya")
    assert said.code == 2
    assert "out has no suffix" in said.err
    assert "such as out.safetensors" in said.err


def test_output_needs_force_and_never_deletes_other_files(adaptc, adapter):
    assert adaptc("compress", adapter, "--rank", 2, "-o", "out").code == 0
    said = adaptc("compress", adapter, "--rank", 3, "-o", "out")
    assert said.code == 2
    assert said.err == "adaptc: out exists\n  hint: --force overwrites it, or give another output with -o\n"
    assert adaptc("compress", adapter, "--rank", 3, "-o", "out", "--force").code == 0
    Path("out/notes.txt").write_text("mine")
    said = adaptc("compress", adapter, "--rank", 4, "-o", "out", "--force")
    assert said.code == 2
    assert "out holds notes.txt" in said.err
    assert Path("out/notes.txt").read_text() == "mine"
    assert all(d.rank == 3 for d in library.load("out").deltas.values())


def test_include_and_exclude(adaptc, adapter):
    said = adaptc("compress", adapter, "--rank", 2, "--include", "layers.0", "--exclude", "v_proj", "--json")
    ranks = {m["name"]: m["rank"]["after"] for m in said.data["modules"]}
    assert ranks == {"model.layers.0.self_attn.q_proj.weight": 2, "model.layers.0.self_attn.v_proj.weight": 8,
                     "model.layers.1.self_attn.q_proj.weight": 8, "model.layers.1.self_attn.v_proj.weight": 8}
    assert any("excluded" in n for n in said.data["notes"])
    assert any("not included" in n for n in said.data["notes"])
    assert "include pattern 'k_proj' fits none" in adaptc("compress", adapter, "--rank", 2, "--include", "k_proj",
                                                          "-o", "o").err


def test_dry_run_writes_nothing_and_knows_the_size(adaptc, adapter):
    dry = adaptc("compress", adapter, "--energy", 0.9, "--dry-run", "--json")
    assert dry.code == 0
    assert dry.data["written"] is False
    assert [p.name for p in Path().iterdir()] == ["adapter"]
    wet = adaptc("compress", adapter, "--energy", 0.9, "--json")
    assert wet.data["bytes"]["after"] == dry.data["bytes"]["after"] == disk(Path("adapter-e0.9"))


def test_quiet_says_nothing_and_verbose_names_every_module(adaptc, adapter):
    assert adaptc("compress", adapter, "--rank", 2, "-q", "-o", "a").out == ""
    assert "model.layers.1.self_attn.v_proj" in adaptc("compress", adapter, "--rank", 2, "-v", "-o", "b").out
    assert "layers" not in adaptc("compress", adapter, "--rank", 2, "-o", "c").out


@pytest.mark.parametrize(("args", "code", "said"), [
    ((), 2, "nothing to do"), (("--rank", "2", "--energy", "0.9"), 2, "exclude each other"),
    (("--energy", "2"), 2, "energy is 2.0"), (("--max-error", "-1"), 2, "max_error is -1.0"),
    (("--size", "2M"), 2, "could mean 2MB or 2MiB"), (("--rank", "2", "--device", "tape"), 2, "device tape is not"),
    (("--rank", "2", "--to", "pfft"), 2, "dialect pfft is not known"), (("--rank", "0"), 2, "'--rank'"),
    (("--rank", "2", "--base", "nowhere"), 1, "nowhere does not exist"),
])
def test_refusals(args, code, said, adaptc, adapter):
    result = adaptc("compress", adapter, *args)
    assert result.code == code
    assert said in result.err
    assert result.out == ""
    assert [p.name for p in Path().iterdir()] == ["adapter"]


def test_values_that_are_not_finite_stop_the_work(adaptc, make):
    def spoil(tensors, config):
        tensors["base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"][3, 1] = float("nan")

    make("bad", edit=spoil)
    for goal in (("--rank", 2), ("--energy", 0.9), ("--size", "9KB"), ("--rank", 99)):
        said = adaptc("compress", "bad", *goal, "-o", "out")
        assert said.code == 1, said
        assert "layers.1.self_attn.v_proj" in said.err
        assert "finite" in said.err
        assert not Path("out").exists()
