from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from tiny_models import WORDS, tokens
from tokenizers import Tokenizer, models, pre_tokenizers

import adaptc
from adaptc.adapter import same
from adaptc.calibration import write_calibration
from adaptc.cli.main import main
from adaptc.prune.loraprune import open_model

Written = Callable[[str], tuple[Path, Path]]


@dataclass
class Said:
    code: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Said]:
    monkeypatch.delenv("ADAPTC_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)

    def run(*args: object) -> Said:
        capsys.readouterr()
        code = main(["prune", *map(str, args)])
        said = capsys.readouterr()
        return Said(code, said.out, said.err)

    return run


def statistics(base: Path, path: Path, full: bool = False) -> Path:
    model = open_model(base)
    keys = {p.key: model.shapes[p.key][1] for g in model.groups for p in g.weights}
    write_calibration(path, {k: torch.eye(n) if full else torch.ones(n) for k, n in keys.items()}, {"tokens": 99})
    return path


def test_a_smaller_folder_and_its_adapter_load(written: Written, call: Callable[..., Said], tmp_path: Path) -> None:
    base, lora = written("llama")
    said = call("--base", base, "--adapter", lora, "--ratio", "0.4", "--criterion", "magnitude", "--multiple", 1,
                "-o", "small")
    assert said.code == 0, said.err
    assert "removed 39.7% of attention heads and FFN channels" in said.out
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    with torch.no_grad():
        assert bool(torch.isfinite(PeftModel.from_pretrained(model, tmp_path / "small/adapter")(tokens()).logits).all())


def test_the_report_counts_parameters_and_bytes(written: Written, call: Callable[..., Said], tmp_path: Path) -> None:
    base, lora = written("llama")
    known = statistics(base, tmp_path / "s.safetensors", full=True)
    said = call("--base", base, "--adapter", lora, "--ratio", "0.4", "--criterion", "wanda", "--multiple", 1,
                "--calibration", known, "--refit", "-o", "small", "--json")
    assert said.code == 0, said.err
    data = said.data
    sizes = {p: sum(t.numel() for t in transformers.AutoModelForCausalLM.from_pretrained(p).parameters())
             for p in (base, tmp_path / "small")}
    assert data["parameters"] == {"before": sizes[base], "after": sizes[tmp_path / "small"]}
    assert data["removed"]["model"] == pytest.approx(1 - sizes[tmp_path / "small"] / sizes[base])
    heads, ffn, other = data["kinds"]
    assert heads["units"] == {"before": 3, "after": 2}
    assert other["parameters"]["before"] == other["parameters"]["after"]
    assert 0 < ffn["output_error"]["train"] < 1
    assert ffn["output_error"]["held"] is None
    assert data["adapter_bytes"] == adaptc.load(tmp_path / "small/adapter").nbytes
    assert data["bytes"]["before"] == sizes[base] * 4


def test_a_dry_run_writes_nothing(written: Written, call: Callable[..., Said], tmp_path: Path) -> None:
    base, lora = written("llama")
    said = call("--base", base, "--adapter", lora, "--ratio", "0.4", "--criterion", "adapter", "--dry-run")
    assert said.code == 0, said.err
    assert "would write the model" in said.out
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(written: Written, call: Callable[..., Said], tmp_path: Path) -> None:
    base, lora = written("llama")
    given = ("--base", base, "--adapter", lora, "--criterion", "magnitude", "--multiple", 1, "-o", "small", "--ratio")
    assert call(*given, 0.2).code == 0
    said = call(*given, 0.6)
    assert (said.code, "small exists" in said.err) == (2, True)
    assert call(*given, 0.6, "--force").code == 0
    assert transformers.AutoConfig.from_pretrained(tmp_path / "small").num_key_value_heads == 1
    before = {p.name: p.read_bytes() for p in base.iterdir() if p.is_file()}
    said = call("--base", base, "--criterion", "magnitude", "--ratio", 0.2, "-o", base, "--force")
    assert said.code == 2
    assert "is the input and is never overwritten" in said.err
    assert {p.name: p.read_bytes() for p in base.iterdir() if p.is_file()} == before


def test_recovery_puts_an_adapter_back(written: Written, call: Callable[..., Said], tmp_path: Path) -> None:
    base, lora = written("llama")
    assert call("--base", base, "--adapter", lora, "--ratio", 0.4, "--criterion", "magnitude", "-o", "small").code == 0
    said = call("--recover", "small/adapter", "-o", "whole", "--json")
    assert said.code == 0, said.err
    whole, before = adaptc.load(tmp_path / "whole"), adaptc.load(lora)
    assert {k: d.shape for k, d in whole.deltas.items()} == {k: d.shape for k, d in before.deltas.items()}
    assert whole.origin.base_model == before.origin.base_model
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    PeftModel.from_pretrained(model, tmp_path / "whole")
    said = call("--recover", "small/adapter", "--map", "elsewhere.safetensors", "-o", "again")
    assert (said.code, "does not exist" in said.err) == (1, True)


def test_an_adapter_alone_loses_channels(written: Written, call: Callable[..., Said], tmp_path: Path) -> None:
    _, lora = written("llama")
    said = call("--adapter", lora, "--channels", 0.3, "-o", "few.adaptc.safetensors", "--json")
    assert said.code == 0, said.err
    assert 0 < said.data["error"] < 1
    small, whole = adaptc.load(tmp_path / "few.adaptc.safetensors"), adaptc.load(lora)
    assert small.nbytes < whole.nbytes
    assert {k: d.shape for k, d in small.deltas.items()} == {k: d.shape for k, d in whole.deltas.items()}


def test_ratio_zero_is_a_copy(written: Written, call: Callable[..., Said], tmp_path: Path) -> None:
    base, lora = written("llama")
    assert call("--base", base, "--adapter", lora, "--ratio", 0, "-o", "copy").code == 0
    for file in base.iterdir():
        assert (tmp_path / "copy" / file.name).read_bytes() == file.read_bytes()
    assert same(adaptc.load(tmp_path / "copy/adapter"), adaptc.load(lora))


def test_a_schedule_calibrates_between_its_steps(written: Written, call: Callable[..., Said], tmp_path: Path) -> None:
    base, lora = written("llama")
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    own = tmp_path / "base"
    own.mkdir()
    for file in base.iterdir():
        (own / file.name).write_bytes(file.read_bytes())
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0").save_pretrained(own)
    (tmp_path / "text.txt").write_text(" ".join(f"w{(7 * i * i + 3) % WORDS}" for i in range(400)))
    said = call("--base", own, "--adapter", lora, "--ratio", 0.5, "--multiple", 1, "--schedule", 2, "--data",
                "text.txt", "--max-tokens", 200, "--window", 32, "-o", "small", "--json")
    assert said.code == 0, said.err
    assert said.data["removed"]["groups"] == pytest.approx(0.5, abs=0.04)
    assert (tmp_path / "small/tokenizer.json").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "small", "text.txt"]


