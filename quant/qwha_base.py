"""What QWHA works on beside numbers: the layers of a calibrated base, and a copy of it with quantised weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from adaptc.adapter import Adapter, Origin
from adaptc.base import Base
from adaptc.base_files import weight_files
from adaptc.calibration import Calibration
from adaptc.delta import Delta, Sparse
from adaptc.errors import FormatError, NeedsError, UnsupportedError
from adaptc.formats.atomic import staged
from adaptc.tensorfile import DTYPES, TensorFile

# Output layers stay as they are unless an adapter changes them: their outputs are the result itself.
HEADS = frozenset({"lm_head", "embed_out", "score", "classifier", "pooler", "cls", "qa_outputs"})
# Files beside the weights that make a model folder.
_BESIDE = frozenset({".json", ".txt", ".model", ".jinja", ".tiktoken", ".md"})


def layers(base: Base, calibration: Calibration, adapter: Adapter | None) -> Adapter:
    """Return `adapter` (None: an empty one) with a delta of zero for every other layer that the statistics are of.

    Left out are layers the base has no matrix for (tied ones) and output layers. Raises NeedsError where nothing is
    left, FormatError for statistics of another width than the base has.
    """
    start = adapter or Adapter({}, {}, Origin("adaptc", base_model=_name(base)))
    taken = {base.name_of(k) for k in start.deltas}
    added: dict[str, Delta] = {}
    for key in calibration.parameters:
        name, moment = base.name_of(key), calibration.moment(key)
        if name is None or moment is None or name in taken or HEADS & set(key.split(".")[:-1]):
            continue
        stored, width = tuple(base[name].shape), moment.shape[0]
        if len(stored) != 2:
            continue
        if width not in stored:
            raise FormatError(f"{key}: statistics are of {width} inputs, the base weight has shape {stored}",
                              hint="the statistics are those of another model")
        shape = stored if stored[1] == width else stored[::-1]
        added[key] = Sparse(torch.empty(0, dtype=torch.long), torch.empty(0), 1.0, shape)
    if not added and not start.deltas:
        raise NeedsError(f"{calibration.path.name} has statistics of no layer of {base.path}",
                         hint="adaptc calibrate --base with the same model collects them")
    return replace(start, deltas={**start.deltas, **added})


def _name(base: Base) -> str:
    """Return what the base calls itself, else the name of its folder."""
    said = base.config.get("_name_or_path")
    return said if isinstance(said, str) and said and not Path(said).is_absolute() else base.path.resolve().name


@contextmanager
def rewritten(base: Base, out: Path, *, force: bool = False) -> Iterator[Callable[[str, Tensor], None]]:
    """Yield put(key, weight), which replaces a weight in a copy of the base's folder that appears at `out` at the end.

    The copy holds the safetensors files and the configs beside them; every weight keeps its dtype, so plain
    transformers load it. Raises UnsupportedError for a base that is no folder of float safetensors.
    """
    files = weight_files(base.path) if base.path.is_dir() else []
    if not files:
        raise UnsupportedError(f"{base.path} is no folder of safetensors, a quantised copy of it cannot be written")
    where = {name: (file.name, opened) for file in files for opened in [TensorFile(file)] for name in opened}
    with staged(out, force=force, folder=True, inputs=(base.path,)) as temp:
        for file in (*files, *(p for p in base.path.iterdir() if p.is_file() and p.suffix in _BESIDE)):
            shutil.copyfile(file, temp / file.name)

        def put(key: str, weight: Tensor) -> None:
            name = base.name_of(key) or key
            file, opened = where[name]
            dtype, shape, begin, end = opened.info[name]
            if DTYPES[dtype] != weight.dtype or sorted(shape) != sorted(weight.shape):
                raise UnsupportedError(f"{key}: the base holds {dtype} {shape}, not floats of {tuple(weight.shape)}",
                                       hint="only bases in plain floats can be written quantised")
            turned = not base.weight(key, tuple(weight.shape)).is_contiguous()  # stored (in, out)
            data = (weight.T if turned else weight).contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            with (temp / file).open("r+b") as f:
                size = (temp / file).stat().st_size
                f.seek(size - max(e for _, _, _, e in opened.info.values()) + begin)
                f.write(data[: end - begin])

        yield put
