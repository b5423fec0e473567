"""Run `adaptc.attach` on a GPU, check it and time it: `python benchmarks/runtime_gpu.py [--out FILE]`.

A small Llama (4 layers, 1024 wide, grouped heads) with random weights on five bases (float32, bfloat16, float16, packed
NF4, bitsandbytes NF4) and adapters of every kind the runtime knows. The reference is the same model in float32 with dW
added to its weights in float64. Errors are ||y - ref|| / ||ref|| of the logits; beside them what the base alone does
in the same dtype, which is the error no adapter causes, and what the adapter changes. Times: runtime_gpu_layer.py.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import kernels_path
import torch
from torch import Tensor, nn

import adaptc
from adaptc.adapter import Adapter, Origin
from adaptc.delta import LowRank, Sparse
from adaptc.kernels.linear import linear
from adaptc.kernels.runtime_packed import PackedLinear, pack_linears
from adaptc.quant.quantize import Quantize
from adaptc.quant.walsh import name_for
from adaptc.spectral import Spectral

BASES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "nf4": torch.bfloat16,
         "bnb": torch.bfloat16}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RESULTS: list[dict[str, Any]] = []


def say(**row: Any) -> None:
    RESULTS.append(row)
    print(json.dumps(row), flush=True)


def llama(layers: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=512, hidden_size=1024, intermediate_size=2816, num_hidden_layers=layers, num_attention_heads=16,
        num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=False)).eval().requires_grad_(False)


def adapters(model: nn.Module, targets: tuple[str, ...]) -> dict[str, Adapter]:
    """One adapter of each kind on the target projections of all layers, each changing a weight by about a third."""
    torch.manual_seed(1)
    made: dict[str, dict[str, Any]] = {k: {} for k in ("low rank", "sparse", "spectral")}
    for name, module in model.named_modules():
        if not name.endswith(targets):
            continue
        m, n = module.weight.shape  # type: ignore[union-attr,misc]
        norm = float(module.weight.norm()) / 3  # type: ignore[union-attr,operator]
        b, a = torch.randn(m, 16), torch.randn(16, n)
        made["low rank"][f"{name}.weight"] = LowRank(a, b, None, norm / float((b @ a).norm()), (m, n))
        at = torch.randperm(m * n)[: m * n // 100].sort().values
        values = torch.randn(at.numel())
        made["sparse"][f"{name}.weight"] = Sparse(at, values, norm / float(values.norm()), (m, n))
        made["spectral"][f"{name}.weight"] = Spectral(at, values, name_for(n), norm / float(values.norm()), (m, n))
    out = {k: Adapter(d, {}, Origin("peft")) for k, d in made.items()}
    out["one bit"] = Quantize(bits=1.0)(out["low rank"]).adapter
    return out


def dora(model: nn.Module, targets: list[str]) -> Adapter:
    import peft

    torch.manual_seed(2)
    tuned = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(
        r=16, lora_alpha=16, target_modules=targets, use_dora=True, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for key, p in tuned.named_parameters():
            if "lora_" in key:
                p += torch.randn_like(p) * 0.03
    with tempfile.TemporaryDirectory() as folder:
        tuned.save_pretrained(folder)
        return adaptc.load(folder)


def on(base: str, plain: nn.Module) -> nn.Module:
    """The model on the GPU with one kind of base weights."""
    model = copy.deepcopy(plain)
    if base == "nf4":
        pack_linears(model)
    elif base == "bnb":
        import bitsandbytes as bnb

        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if name in TARGETS:
                    four = bnb.nn.Linear4bit(child.in_features, child.out_features, bias=False, quant_type="nf4",
                                             compute_dtype=torch.bfloat16)
                    four.weight = bnb.nn.Params4bit(child.weight.data.to(torch.bfloat16), requires_grad=False,
                                                    quant_type="nf4")
                    setattr(parent, name, four)
    model = model.cuda()
    if base != "float32":
        for p in (*model.parameters(), *(b for k, b in model.named_buffers() if not k.endswith(("data", "scales")))):
            if p.is_floating_point() and p.dtype == torch.float32 and "inv_freq" not in str(type(p)):
                p.data = p.data.to(BASES[base])
    return model


def weights(model: nn.Module, plain: nn.Module, base: str) -> nn.Module:
    """The float32 model with exactly the base weights that `model` holds."""
    ref = copy.deepcopy(plain).cuda()
    for name, module in model.named_modules():
        target = ref.get_submodule(name)
        if not isinstance(target, nn.Linear):
            continue
        if isinstance(module, PackedLinear):
            w = module.packed
            eye = torch.eye(w.shape[1], device="cuda")
            target.weight.data = torch.cat([linear(e, w) for e in eye.split(256)]).t().contiguous()
        elif base == "bnb" and hasattr(module.weight, "quant_state"):
            import bitsandbytes.functional as F

            target.weight.data = F.dequantize_4bit(module.weight.data, module.weight.quant_state).float()
        else:
            target.weight.data = module.weight.data.float().clone()
    for name, p in ref.named_parameters():
        if not name.endswith("proj.weight"):
            p.data = model.get_parameter(name).data.float().clone()
    return ref


def merged(ref: nn.Module, adapter: Adapter) -> nn.Module:
    made = copy.deepcopy(ref)
    for key, delta in adapter.deltas.items():
        p = made.get_parameter(key)
        delta = delta.resolve(p.data.double().cpu()) if hasattr(delta, "resolve") else delta
        p.data = (p.data.double() + delta.dense().cuda()).float()
    return made


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=ids).logits.double()  # type: ignore[no-any-return]


def far(x: Tensor, ref: Tensor) -> float:
    return float((x - ref).norm() / ref.norm())


def check(plain: nn.Module, held: dict[str, Adapter], bases: list[str]) -> None:
    torch.manual_seed(3)
    inputs = {"1 row": torch.randint(0, 512, (1, 1)).cuda(), "64 rows": torch.randint(0, 512, (2, 32)).cuda(),
              "300 rows": torch.randint(0, 512, (3, 100)).cuda()}
    for base in bases:
        try:
            model = on(base, plain)
            ref = weights(model, plain, base)
        except Exception as e:
            say(base=base, failed=f"{type(e).__name__}: {e}"[:300])
            continue
        before = {k: logits(model, v) for k, v in inputs.items()}
        noise = {k: far(before[k], logits(ref, v)) for k, v in inputs.items()}
        for kind, adapter in held.items():
            for how in ("side", "switch") if kind == "sparse" else ("side",):
                if how == "switch" and base in ("nf4", "bnb"):
                    continue
                try:
                    wanted = merged(ref, adapter)
                    runtime = adaptc.attach(model, adapter, sparse=how)
                    for k, ids in inputs.items():
                        found, want = logits(model, ids), logits(wanted, ids)
                        say(base=base, adapter=f"{kind} {how}".removesuffix(" side"), input=k, error=far(found, want),
                            base_error=noise[k], effect=far(want, logits(ref, ids)))
                    adaptc.detach(model)
                    del runtime
                    same = all(torch.equal(logits(model, v), before[k]) for k, v in inputs.items())
                    say(base=base, adapter=kind, detached_bit_for_bit=same)
                except Exception as e:
                    say(base=base, adapter=kind, failed=f"{type(e).__name__}: {e}"[:300],
                        at=traceback.format_exc().splitlines()[-3][:200])
                    try:
                        adaptc.detach(model)
                    except adaptc.AdaptcError:
                        model = on(base, plain)
        mixture(base, model, held)


def mixture(base: str, model: nn.Module, held: dict[str, Adapter]) -> None:
    """Three rows, three choices, against each row alone."""
    try:
        for name in ("low rank", "one bit"):
            adaptc.attach(model, held[name], name)
        ids = torch.randint(0, 512, (3, 12)).cuda()
        each = ["low rank", None, "one bit"]
        with adaptc.set_active(model, each=each):
            together = logits(model, ids)
        alone = []
        for i, name in enumerate(each):
            with adaptc.set_active(model, name):
                alone.append(logits(model, ids[i : i + 1]))
        say(base=base, mixture=far(together, torch.cat(alone)))
        adaptc.detach(model)
    except Exception as e:
        say(base=base, mixture_failed=f"{type(e).__name__}: {e}"[:300])


def generated(plain: nn.Module, held: dict[str, Adapter]) -> None:
    """Greedy tokens of the coded adapter and of its decoded factors, packed NF4 base."""
    from adaptc.lowrank import plain as decoded

    model = on("nf4", plain)
    ids = torch.randint(0, 512, (1, 8)).cuda()
    tokens = []
    coded = held["one bit"]
    for adapter in (coded, coded.with_deltas({k: decoded(d) for k, d in coded.deltas.items()})):
        adaptc.attach(model, adapter)
        tokens.append(model.generate(ids, max_new_tokens=48, do_sample=False))
        adaptc.detach(model)
    say(generate="48 greedy tokens", equal=bool(torch.equal(*tokens)))
    adaptc.attach(model, coded)
    eager = logits(model, ids)
    try:
        compiled = torch.compile(model)
        with torch.inference_mode():
            say(compiled=far(compiled(input_ids=ids).logits.double(), eager))
    except Exception as e:
        say(compile_failed=f"{type(e).__name__}: {e}"[:300])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--targets", nargs="+", default=TARGETS, choices=TARGETS)
    parser.add_argument("--bases", nargs="+", default=list(BASES), choices=list(BASES))
    options = parser.parse_args()
    kernels_path.hide_scripts()
    torch.backends.cuda.matmul.allow_tf32 = False
    say(device=torch.cuda.get_device_name(), torch=torch.__version__, python=sys.version.split()[0])
    plain = llama(options.layers)
    held = adapters(plain, tuple(options.targets))
    try:
        held["dora"] = dora(plain, list(options.targets))
    except Exception as e:
        say(adapter="dora", failed=f"{type(e).__name__}: {e}"[:300])
    for part in (lambda: check(plain, held, options.bases), lambda: generated(plain, held)):
        try:
            part()
        except Exception:
            say(failed=traceback.format_exc()[-800:])
    if options.out:
        options.out.write_text(json.dumps(RESULTS, indent=1))


if __name__ == "__main__":
    main()
