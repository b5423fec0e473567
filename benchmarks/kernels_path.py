"""Make `import adaptc` work from a checkout that is not installed: a folder of links with the installed layout.

Import `kernels_check` first, then call `hide_scripts`: bitsandbytes and transformers look for a package named `kernels`
and would find the script of that name in this folder.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from pathlib import Path

try:
    import tomllib
except ImportError:
    import tomli as tomllib

if importlib.util.find_spec("adaptc") is None:
    root, made = Path(__file__).resolve().parents[1], Path(tempfile.mkdtemp()) / "adaptc"
    made.mkdir()
    for entry in (root / "core").iterdir():
        (made / entry.name).symlink_to(entry)
    for name in ("squeeze", "quant", "prune", "kernels", "formats", "evidence", "cli"):
        (made / name).symlink_to(root / name)
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    info = made.parent / "adaptc-0.dist-info"  # codecs and passes are found as entry points
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: adaptc\nVersion: 0\n")
    (info / "entry_points.txt").write_text("".join(
        f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in points.items())
        for group, points in project["entry-points"].items()))
    sys.path.insert(0, str(made.parent))


def hide_scripts() -> None:
    """Take this folder off the module path."""
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [entry for entry in sys.path if entry and str(Path(entry).resolve()) != here]
