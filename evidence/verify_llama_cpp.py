"""llama.cpp, through llama-cpp-python, against torch on the same base."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from adaptc.adapter import Adapter
from adaptc.delta import Delta, LowRank
from adaptc.errors import FormatError, NeedsError, UnsupportedError, UsageError
from adaptc.evidence.llama_rounding import branches, rounded_inputs
from adaptc.evidence.verdict import Runs, Verdict, compare_source, judge
from adaptc.evidence.verify_torch import Reference, fitting, open_reference
from adaptc.factor import decoded
from adaptc.formats.gguf import Gguf
from adaptc.formats.gguf_arch import Target, gguf_name, row_order, target_of
from adaptc.formats.gguf_types import TYPES
from adaptc.formats.source import open_source
from adaptc.gguf_header import read_gguf_header

# Of the adapter's effect, by the widest of the types in it. With every rounding modelled what is left is the order of
# sums, and values so near to a boundary that they are rounded the other way, which the layers above then spread.
_EXACT, _HALF, _BLOCKS, _ROUNDED_BASE = 1e-4, 5e-3, 2e-2, 0.1
# Of the outputs without an adapter: a float base, one that is quantized, another quantization of the reference.
_BASE, _BASE_ROUNDED, _BASE_OTHER = 1e-4, 0.1, 0.7
_SIGNALS = {-6: "aborted", -11: "crashed", -4: "needs instructions that this processor has not"}


def verify(artefact: Path, base: Path, source: Adapter | None, reference: Path | None, prompts: Sequence[str]
           ) -> tuple[Verdict, ...]:
    """Run `artefact` (GGUF) on `base` (GGUF) with and without, and compare; with `source`, compare what it holds first.

    Raises NeedsError without llama-cpp-python or transformers, UsageError for a base that is no GGUF model.
    """
    if importlib.util.find_spec("llama_cpp") is None:
        raise NeedsError("llama.cpp is run through llama-cpp-python, which is not installed",
                         hint="pip install llama-cpp-python (built from source, a few minutes)")
    if base.suffix != ".gguf" or not base.is_file():
        raise UsageError(f"{base} is no GGUF model, which is what llama.cpp runs",
                         hint="--base model.gguf, and --reference DIR for the same model in torch")
    target = target_of(base)
    fmt = Gguf(target)
    made = fmt.read(open_source(artefact))
    arch = str(made.origin.config["facts"].get("general.architecture"))
    if arch != target.arch:
        return (Verdict("wrong base", f"the artefact is for {arch}, the base is {target.arch}"),)
    found = [_held(made, source, target)] if source is not None else []
    torch_model = open_reference(reference or base)
    inputs = torch_model.ids(2, 24, prompts)
    return (*found, _run(artefact, base, made, torch_model, target, inputs))


def _held(made: Adapter, source: Adapter, target: Target) -> Verdict:
    """Return what the artefact holds of `source`: read with the rows of q and k brought back twice, or not at all."""
    source = replace(source, deltas={k: d for k, d in source.deltas.items() if gguf_name(k, target.family)})
    fixed = made.map(lambda k, d: _permuted(k, d, target))
    clause = "rows of q and k lie in transformers' order, llama.cpp wants pairs of rotary halves"
    return compare_source(_like(made, source), source, [(clause, _like(fixed, source))])


def _like(made: Adapter, source: Adapter) -> Adapter:
    """Return `made` under the names of `source` where they end alike (wrappers put prefixes before them)."""
    tails = {k.partition("layers.")[2] or k: k for k in source.deltas}
    return replace(made, deltas={tails.get(k.partition("layers.")[2] or k, k): d for k, d in made.deltas.items()})


def _permuted(key: str, d: Delta, target: Target, *, back: bool = False) -> Delta:
    name = gguf_name(key, target.family)
    order = None if name is None or not isinstance(d, LowRank) else row_order(name, d.shape[0], target)
    if order is None or not isinstance(d, LowRank):
        return d
    return replace(d, b=decoded(d.b)[torch.argsort(order) if back else order])


def _run(artefact: Path, base: Path, made: Adapter, reference: Reference, target: Target, inputs: Sequence[Tensor]
         ) -> Verdict:
    fitted = fitting(made, reference)
    ids = {key: tuple(TYPES[t].id for t in types) for key, types in made.origin.config["types"].items()}
    types = dict(zip(fitted.deltas, (ids[k] for k in made.deltas), strict=True))
    header, modules = read_gguf_header(base), dict(reference.model.named_modules())
    known = {k.removesuffix(".weight"): name for k, _ in reference.model.named_parameters()
             if (name := gguf_name(k, target.family))}
    stored = {m: header.tensors[n].type for m, n in known.items()
              if n in header.tensors and isinstance(modules[m], torch.nn.Linear)}
    if len(header.tensors) and not stored:
        raise UnsupportedError(f"{base.name}: none of its tensors is a layer of the reference model")

    def expected(guess: str, scale: float) -> Tensor:
        some = fitted if not guess else fitted.map(lambda k, d: _permuted(k, d, target, back=guess == "back"))
        return _modelled(reference, some, types, stored, inputs, scale)

    with tempfile.TemporaryDirectory() as folder:
        without = run_llama(base, inputs, Path(folder))
        try:
            given = run_llama(base, inputs, Path(folder), artefact)
        except FormatError as e:
            if "does not exist in base model" in str(e) or "incorrect shape" in str(e):
                return Verdict("wrong base", str(e))
            raise
    plain = all(t == TYPES["f32"].id for t in stored.values())
    near = _BASE if plain else _BASE_ROUNDED if reference.path == base else _BASE_OTHER
    widest = max((_widest(t) for both in types.values() for t in both), default=_EXACT)
    guesses = {g: f"{said} rows of q and k explains it" for g, said in (("forth", "reordering the"),
                                                                        ("back", "bringing back the order of the"))}
    runs = Runs(without, given, _modelled(reference, None, types, stored, inputs, 1.0), expected,
                widest if plain else _ROUNDED_BASE, near, guesses)
    verdict = judge(runs)
    floats = reference.outputs(inputs, fitted) - reference.outputs(inputs)
    off = float((given - without - floats).norm() / floats.norm())
    return replace(verdict, figures={**verdict.figures, "float_error": off})


def _widest(type_id: int) -> float:
    return {0: _EXACT, 1: _HALF, 30: _HALF}.get(type_id, _BLOCKS)


def _modelled(reference: Reference, adapter: Adapter | None, types: Mapping[str, tuple[int, ...]],
              stored: Mapping[str, int], inputs: Sequence[Tensor], scale: float) -> Tensor:
    """Return torch's outputs with activations rounded wherever llama.cpp rounds them."""
    factors = {}
    for key, d in (adapter.deltas if adapter is not None else {}).items():
        if not isinstance(d, LowRank):
            raise UnsupportedError(f"{key}: no factors to run")
        if isinstance(reference.model.get_submodule(key.removesuffix(".weight")), torch.nn.Embedding):
            raise UnsupportedError(f"{key}: changes of the embedding are written but not verified here")
        b = decoded(d.b).float() * d.scale
        factors[key.removesuffix(".weight")] = (decoded(d.a).float(), b, types[key][0], types[key][1])
    with ExitStack() as stack:
        stack.enter_context(rounded_inputs(reference.model, stored))
        stack.enter_context(branches(reference.model, factors, scale))
        return reference.outputs(inputs)


