from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from tiny_models import tokens

import adaptc
from adaptc.adapter import Adapter
from adaptc.calibration import write_calibration
from adaptc.errors import UsageError
from adaptc.prune.index_map import NAME, read_map
from adaptc.prune.loraprune import Options, open_model, prune
from adaptc.prune.schedule import in_steps
from adaptc.tensorfile import TensorFile

Written = Callable[[str], tuple[Path, Path]]


class Watching:
    """A calibration that writes moments of unit inputs and remembers what it was asked about."""

    def __init__(self) -> None:
        self.widths: list[tuple[int, int]] = []

    def __call__(self, folder: Path, adapter: Adapter | None, out: Path) -> None:
        model, config = open_model(folder), transformers.AutoConfig.from_pretrained(folder)
        self.widths.append((config.num_key_value_heads, config.intermediate_size))
        keys = {p.key for g in model.groups for p in g.weights}
        assert adapter is not None
        for key, delta in adapter.deltas.items():
            model.base.weight(key, delta.shape)
        write_calibration(out, {k: torch.ones(model.shapes[k][1]) for k in keys}, {"tokens": 10})


@pytest.fixture
def options() -> Options:
    return Options(ratio=0.6, criterion="wanda", multiple=1)


def test_every_step_calibrates_a_smaller_model(written: Written, options: Options, tmp_path: Path) -> None:
    base, lora = written("mistral")
    watching = Watching()
    done = in_steps(base, adaptc.load(lora), options, 3, watching, out=tmp_path / "out")
    assert watching.widths[0] == (3, 20)
    assert watching.widths == sorted(watching.widths, reverse=True)
    assert len(set(watching.widths)) == 3
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    once = prune(open_model(base), None, Options(ratio=0.6, criterion="magnitude", multiple=1))
    assert {s.kind: s.units[1] for s in once.shares if s.units[0]} == {
        "heads": config.num_key_value_heads, "ffn": config.intermediate_size}
    assert [s.parameters for s in done.shares] == [s.parameters for s in once.shares]
    assert done.removed("heads", "ffn") == pytest.approx(0.6, abs=0.03)


def test_the_maps_of_all_steps_are_one(written: Written, options: Options, tmp_path: Path) -> None:
    base, lora = written("mistral")
    in_steps(base, adaptc.load(lora), options, 2, Watching(), out=tmp_path / "out")
    cuts, about = read_map(tmp_path / "out" / NAME)
    before, after = TensorFile(base / "model.safetensors"), TensorFile(tmp_path / "out" / "model.safetensors")
    assert about["steps"] == 2
    for key in before:
        assert torch.equal(after[key], cuts[key].slice(before[key]) if key in cuts else before[key])
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        logits = PeftModel.from_pretrained(model, tmp_path / "out" / "adapter")(tokens()).logits
    assert bool(torch.isfinite(logits).all())


def test_one_step_is_no_schedule(written: Written, options: Options, tmp_path: Path) -> None:
    base, lora = written("mistral")
    done = in_steps(base, adaptc.load(lora), options, 1, Watching(), out=tmp_path / "a")
    statistics = tmp_path / "s.safetensors"
    Watching()(base, adaptc.load(lora), statistics)
    from adaptc.calibration import Calibration

    once = prune(open_model(base), adaptc.load(lora), options, Calibration(statistics))
    for key, cut in once.cuts.items():
        for a, b in ((cut.rows, done.cuts[key].rows), (cut.cols, done.cuts[key].cols)):
            assert (a is None and b is None) or torch.equal(a, b)  # type: ignore[arg-type]


def test_masking_takes_no_steps(written: Written) -> None:
    with pytest.raises(UsageError, match="does not go with masking"):
        in_steps(written("mistral")[0], None, Options(ratio=0.3, masked=True), 2, Watching())
