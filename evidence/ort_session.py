"""ONNX Runtime sessions that are given tokens and adapters by the names of their inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from adaptc.errors import FormatError, UnsupportedError
from adaptc.formats.onnx.model import Array, onnxruntime_module

_NUMPY = {"tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(float)": np.float32,
          "tensor(float16)": np.float16, "tensor(bool)": np.bool_}


class OrtModel:
    """One ONNX model on the CPU, one thread; its `inputs` are those a caller must give."""

    def __init__(self, path: Path) -> None:
        self.path, ort = path, onnxruntime_module()
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Else a quantized product is fused into one that rounds activations to 8 bits.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
        try:
            self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as e:  # the runtime has its own types
            raise FormatError(f"ONNX Runtime refuses {path.name} ({' '.join(str(e).split())[:200]})") from e
        self.inputs = {i.name: i for i in self.session.get_inputs()}

    def outputs(self, inputs: Sequence[Tensor], fed: Mapping[str, Array] | None = None, adapter: Path | None = None
                ) -> Tensor:
        """Return the first output of every row of token ids, flattened to (positions, outputs).

        `fed`: arrays for other inputs; `adapter`: an `.onnx_adapter` that is made active for the run.
        """
        ort = onnxruntime_module()
        names = [o.name for o in self.session.get_outputs()]
        wanted = "logits" if "logits" in names else names[0]
        run, held = ort.RunOptions(), ort.LoraAdapter()
        rows = []
        try:
            if adapter is not None:
                held.Load(str(adapter))
                run.add_active_adapter(held)
            for ids in inputs:
                made = self.session.run([wanted], self._given(ids, fed or {}), run)[0]
                out = torch.from_numpy(np.asarray(made, np.float32))
                rows.append(out.reshape(-1, out.shape[-1]))
        except UnsupportedError:
            raise
        except Exception as e:
            raise FormatError(f"ONNX Runtime stops ({' '.join(str(e).split())[:240]})") from e
        return torch.cat(rows)

    def _given(self, ids: Tensor, fed: Mapping[str, Array]) -> dict[str, Array]:
        """Return every input: tokens, mask, positions, an empty cache, and what is fed."""
        given: dict[str, Array] = dict(fed)
        n = len(ids)
        known = {"input_ids": ids.numpy()[None], "attention_mask": np.ones((1, n)), "token_type_ids": np.zeros((1, n)),
                 "position_ids": np.arange(n)[None]}
        for name, value in self.inputs.items():
            if name in given:
                continue
            dtype = _NUMPY.get(value.type)
            if name in known and dtype is not None:
                given[name] = known[name].astype(dtype)
            elif "past" in name and dtype is not None:
                heads = [d if isinstance(d, int) else 0 for d in value.shape]
                given[name] = np.zeros([1, *heads[1:]], dtype)
            else:
                raise UnsupportedError(f"{self.path.name}: input {name} ({value.type}) is none that random tokens fill")
        return given


def run_expander(path: Path) -> dict[str, Array]:
    """Return the outputs of a graph without inputs by name."""
    model = OrtModel(path)
    if model.inputs:
        raise UnsupportedError(f"{path.name} has inputs ({next(iter(model.inputs))}), an expander has none")
    names = [o.name for o in model.session.get_outputs()]
    return dict(zip(names, (np.asarray(x) for x in model.session.run(names, {})), strict=True))
