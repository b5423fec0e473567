"""A model with attached adapters against PEFT's own forward, and what detaching leaves behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from runtime_models import ids, lora, model, saved, trained
from torch import Tensor, nn

import adaptc
from adaptc.kernels.runtime import Runtime


def logits(m: nn.Module, x: Tensor | None = None) -> Tensor:
    with torch.inference_mode():
        out: Tensor = m(ids() if x is None else x).logits
    return out.clone()


def near(got: Tensor, want: Tensor, bound: float = 1e-5) -> None:
    err = float(((got.double() - want.double()).norm() / want.double().norm()).detach())
    assert err <= bound, err


def state(m: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in m.state_dict().items()}


def unchanged(m: nn.Module, before: dict[str, Tensor]) -> None:
    after = m.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert not any("forward" in module.__dict__ for module in m.modules())


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 7, "query": 2, "c_fc": 19}, "use_rslora": True},
}


@pytest.mark.parametrize("kernels", ["auto", "naive"])
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
def test_peft(family: str, kind: str, kernels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTC_KERNELS", kernels)
    want = saved(family, tmp_path, config=lora(family, **CONFIGS[kind]))
    m = model(family)
    before, base = state(m), logits(m)
    adaptc.attach(m, tmp_path)
    near(logits(m), want)
    assert float((base - want).norm() / want.norm()) > 0.1  # the adapter matters
    adaptc.detach(m)
    unchanged(m, before)
    assert torch.equal(logits(m), base)


def test_dora_of_bias_and_scale(tmp_path: Path) -> None:
    """Half the multiplier is half the change of the weight, also where the weight is rescaled."""
    saved("gpt2", tmp_path, config=lora("gpt2", use_dora=True))
    m = model("gpt2")
    conv = m.get_submodule("transformer.h.0.attn.c_attn")
    x = torch.randn(3, 48)
    y0 = conv(x)
    adaptc.attach(m, tmp_path)
    y1 = conv(x)
    adaptc.set_active(m, {"default": 0.5})
    near(conv(x), (y0 + y1) / 2)


def test_heads_embeddings_tokens_and_convolutions(tmp_path: Path) -> None:
    """Whole tensors replaced, rows of an embedding, low rank on embeddings and convolutions."""
    config = lora("bert", target_modules=["query", "word_embeddings"], modules_to_save=["classifier"])
    want = saved("bert", tmp_path / "a", config=config)
    m = model("bert")
    before = state(m)
    adaptc.attach(m, tmp_path / "a")
    near(logits(m), want)
    adaptc.detach(m)
    unchanged(m, before)

    tokens = lora("llama", trainable_token_indices={"embed_tokens": [1, 5, 90]})
    want = saved("llama", tmp_path / "b", config=tokens)
    m = model("llama")
    before = state(m)
    adaptc.attach(m, tmp_path / "b")
    near(logits(m), want)
    adaptc.detach(m)
    unchanged(m, before)

    net = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    x = torch.randn(2, 3, 9, 9)
    kept = state(net)
    wrapped = trained(net, peft.LoraConfig(r=3, target_modules=["0", "2"]))
    want = wrapped(x)
    wrapped.save_pretrained(str(tmp_path / "c"))
    plain = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    plain.load_state_dict(kept)
    adaptc.attach(plain, tmp_path / "c")
    near(plain(x), want)


@pytest.mark.parametrize("kind", ["plain", "dora"])
def test_several_adapters(kind: str, tmp_path: Path) -> None:
    """Two at once are the sum of their changes, in any order; each alone is itself."""
    m, wants = model("llama"), []
    for i, name in enumerate(("a", "b")):
        wants.append(saved("llama", tmp_path / name, seed=i, config=lora("llama", r=4 + i, **CONFIGS[kind])))
        adaptc.attach(m, tmp_path / name, name)
    for name, want in zip("ab", wants, strict=True):
        adaptc.set_active(m, name)
        near(logits(m), want)
    layer = m.get_submodule("model.layers.1.mlp.up_proj")
    x = torch.randn(2, 3, 64)
    ys = {}
    for names in (None, "a", "b", ("a", "b"), ("b", "a")):
        with adaptc.set_active(m, names):
            ys[names] = layer(x)
    near(ys["a", "b"], ys["a"] + ys["b"] - ys[None])
    near(ys["b", "a"], ys["a", "b"])
    adaptc.set_active(m, {"a": 0.25})
    near(layer(x), ys[None] + 0.25 * (ys["a"] - ys[None]))
    adaptc.set_active(m)
    assert torch.equal(logits(m), logits(model("llama")))
    adaptc.detach(m, "a")
    adaptc.set_active(m, "b")
    near(logits(m), wants[1])


@pytest.mark.parametrize("kernels", ["auto", "naive"])
def test_a_request_each(kernels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of one batch with adapters of their own equal the rows one by one."""
    monkeypatch.setenv("ADAPTC_KERNELS", kernels)
    m, names = model("llama"), ["a", "b", "d"]
    for i, name in enumerate(names):
        saved("llama", tmp_path / name, seed=i, config=lora("llama", r=3 + 5 * i, use_dora=name == "d"))
        adaptc.attach(m, tmp_path / name, name)
    each = ["b", None, "a", "d", "b", None]
    x = ids(6)
    rows = []
    for i, name in enumerate(each):
        adaptc.set_active(m, name)
        rows.append(logits(m, x[i : i + 1]))
    before = m.__dict__["_adaptc_runtime"].selection
    with adaptc.set_active(m, each=each):
        near(logits(m, x), torch.cat(rows))
        with pytest.raises(adaptc.AdaptcError, match=r"q_proj: input has 5 rows, adapters are set for 6"):
            logits(m, x[:5])
    assert m.__dict__["_adaptc_runtime"].selection is before
    near(logits(m, x[-1:]), rows[-1])


def test_gradient_and_compile(tmp_path: Path) -> None:
    """Autograd with respect to x through the model, and torch.compile, with and without a gradient."""
    want = trained(model("llama"), lora("llama", use_dora=True))
    x = want.get_input_embeddings()(ids()).detach().requires_grad_()
    want(inputs_embeds=x).logits.square().sum().backward()
    want.save_pretrained(str(tmp_path))
    grad, x.grad = x.grad, None
    m = model("llama")
    for p in m.parameters():
        p.requires_grad_(False)
    adaptc.attach(m, tmp_path)
    m(inputs_embeds=x).logits.square().sum().backward()
    assert grad is not None
    assert x.grad is not None
    near(x.grad, grad)
    mlp = m.get_submodule("model.layers.0.mlp")
    compiled = torch.compile(mlp, backend="eager", fullgraph=True)
    h = torch.randn(2, 3, 64, requires_grad=True)
    near(compiled(h), mlp(h))
    with torch.inference_mode():
        near(compiled(h), mlp(h))
    with adaptc.set_active(m):
        near(compiled(h), mlp(h), 0)


def test_size_and_repr(tmp_path: Path) -> None:
    saved("gpt2", tmp_path)
    runtime = adaptc.attach(model("gpt2"), tmp_path)
    assert isinstance(runtime, Runtime)
    assert repr(runtime) == f"Runtime(1 adapters on 8 layers, {runtime.nbytes} B)"
