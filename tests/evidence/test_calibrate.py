"""Calibration: moments against sums taken layer by layer and token by token, two sides, resuming, refusals."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import lora, text, write_model, write_rows, write_tokenizer
from torch import Tensor

from adaptc.adapter import Adapter
from adaptc.calibration import Calibration
from adaptc.cli.main import main
from adaptc.errors import FormatError, NeedsError, UsageError
from adaptc.evidence.calibrate import Report, calibrate
from adaptc.evidence.calibrate_request import Request
from adaptc.evidence.model import load_model
from adaptc.evidence.moments import linear_layers
from adaptc.evidence.passages import Passage, batches, read_passages, split_passages
from adaptc.evidence.rows import Row, read_rows

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for family in ("llama", "gpt2", "bert"):
        write_model(root / family, family)
    (root / "text.txt").write_text(text(300, 1))
    write_rows(root / "rows.tsv", 40)
    return root


def request(folder: Path, family: str, **how: Any) -> Request:
    data = "rows.tsv" if family == "bert" else "text.txt"
    return Request(**{"base": str(folder / family), "data": folder / data, "window": 16, "batch": 3, **how})


def by_hand(base: Path, data: Path, task: Any, window: int, share: float) -> tuple[dict[str, Tensor], ...]:
    """Return E[x x^T] of every linear layer on both sides: one passage at a time, no padding, nothing shared."""
    loaded = load_model(base, task)
    sides = split_passages(read_passages(read_rows(data), loaded.tokenizer, task, window, None), share)
    found: list[dict[str, Tensor]] = []
    for passages in sides:
        seen: dict[str, list[Tensor]] = {n: [] for n in linear_layers(loaded.model)}
        hooks = [m.register_forward_pre_hook(lambda m, a, into=seen[n]: into.append(a[0].flatten(0, -2)))
                 for n, m in linear_layers(loaded.model).items()]
        with torch.no_grad():
            for p in passages:
                loaded.model(input_ids=p.ids[None])
        for hook in hooks:
            hook.remove()
        rows = {n: torch.cat(x).double() for n, x in seen.items()}
        found.append({n: x.T @ x / len(x) for n, x in rows.items()})
    return tuple(found)


@pytest.mark.parametrize(("family", "task", "leaders"), [
    ("llama", "lm", {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}), ("gpt2", "lm", {}),
    ("bert", "embed", {"key": "query", "value": "query"}),
])
def test_moments_are_those_of_every_layer_alone(family: str, task: str, leaders: dict[str, str], folder: Path,
                                                tmp_path: Path) -> None:
    asked = request(folder, family, held_out=0.3)
    report = calibrate(asked, tmp_path / "s.safetensors")
    stats = Calibration(tmp_path / "s.safetensors")
    for side, expected in zip(("train", "held"), by_hand(folder / family, asked.data, task, 16, 0.3), strict=True):
        assert set(expected) == set(stats.parameters)
        for name, moment in expected.items():
            got = stats.gram(name, len(moment), side)  # type: ignore[arg-type]
            assert torch.allclose(got, moment, rtol=2e-5, atol=2e-6 * float(moment.diagonal().max())), (name, side)
    shared = {k.split(".")[-2]: v.split(".")[-2] for k, v in stats.about["shared"].items()}
    assert shared == leaders
    assert report.about["task"] == task
    assert (stats.tokens() or 0) > (stats.tokens("held") or 0) > 0


def test_diagonals_are_those_of_the_moments(folder: Path, tmp_path: Path) -> None:
    for name, how in (("full", {}), ("diagonal", {"diagonal": True})):
        calibrate(request(folder, "llama", **how), tmp_path / name)
    full, diagonal = Calibration(tmp_path / "full"), Calibration(tmp_path / "diagonal")
    for key in full.parameters:
        moment = full.moment(key)
        assert moment is not None
        assert torch.allclose(diagonal.gram(key, len(moment)), moment.diagonal().double(), rtol=1e-6)
    assert (tmp_path / "diagonal").stat().st_size < (tmp_path / "full").stat().st_size / 2


def test_batches_do_not_matter(folder: Path, tmp_path: Path) -> None:
    for batch in (1, 7):
        calibrate(request(folder, "bert", batch=batch), tmp_path / f"{batch}")
    one, seven = Calibration(tmp_path / "1"), Calibration(tmp_path / "7")
    for name in one:
        assert torch.allclose(one[name], seven[name], rtol=1e-4, atol=1e-5 * float(one[name].abs().max()))


def test_layers_that_are_not_wanted_and_a_limit(folder: Path, tmp_path: Path) -> None:
    report = calibrate(request(folder, "llama", include=("self_attn",), exclude=("layers.1", "o_proj"), max_tokens=100),
                       tmp_path / "s")
    assert [s.key.split(".", 3)[3] for s in report.layers] == [f"self_attn.{p}_proj.weight" for p in "qkv"]
    assert report.about["tokens"] + report.about["held_tokens"] == 96  # six whole windows of 16
    assert any("fewer tokens" in n for n in calibrate(request(folder, "llama", max_tokens=32), tmp_path / "t").notes)
    pooled = next(s for s in calibrate(request(folder, "bert"), tmp_path / "p").layers if "pooler" in s.key)
    assert (pooled.tokens, pooled.held_tokens) == (36, 4)  # a row each, not a token each


def test_json_lines_and_text_for_an_encoder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text(5, i)}) + "\n" for i in range(4)))
    (tmp_path / "lines.txt").write_text("".join(text(5, i) + "\n" for i in range(4)))
    for data in ("rows.jsonl", "lines.txt"):
        about = calibrate(request(folder, "bert", data=tmp_path / data, held_out=0.5), tmp_path / f"{data}.stats").about
        assert (about["tokens"], about["held_tokens"], about["passages"], about["held_passages"]) == (10, 10, 2, 2)
    one, other = (Calibration(tmp_path / f"{data}.stats") for data in ("rows.jsonl", "lines.txt"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_sides_are_by_content() -> None:
    made = [Passage(torch.tensor([i % 20, 5])) for i in range(40)]
    train, held = split_passages(made, 0.25)
    assert (len(train), len(held)) == (30, 10)
    assert not {p.digest for p in train} & {p.digest for p in held}
    again = split_passages(made[::-1], 0.25)
    assert {p.digest for p in again[1]} == {p.digest for p in held}
    assert split_passages(made, 0.0) == (made, [])
    assert [len(side) for side in split_passages(made[:2], 0.9)] == [1, 1]
    with pytest.raises(FormatError, match="2 passages of data, all equal"):
        split_passages([made[0], made[20]], 0.1)


def test_passages_and_batches(folder: Path) -> None:
    tokenizer = load_model(folder / "bert", "embed").tokenizer
    lines = read_passages([Row("w1 w2\n\nw3 w4 w5")], tokenizer, "embed", 2, None)
    assert [p.ids.tolist() for p in lines] == [[3, 4], [5, 6]]
    assert [p.ids.tolist() for p in read_passages([Row("w1 w2\nw3 w4 w5")], tokenizer, "lm", 3, None)] == [
        [3, 4, 5], [6, 7]]
    (batch,) = batches([Passage(torch.tensor([3, 4, 5]), 1), Passage(torch.tensor([6]))], 4, 0)
    assert batch.ids.tolist() == [[3, 4, 5], [6, 0, 0]]
    assert batch.mask.tolist() == [[True, True, True], [True, False, False]]
    assert batch.labels == (1, None)


def killed_after(done: int) -> Callable[[str, int, int], None]:
    def step(label: str, at: int, total: int) -> None:
        if at == done:
            os.kill(os.getpid(), signal.SIGKILL)

    return step


def run_and_kill(asked: Request, out: Path, adapter: Adapter, done: int) -> None:
    """Run in a child that kills itself after `done` batches, having saved after each one before."""
    child = os.fork()
    if not child:
        calibrate(asked, out, adapter, every=0.0, progress=killed_after(done))
        os._exit(1)  # never reached: a child that gets here was not killed
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(("done", "gradients"), [(3, False), (3, True), (7, True)])  # 7 is on the held side
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(done: int, gradients: bool, folder: Path, tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    asked = request(folder, "llama", held_out=0.25, gradients=gradients)
    adapter = lora({"model.layers.1.mlp.down_proj.weight": (16, 24)})
    whole, out = tmp_path / "whole", tmp_path / "out"
    monkeypatch.setattr("adaptc.evidence.calibrate._SAVE_SHARE", 0.0)
    calibrate(asked, whole, adapter)
    run_and_kill(asked, out, adapter, done)
    partial = tmp_path / "out.partial"
    assert not out.exists()
    assert partial.is_file()
    with pytest.raises(UsageError, match="another request"):
        calibrate(replace(asked, batch=4), out, adapter)
    with pytest.raises(UsageError, match="another request"):
        calibrate(asked, out, lora({"model.layers.1.mlp.down_proj.weight": (16, 24)}, c=2.0))
    seen: list[int] = []
    report = calibrate(asked, out, adapter, resume=True, progress=lambda label, at, total: seen.append(at))
    assert seen == list(range(done, 8))  # what the killed run did last was not saved any more
    assert report.notes[0] == f"went on after {done - 1} batches of an earlier run"
    assert out.read_bytes() == whole.read_bytes()
    assert not partial.exists()


def test_partial_files_that_do_not_fit(folder: Path, tmp_path: Path) -> None:
    asked, out = request(folder, "llama"), tmp_path / "out"
    with pytest.raises(UsageError, match="nothing to resume"):
        calibrate(asked, out, resume=True)
    (tmp_path / "out.partial").write_bytes(b"\x10\0\0\0\0\0\0\0{}              ")
    with pytest.raises(FormatError, match="no state of a calibration"):
        calibrate(asked, out)


def test_what_cannot_be_run(folder: Path, tmp_path: Path) -> None:
    def ask(family: str = "llama", out: str = "out", **how: Any) -> Report:
        return calibrate(request(folder, family, **how), tmp_path / out)

    (tmp_path / "there").write_text("")
    for error, match, how in [
        (UsageError, "there exists", {"out": "there"}), (UsageError, "window is 128, the model has 64 positions",
                                                         {"window": 128}),
        (UsageError, "'z_proj' fits none of 15 linear layers", {"include": ("z_proj",)}),
        (UsageError, "no linear layer is left", {"exclude": ("*",)}), (UsageError, "there is no adapter",
                                                                      {"gradients": True}),
        (UsageError, "max-tokens is 5, the first passage has 16", {"max_tokens": 5}),
        (UsageError, "held-out share is 1", {"held_out": 1.0}), (UsageError, "batch is 0", {"batch": 0}),
        (UsageError, "window is 1, must be 2", {"window": 1}),
    ]:
        with pytest.raises(error, match=match):
            ask(**how)  # type: ignore[arg-type]
    small = load_model(folder / "bert", "embed").model
    small.resize_token_embeddings(20)
    small.save_pretrained(tmp_path / "small")
    write_tokenizer(tmp_path / "small")
    with pytest.raises(FormatError, match=r"the tokenizer gives token \d\d, BertModel has 20"):
        calibrate(request(folder, "bert", base=str(tmp_path / "small")), tmp_path / "out")
    with pytest.raises(NeedsError, match="no model that can be loaded"):
        calibrate(Request(str(tmp_path / "nothing"), folder / "text.txt"), tmp_path / "out")
    with pytest.raises(NeedsError, match="does not exist"):
        calibrate(Request(str(folder / "llama"), folder / "nothing.txt"), tmp_path / "out")


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "s.safetensors")
    asked = ["calibrate", "--base", str(folder / "llama"), "--data", str(folder / "text.txt"), "--window", "16"]
    assert main([*asked, "-o", out]) == 0
    said = capsys.readouterr().out
    assert re.search(r"tokens  2\d\d in 17 passages, [23]\d in 2 kept apart", said)
    assert "as self_attn.q_proj" in said
    assert main([*asked, "-o", out]) == 2
    assert "exists" in capsys.readouterr().err
    assert main([*asked, "-o", out, "--force", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["bytes"] == Path(out).stat().st_size
    assert told["about"]["tokens"] + told["about"]["held_tokens"] == 300
    assert len(told["layers"]) == 15
