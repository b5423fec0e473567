"""Which adapters a fleet is made of: folders, files, globs and lists of them, each adapter once, under a name."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import takewhile
from pathlib import Path

from adaptc.errors import AdaptcError, UsageError
from adaptc.evidence.fleet_paths import File, files_below, is_url, kind
from adaptc.formats.source import KNOWN_FILES, could_be_adapter

_CONFIG = "adapter_config.json"


@dataclass(frozen=True, slots=True)
class Unit:
    """One adapter of a fleet. `name` is its place below the output folder, `files` what it is made of."""

    input: str
    folder: bool
    files: Mapping[str, File]
    name: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return sum(f.nbytes for f in self.files.values())

    @property
    def stamp(self) -> str:
        """16 hex digits that stay the same while nobody writes the files; "" where the store cannot tell."""
        if not all(f.stamp for f in self.files.values()):
            return ""
        said = "\n".join(f"{name} {f.nbytes} {f.stamp}" for name, f in self.files.items())
        return hashlib.sha256(said.encode()).hexdigest()[:16]


def find(arguments: Sequence[str], out: str, root: str | None = None) -> list[Unit]:
    """Return every adapter that `arguments` name, once, in order, with the name of its output.

    A glob ("library/**/", "lib/*.safetensors") gives what it matches, a folder that is no adapter everything below
    it, a .txt file its lines. Names mirror the tree below the fixed part of the glob, below the searched folder, below
    the common parent of adapters named one by one; or below `root`. Nothing below `out` is taken.
    Raises UsageError for a path that is not there, for nothing found, and for two adapters with one output.
    """
    shallow = lru_cache(maxsize=None)(lambda folder: files_below(folder, deep=False))
    roots = [_of_argument(a.rstrip() or ".", shallow) for a in _lines(arguments)]
    direct = [_parent(u.input) for at, units in roots if at is None for u in units]
    common = _common(direct) if direct else ""
    named: dict[str, Unit] = {}
    for at, units in roots:
        for unit in units:
            key = _absolute(unit.input)
            if key not in named and not f"{key}/".startswith(f"{_absolute(out)}/"):
                below = root if root is not None else common if at is None else at
                named[key] = replace(unit, name=_relative(unit.input, below))
    if not named:
        raise UsageError(f"{', '.join(arguments[:3])} holds no adapter file",
                         hint=f"looked for {', '.join(KNOWN_FILES[:4])} and others; quote globs: 'library/**/'")
    return _distinct(list(named.values()))


def _lines(arguments: Iterable[str]) -> Iterable[str]:
    for argument in arguments:
        if argument.endswith(".txt") and not is_url(argument):
            try:
                lines = Path(argument).read_text("utf-8").splitlines()
            except FileNotFoundError as e:
                raise UsageError(f"list {argument} does not exist") from e
            except (OSError, ValueError) as e:
                raise AdaptcError(f"{argument} is no list of paths ({e})") from e
            yield from (line for line in map(str.strip, lines) if line and not line.startswith("#"))
        else:
            yield argument


def _of_argument(argument: str, shallow: Callable[[str], dict[str, File]]) -> tuple[str | None, list[Unit]]:
    """Return where names count from (None: the common parent) and the adapters of one argument."""
    what = kind(argument)
    if what == "file":
        folder, _, name = argument.rpartition("/")
        inside = shallow(folder or ("/" if argument.startswith("/") else "."))
        return None, [_of_file(folder, name, inside) or _single(argument, name, inside)]
    if what == "folder":
        folder = argument.rstrip("/") or "/"
        files = files_below(folder)
        own = {n: f for n, f in files.items() if "/" not in n}
        if any(n in own for n in KNOWN_FILES):
            return None, _of_folder(folder, own)
        return folder, [u for at, inside in _by_folder(files).items() for u in _of_folder(_join(folder, at), inside)]
    if not re.search(r"[*?\[]", argument):
        raise UsageError(f"{argument} does not exist")
    fixed, pattern = _split(argument)
    return fixed, _matching(fixed, pattern)


def _matching(fixed: str, pattern: str) -> list[Unit]:
    files = files_below(fixed)
    wanted = re.compile(_regex(pattern.rstrip("/")))
    folders_only = pattern.endswith("/")
    units: list[Unit] = []
    for at, inside in _by_folder(files).items():
        if wanted.fullmatch(at) or (not at and pattern.strip("/") == "**"):
            units += _of_folder(_join(fixed, at), inside)
        elif not folders_only:
            found = (_of_file(_join(fixed, at), n, inside) for n in inside if wanted.fullmatch(f"{at}/{n}".lstrip("/")))
            units += [u for u in found if u is not None]
    return list({u.input: u for u in units}.values())


def _by_folder(files: Mapping[str, File]) -> dict[str, dict[str, File]]:
    folders: dict[str, dict[str, File]] = {}
    for path, file in files.items():
        at, _, name = path.rpartition("/")
        folders.setdefault(at, {})[name] = file
    return folders


def _of_folder(folder: str, inside: Mapping[str, File]) -> list[Unit]:
    """Return the adapters that lie directly in a folder: the folder itself, or each loose file."""
    picked = next((n for n in KNOWN_FILES if n in inside), None)
    if picked is not None:
        return [Unit(folder, True, {n: inside[n] for n in (picked, _CONFIG) if n in inside})]
    return [_single(_join(folder, n), n, inside) for n in inside if could_be_adapter(n)]


def _of_file(folder: str, name: str, inside: Mapping[str, File]) -> Unit | None:
    """Return the adapter that a file is, the folder where it is that folder's; None for what lies beside adapters."""
    picked = next((n for n in KNOWN_FILES if n in inside), None)
    if picked is not None:
        return _of_folder(folder, inside)[0] if name == picked else None
    return _single(_join(folder, name), name, inside) if could_be_adapter(name) else None


