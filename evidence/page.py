"""One HTML page that needs nothing else: no script, no network, light and dark, readable on a phone."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2127; --dim: #5d6772; --paper: #fff; --sheet: #f5f6f8; --rule: #d9dde2;
  --bad: #b3261e; --s0: #2563a8; --s1: #c05a12; --s2: #23805a; --s3: #8a4fb0; --s4: #a8823b; --s5: #b23a6b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e5e9ee; --dim: #98a3ae; --paper: #15181c; --sheet: #1e2227;
  --rule: #343a42; --bad: #f2857c; --s0: #6ba6e8; --s1: #f0935a; --s2: #5fc294; --s3: #c39ae0; --s4: #d8b56c;
  --s5: #ec86ad; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: .2rem 0 .6rem; } h2 { font-size: 1.2rem; margin: 2rem 0 .4rem; padding-top: .6rem;
  border-top: 2px solid var(--rule); } h3 { font-size: 1rem; margin: 1rem 0 .4rem; } figure h3 { margin-top: 0; }
p { margin: .4rem 0; max-width: 44rem; } .dim, caption, summary { color: var(--dim); }
.charts { display: grid; margin: 1rem 0;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1rem; }
figure { margin: 0; padding: .8rem; background: var(--sheet); border-radius: 8px; min-width: 0; }
figcaption { color: var(--dim); font-size: .9rem; margin: .3rem 0; }
svg { width: 100%; max-width: 520px; height: auto; display: block; }
svg text { font: 11px system-ui, sans-serif; fill: var(--ink); } svg text.dim { fill: var(--dim); }
svg .end { text-anchor: end; } svg .mid { text-anchor: middle; }
svg .grid { stroke: var(--rule); stroke-width: 1; } svg .line { fill: none; stroke-width: 2; }
.c0 { fill: var(--s0); } .c1 { fill: var(--s1); } .c2 { fill: var(--s2); } .c3 { fill: var(--s3); }
.c4 { fill: var(--s4); } .c5 { fill: var(--s5); } .s0 { stroke: var(--s0); } .s1 { stroke: var(--s1); }
.s2 { stroke: var(--s2); } .s3 { stroke: var(--s3); } .s4 { stroke: var(--s4); } .s5 { stroke: var(--s5); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .2rem .7rem .2rem 0; border-bottom: 1px solid var(--rule); vertical-align: top;
  overflow-wrap: normal; } th { font-weight: 600; } td.n, th.n { text-align: right; white-space: nowrap; }
td:first-child { overflow-wrap: anywhere; min-width: 8rem; }
ul.bad { color: var(--bad); padding-left: 1.2rem; } details { margin-top: .4rem; }
"""


def page(title: str, lead: str, sections: Sequence[str]) -> str:
    """Return a whole document; `title` and `lead` are plain text, sections are HTML made here."""
    # The policy keeps even a mistake in this file from loading or running anything.
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; style-src \'unsafe-inline\'; '
            'img-src data:">\n<link rel="icon" href="data:,">\n'
            f"<style>{_STYLE}</style></head>\n<body>\n<h1>{escape(title)}</h1>\n<p>{escape(lead)}</p>\n"
            + "\n".join(s for s in sections if s) + "\n</body></html>\n")


def section(title: str, *parts: str) -> str:
    """Return a titled section of HTML parts."""
    return f"<section><h2>{escape(title)}</h2>\n" + "\n".join(p for p in parts if p) + "\n</section>"


def figure(title: str, caption: str, svg: str, data: str) -> str:
    """Return a chart with the table of its data folded in below; nothing where there is no chart."""
    if not svg:
        return ""
    return (f"<figure><h3>{escape(title)}</h3>{svg}<figcaption>{escape(caption)}</figcaption>"
            f"<details><summary>data</summary>{data}</details></figure>")


def charts(*figures: str) -> str:
    """Return figures side by side where there is room."""
    some = [f for f in figures if f]
    return f'<div class="charts">{"".join(some)}</div>' if some else ""


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table that scrolls in its own box; a title that starts with ">" is set to the right. Text is escaped."""
    if not rows:
        return ""
    right = [c.startswith(">") for c in columns]
    head = "".join(f"<th{_n(r)}>{escape(c.lstrip('>'))}</th>" for c, r in zip(columns, right, strict=True))
    body = "".join("<tr>" + "".join(f"<td{_n(r)}>{escape(v)}</td>" for v, r in zip(row, right, strict=True)) + "</tr>"
                   for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def paragraph(text: str) -> str:
    """Return plain text as a paragraph."""
    return f"<p>{escape(text)}</p>" if text else ""


def warnings(lines: Sequence[str]) -> str:
    """Return what needs the reader's attention as a list."""
    return f'<ul class="bad">{"".join(f"<li>{escape(line)}</li>" for line in lines)}</ul>' if lines else ""


def _n(right: bool) -> str:
    return ' class="n"' if right else ""
