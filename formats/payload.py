"""What a file that is no safetensors holds: torch pickles and npz archives, opened without running anything."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adaptc.errors import FormatError, UnsupportedError
from adaptc.tensorfile import NAMES, check_name

# An archive may unpack to this many bytes, or to this many times its own size, whichever is more.
_UNPACKED, _RATIO = 2**28, 20
_WRAPPERS = ("model", "state_dict")  # checkpoints whose tensors are one level down


def load_pickle(path: Path) -> Any:
    """Return the plain structure of a torch.save file, tensors mapped where the container allows it.

    Only tensors and plain containers are built (weights_only). Raises UnsupportedError for a pickle that asks for
    anything else, FormatError for a damaged one.
    """
    with path.open("rb") as f:
        zipped = f.read(2) == b"PK"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped or None)
    except pickle.UnpicklingError as e:
        asked = re.search(r"GLOBAL ([\w.]+)", str(e))
        what = f"asks for {asked[1]}" if asked else "is not one that torch.save writes"
        raise UnsupportedError(f"{path.name}: pickle {what}, refused: only tensors are read",
                               hint="ask its author for safetensors") from e
    except OSError:
        raise
    except Exception as e:  # a damaged file surfaces as any of a dozen types, none of them torch's own
        raise FormatError(f"{path.name}: truncated, or not a torch file") from e


def load_npz(path: Path) -> dict[str, Tensor]:
    """Return the arrays of an npz archive. Raises FormatError for damaged archives, bombs and object arrays."""
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as z:
            entries = z.infolist()
        unpacked, names = sum(e.file_size for e in entries), [e.filename for e in entries]
        if unpacked > max(_UNPACKED, _RATIO * size):
            raise FormatError(f"{path.name}: {size} bytes that unpack to {unpacked}")
        if len(set(names)) != len(names):
            twice = next(n for n in names if names.count(n) > 1)
            raise FormatError(f"{path.name}: archive names {twice!r} twice")
        with warnings.catch_warnings(), np.load(path, allow_pickle=False) as z:
            warnings.simplefilter("ignore")
            return {k: torch.from_numpy(np.ascontiguousarray(z[k])) for k in z.files}
    except zipfile.BadZipFile as e:
        raise FormatError(f"{path.name}: truncated or damaged npz archive") from e
    except (FormatError, OSError):
        raise
    except Exception as e:  # numpy, zlib and zipfile raise a dozen types for damaged members
        raise FormatError(f"{path.name}: not a plain npz archive of numeric arrays") from e


def tensors_of(held: Any, file: str) -> dict[str, Tensor]:
    """Return the tensors of a payload by key, {} when it is not a mapping of tensors (or a model or state_dict of it).

    Raises FormatError for keys that clash as text, tensors without storage, and views larger than their storage.
    """
    if not isinstance(held, Mapping):
        return {}
    for name in _WRAPPERS:
        inner = held.get(name)
        if isinstance(inner, Mapping) and inner:
            held = inner
            break
    if not held or not all(isinstance(v, Tensor) for v in held.values()):
        return {}
    keys = [str(k) for k in held]
    if len(set(keys)) != len(keys):
        raise FormatError(f"{file}: two keys read the same as text")
    return dict(_checked(zip(keys, held.values(), strict=True), file))


def _checked(items: Iterator[tuple[str, Tensor]] | zip[tuple[str, Tensor]], file: str) -> Iterator[tuple[str, Tensor]]:
    for key, t in items:
        check_name(key, file)
        if t.layout != torch.strided or t.is_quantized or t.device.type != "cpu" or t.dtype not in NAMES:
            raise FormatError(f"{file}: {key} is a {str(t.dtype)[6:]} tensor ({str(t.layout)[6:]}, {t.device.type}), "
                              "not plain numbers")
        if t.numel() * t.itemsize > t.untyped_storage().nbytes():
            raise FormatError(f"{file}: {key} claims {t.numel()} entries over {t.untyped_storage().nbytes()} bytes")
        yield key, t.detach()