def _single(path: str, name: str, inside: Mapping[str, File]) -> Unit:
    beside = (_CONFIG,) if name.endswith("_adapters.safetensors") and _CONFIG in inside else ()
    return Unit(path, False, {n: inside[n] for n in (name, *beside)})


def _split(pattern: str) -> tuple[str, str]:
    """Return the folder before the first wildcard, and the rest."""
    head = re.split(r"[*?\[]", pattern, maxsplit=1)[0]
    fixed = head[: head.rfind("/") + 1]
    return (fixed.rstrip("/") or ("/" if fixed else "."), pattern[len(fixed) :])


def _regex(pattern: str) -> str:
    """Return a glob on relative paths as a regular expression; ** is any number of folders, also none."""
    plain = {"**/": "(?:[^/]+/)*", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.findall(r"\*\*/|\*\*|\*|\?|\[!?\]?[^]/]*\]|.", pattern)
    return "".join(plain.get(p) or (p.replace("[!", "[^", 1) if len(p) > 1 else re.escape(p)) for p in parts)


def _join(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}" if name and folder not in ("", ".") else name or folder


def _parent(path: str) -> str:
    whole = path.rstrip("/") if is_url(path) else _absolute(path)
    return whole.rsplit("/", 1)[0] or "/"


def _absolute(path: str) -> str:
    return path.rstrip("/") if is_url(path) else os.path.realpath(path)


def _common(folders: Sequence[str]) -> str:
    if len({f.split("://", 1)[0] if is_url(f) else "" for f in folders}) > 1:
        raise UsageError("inputs are in several stores, which have no common parent", hint="run one batch for each")
    same = [p[0] for p in takewhile(lambda p: len(set(p)) == 1, zip(*(f.split("/") for f in folders), strict=False))]
    return "/".join(same) or "/"


def _relative(path: str, root: str) -> str:
    whole, below = (path.rstrip("/"), root.rstrip("/")) if is_url(path) else (os.path.abspath(path),
                                                                             os.path.abspath(root))
    if whole == below:
        return whole.rsplit("/", 1)[-1]
    if not whole.startswith(below.rstrip("/") + "/"):
        real = (os.path.realpath(path), os.path.realpath(root))
        if is_url(path) or not real[0].startswith(real[1].rstrip("/") + "/"):
            raise UsageError(f"{path} is not below {root}", hint="--root names a folder that holds every input")
        whole, below = real
    return whole[len(below.rstrip("/")) + 1 :]


def _distinct(units: list[Unit]) -> list[Unit]:
    """Return the units with the suffix taken off the names of files, unless that would make two of them one.

    A unit inside the folder of another (checkpoints of a run) is named beside it: run/step-5 becomes run-step-5.
    """
    folders = {u.name for u in units if u.folder}
    stems = Counter(u.name if u.folder else _stem(u.name) for u in units)
    out: dict[str, Unit] = {}
    for unit in units:
        name = unit.name if unit.folder or stems[_stem(unit.name)] > 1 else _stem(unit.name)
        parts = name.split("/")
        outer = next((i for i in range(len(parts) - 1, 0, -1) if "/".join(parts[:i]) in folders), 0)
        while outer:
            parts[outer - 1 : outer + 1] = ["-".join(parts[outer - 1 : outer + 1])]
            outer = next((i for i in range(len(parts) - 1, 0, -1) if "/".join(parts[:i]) in folders), 0)
        name = "/".join(parts)
        if name in out:
            raise UsageError(f"{unit.input} and {out[name].input} would both be written to {name}",
                             hint="--root names a folder that holds every input, below which paths differ")
        out[name] = replace(unit, name=name)
    return list(out.values())


def _stem(name: str) -> str:
    return re.sub(r"(\.adaptc)?\.[^./]+$", "", name)
