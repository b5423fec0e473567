"""What the ONNX tests share: sessions, small hand-made graphs, tuned models, the command line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import helper, numpy_helper

from adaptc.adapter import Adapter, Origin
from adaptc.cli.main import main
from adaptc.delta import Delta

CLASSES = {"lm": "AutoModelForCausalLM", "classify": "AutoModelForSequenceClassification"}


@dataclass(frozen=True)
class Tuned:
    """A PEFT adapter on a tiny base: its folder, the base's ONNX file, inputs, and logits with it."""

    folder: Path
    base: Path
    feed: Mapping[str, Any]
    logits: Any


def tune(base: Path, task: str, out: Path, config: Mapping[str, Any]) -> Tuned:
    """Save an adapter of random weights and return what PEFT computes with it."""
    import transformers
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    model = getattr(transformers, CLASSES[task]).from_pretrained(base)
    wrapped = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, **config)).eval()
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                p.normal_(std=0.1)
            if "magnitude" in name:
                p.mul_(1 + 0.1 * torch.rand_like(p))
        wrapped.save_pretrained(out)
        ids = torch.randint(3, 60, (3, 7))
        mask = torch.ones_like(ids)
        mask[1, 5:] = 0
        logits = wrapped(input_ids=ids, attention_mask=mask).logits
    feed = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
    if task == "classify":
        feed["token_type_ids"] = np.zeros_like(feed["input_ids"])
    return Tuned(out, base / "onnx" / "model.onnx", feed, logits.numpy())


def session(model: Path | bytes, **config: str) -> Any:
    """Return a session on one thread, with float activations where weights are int4."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    entries = {"session.qdq_matmulnbits_accuracy_level": "0", **config}
    for key, value in entries.items():
        options.add_session_config_entry(key.replace("__", "."), value)
    return ort.InferenceSession(model if isinstance(model, bytes) else str(model), options,
                                providers=["CPUExecutionProvider"])


def run(model: Path, feed: Mapping[str, Any], adapter: Path | None = None) -> Any:
    """Return the first output, with an adapter file activated."""
    options = ort.RunOptions()
    if adapter is not None:
        held = ort.LoraAdapter()
        held.Load(str(adapter))
        options.add_active_adapter(held)
    return session(model).run(None, dict(feed), options)[0]


def expanded(file: Path) -> dict[str, Any]:
    """Return the outputs of an expander."""
    made = session(file)
    return dict(zip([o.name for o in made.get_outputs()], made.run(None, {}), strict=True))


def cli(capsys: Any, *args: object) -> tuple[int, Any, str]:
    """Run the command line; return its exit code, its JSON (None without), and what it complained about."""
    capsys.readouterr()
    code = main([str(a) for a in args])
    said = capsys.readouterr()
    return code, json.loads(said.out) if "--json" in args and not code else None, said.err


def adapter_of(deltas: Mapping[str, Delta], **more: Any) -> Adapter:
    """Return an adapter of these deltas."""
    return Adapter(dict(deltas), more.pop("replaced", {}), Origin("peft", **more))


def weights(seed: int = 0, m: int = 24, n: int = 20) -> dict[str, Any]:
    """Return random base weights of the graph that `two_layers` makes: first (m, n), second (n, m)."""
    rng = np.random.default_rng(seed)
    return {"net.first.weight": rng.standard_normal((m, n)).astype(np.float32) / 4,
            "net.second.weight": rng.standard_normal((n, m)).astype(np.float32) / 4,
            "net.second.bias": rng.standard_normal(n).astype(np.float32)}


def two_layers(path: Path, held: Mapping[str, Any] | None = None, *, names: tuple[str, str] = (
        "net.first.weight", "net.second.weight"), scopes: bool = False, nodes: tuple[str, str] = ("", ""),
        opset: int = 20, ir: int = 9) -> Path:
    """Write y = Gemm(relu(x W1^T), W2, bias): a MatMul on (in, out) and a Gemm with transB on (out, in)."""
    w = held or weights()
    first, second = w["net.first.weight"], w["net.second.weight"]
    made = [helper.make_node("MatMul", ["x", names[0]], ["h"], name=nodes[0]),
            helper.make_node("Relu", ["h"], ["r"]),
            helper.make_node("Gemm", ["r", names[1], "bias"], ["y"], name=nodes[1], transB=1)]
    if scopes:
        for node, module in ((made[0], "net.first"), (made[2], "net.second")):
            node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=str(["", "net", module, "linear"]))
    graph = helper.make_graph(
        made, "two", [helper.make_tensor_value_info("x", 1, ["batch", first.shape[1]])],
        [helper.make_tensor_value_info("y", 1, ["batch", second.shape[0]])],
        [numpy_helper.from_array(np.ascontiguousarray(first.T), names[0]), numpy_helper.from_array(second, names[1]),
         numpy_helper.from_array(w["net.second.bias"], "bias")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir), path)
    return path


def two_layers_run(x: Any, w: Mapping[str, Any]) -> Any:
    """Return in float64 what the graph of `two_layers` computes with weights w."""
    h = np.maximum(x.astype(np.float64) @ w["net.first.weight"].T.astype(np.float64), 0)
    return h @ w["net.second.weight"].T.astype(np.float64) + w["net.second.bias"]
