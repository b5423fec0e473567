"""For mkdocs: docstrings are plain text with formulas, so what Markdown would take for markup is escaped."""

from __future__ import annotations

import re
from typing import Any

from griffe import Docstring, Extension, Object

_CODE = re.compile(r"(`+[^`]*`+)")


class PlainDocstrings(Extension):
    """Escape brackets, stars, underscores, bars and angles in docstrings, outside code and indented examples."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Escape the docstring of one module, class, function or attribute."""
        if isinstance(obj.docstring, Docstring):
            obj.docstring.value = "\n".join(map(_line, obj.docstring.value.split("\n")))


def _line(line: str) -> str:
    if line.startswith("    "):
        return line
    parts = _CODE.split(line)
    return "".join(p if i % 2 else re.sub(r"([][*_|<>\\])", r"\\\1", p) for i, p in enumerate(parts))