def run_llama(base: Path, inputs: Sequence[Tensor], folder: Path, adapter: Path | None = None, scale: float = 1.0
              ) -> Tensor:
    """Return llama.cpp's logits of every position (positions, vocabulary), run in another process.

    Raises FormatError with llama.cpp's last complaint where it refuses a file or aborts.
    """
    tokens, out = folder / "tokens.npz", folder / "logits.npz"
    out.unlink(missing_ok=True)
    np.savez(tokens, **{f"{i:04d}": ids.numpy() for i, ids in enumerate(inputs)})  # type: ignore[arg-type]
    given = [str(adapter), str(scale)] if adapter is not None else []
    done = subprocess.run([sys.executable, "-m", "adaptc.evidence.llama_worker", str(base), str(tokens), str(out),
                           *given], capture_output=True, text=True, check=False)
    if done.returncode or not out.is_file():
        raise FormatError(f"llama.cpp {_SIGNALS.get(done.returncode, 'refuses it')}: {_complaint(done.stderr)}")
    with np.load(out) as held:
        return torch.cat([torch.from_numpy(held[k]) for k in sorted(held.files)])


def _complaint(text: str) -> str:
    """Return the line of llama.cpp's log that says why."""
    lines = [x.strip() for x in text.splitlines() if x.strip()]
    wrong = [x for x in lines if any(w in x.lower() for w in ("does not exist", "incorrect", "assert", "invalid"))]
    wrong = wrong or [x for x in lines if "failed" in x.lower() or "error" in x.lower()] or lines
    return wrong[0][:300] if wrong else "no reason given"
