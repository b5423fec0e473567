"""llama.cpp in a process of its own, where an abort of native code is an exit code: tokens in, logits out.

    python -m adaptc.evidence.llama_worker base.gguf tokens.npz logits.npz [adapter.gguf SCALE]
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def main(args: Sequence[str]) -> int:
    """Run every token row of tokens.npz and write its logits; complaints of llama.cpp go to stderr."""
    import llama_cpp as lib

    base, tokens, out, *adapter = args
    lib.llama_backend_init()
    load = lib.llama_model_default_params()
    load.n_gpu_layers = 0
    load.use_extra_bufts = False  # repacked weights and AMX tiles: faster kernels that round in other places
    model = lib.llama_model_load_from_file(base.encode(), load)
    if not model:
        print(f"failed to load {base}", file=sys.stderr)
        return 3
    with np.load(tokens) as held:
        rows = {k: held[k].astype(np.int32) for k in held.files}
    longest = max(map(len, rows.values()))
    run = lib.llama_context_default_params()
    run.n_ctx = run.n_batch = run.n_ubatch = max(64, longest)
    run.n_threads = run.n_threads_batch = 1
    run.type_k = run.type_v = 0  # F32, so that attention rounds nothing of its own
    run.flash_attn_type = 0
    context = lib.llama_init_from_model(model, run)
    if not context:
        return 4
    if adapter:
        lora = lib.llama_adapter_lora_init(model, adapter[0].encode())
        if not lora:
            print(f"failed to load adapter {adapter[0]}", file=sys.stderr)
            return 5
        loras = (lib.llama_adapter_lora_p_ctypes * 1)(lora)
        if lib.llama_set_adapters_lora(context, loras, 1, (ctypes.c_float * 1)(float(adapter[1]))):
            return 6
    width = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    np.savez(out, **{k: _logits(context, ids, width) for k, ids in rows.items()})  # type: ignore[arg-type]
    return 0


def _logits(context: object, ids: npt.NDArray[np.int32], width: int) -> npt.NDArray[np.float32]:
    """Return (tokens, vocabulary) for one row, on an empty cache."""
    import llama_cpp as lib

    lib.llama_memory_clear(lib.llama_get_memory(context), True)
    batch = lib.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids.tolist()):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
        batch.seq_id[i][0] = 0
    if lib.llama_decode(context, batch):
        raise RuntimeError("llama_decode failed")
    made = np.ctypeslib.as_array(lib.llama_get_logits(context), (len(ids), width)).copy()
    lib.llama_batch_free(batch)
    return made


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
