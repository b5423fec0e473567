from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from adaptc.errors import UnsupportedError
from adaptc.evidence.unpack import unpack_gguf

pytest.importorskip("gguf")


class NoTokenizer:
    """A tokenizer of a model that was written without one."""

    def save_pretrained(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "core"))
    return importlib.import_module("gguf_models")


@pytest.mark.parametrize(("family", "kind"), [("llama", "Q8_0"), ("qwen3", "F32"), ("gpt2", "Q4_0")])
def test_a_gguf_model_becomes_a_folder_that_computes_the_same(family: str, kind: str, models: Any, tmp_path: Path,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.hf_model(family)
    models.write_gguf(tmp_path / "m.gguf", family, model, kind)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *a, **kw: NoTokenizer())
    out = tmp_path / "out"
    out.mkdir()
    unpack_gguf(tmp_path / "m.gguf", out)
    assert (out / "tokenizer.json").is_file()
    ours = transformers.AutoModelForCausalLM.from_pretrained(out)
    model.config.tie_word_embeddings = True  # the file holds no head of its own
    theirs = type(model).from_pretrained(tmp_path, gguf_file="m.gguf", config=model.config, dtype=torch.float32)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)


def test_a_family_that_transformers_cannot_convert_is_refused(models: Any, tmp_path: Path) -> None:
    models.write_gguf(tmp_path / "m.gguf", "llama", models.hf_model("llama"))  # without a tokenizer
    (tmp_path / "out").mkdir()
    with pytest.raises(UnsupportedError, match="transformers cannot convert it"):
        unpack_gguf(tmp_path / "m.gguf", tmp_path / "out")
