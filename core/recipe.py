"""Recipes: passes written down in a TOML file, or in one line; read as a Pipeline."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptc.errors import AdaptcError, FormatError, UsageError
from adaptc.passes import Context, located
from adaptc.pipeline import Pipeline
from adaptc.spec import build, parse

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from adaptc.adapter import Adapter


def run(adapter: Adapter | Sequence[Adapter], recipe: str | Path, *, base: str | Path | None = None, jobs: int = 0,
        device: str = "cpu") -> Adapter:
    """Return `adapter` after every pass of `recipe`: a spec ("truncate{rank=8}") or the path of a TOML file.

    Several adapters are taken where the first step joins them ("merge{method=ties},truncate{rank=8}"). Byte budgets
    count the file that the adapter's own dialect would write.
    """
    from adaptc.base import Base
    from adaptc.formats import size_of

    ctx = Context(base=Base(Path(base)) if base else None, jobs=jobs, device=device, size_of=size_of)
    return read_recipe(recipe)(adapter, ctx).adapter


def read_recipe(recipe: str | Path) -> Pipeline:
    """Return the passes of a spec, or of a TOML file where `recipe` is a path that ends in .toml.

    Raises UsageError for unknown passes and options, FormatError for a file that is no recipe.
    """
    if isinstance(recipe, Path) or recipe.endswith(".toml"):
        return _from_toml(Path(recipe))
    return Pipeline(parse(recipe))


def _from_toml(path: Path) -> Pipeline:
    try:
        document: dict[str, Any] = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError as e:
        raise UsageError(f"recipe {path} does not exist") from e
    except OSError as e:
        raise AdaptcError(f"{path}: {e.strerror or e}") from e
    except ValueError as e:  # bad UTF-8 and bad TOML
        raise FormatError(f"{path}: not TOML: {str(e).splitlines()[0]}") from e
    extra = sorted(set(document) - {"step"})
    steps = document.get("step")
    if extra:
        raise FormatError(f"{path}: {extra[0]} is not part of a recipe", hint="a recipe is a list of [[step]] tables")
    if not isinstance(steps, list) or not steps or not all(isinstance(s, dict) for s in steps):
        raise FormatError(f"{path}: recipe has no [[step]]", hint='[[step]] with pass = "truncate" and its options')
    passes = []
    for number, step in enumerate(steps, 1):
        options = dict(step)
        name = options.pop("pass", None)
        if not isinstance(name, str):
            raise FormatError(f"{path}: step {number} has no pass", hint='pass = "truncate"')
        try:
            passes.append(build(name, options))
        except AdaptcError as e:
            raise located(e, f"{path}: step {number}: {e}") from e
    return Pipeline(tuple(passes))