@pytest.mark.parametrize(("options", "code", "message"), [
    (("--ratio", 1), 2, "ratio is 1, must be 0"),
    (("--ratio", -0.5), 2, "ratio is -0.5"),
    (("--ratio", 0.3), 1, "criterion loraprune needs calibration statistics"),
    (("--ratio", 0.3, "--criterion", "wanda"), 1, "criterion wanda needs calibration statistics"),
    (("--ratio", 0.3, "--criterion", "magnitude", "--refit"), 1, "--refit needs calibration statistics"),
    (("--ratio", 0.3, "--calibration", "none.safetensors"), 1, "none.safetensors does not exist"),
    (("--ratio", 0.3, "--keep-first", 1), 2, "one width for all layers"),
    (("--ratio", 0.3, "--heads-only", "--ffn-only"), 2, "leave nothing to prune"),
    (("--ratio", 0.3, "--schedule", 2), 2, "--schedule and --data go together"),
    (("--ratio", 0.3, "--recover", "x"), 2, "give one of --ratio, --recover, --channels"),
    ((), 2, "give one of --ratio"),
])
def test_requests_that_cannot_be_met(options: tuple[object, ...], code: int, message: str, written: Written,
                                     call: Callable[..., Said], tmp_path: Path) -> None:
    base, lora = written("llama")
    said = call("--base", base, "--adapter", lora, *options, "-o", "small")
    assert (said.code, message in said.err) == (code, True), said.err
    assert said.err.count("\n") <= 2
    assert not (tmp_path / "small").exists()


def test_what_is_wrong_with_a_base_is_told(written: Written, call: Callable[..., Said], tmp_path: Path) -> None:
    base, lora = written("llama")
    other, _ = written("bert")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/config.json").write_text('{"model_type": "mamba"}')
    (tmp_path / "odd/model.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    for where, message in ((tmp_path / "odd", "model_type mamba is not known to pruning (known: "),
                           (other, "base has no parameter"), (lora, "holds no config.json"),
                           (tmp_path / "gone", "is no folder")):
        said = call("--base", where, "--adapter", lora, "--ratio", 0.3, "--criterion", "magnitude", "-o", "small")
        assert (said.code, message in said.err) == (1, True), said.err
    said = call("--base", other, "--criterion", "magnitude", "--ratio", 0.5, "--heads-only", "-o", "small")
    assert "a bert config has no head size of its own: heads cannot be removed" in said.err


def test_help_imports_nothing_heavy() -> None:
    import subprocess
    import sys

    probe = ("import sys\nfrom adaptc.cli.main import main\nmain(['prune', '--help'])\n"
             "print({'torch', 'transformers'} & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("set()\n")
