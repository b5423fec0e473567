"""Pages: links between them lead somewhere, and the site's navigation has all of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md")])
_LINK = re.compile(r"(?<!\\)\]\((?!https?://|mailto:)([^)#\s]*)(#[^)\s]+)?\)")


def links(page: Path) -> list[tuple[str, str]]:
    """Return targets and anchors of a page's relative links, those in code left out."""
    text = re.sub(r"^(```|~~~).*?^\1", "", page.read_text("utf-8"), flags=re.M | re.S)
    return [(m[1], m[2] or "") for m in _LINK.finditer(re.sub(r"`[^`\n]*`", "", text))]


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and mkdocs make them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), flags=re.M)
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)|`", r"\1", t).lower() for t in titles)
    return {"#" + re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", t)).strip("-") for t in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    for target, anchor in links(page):
        there = (page.parent / target).resolve() if target else page
        assert there.exists(), f"{target} is not there"
        assert not anchor or anchor in anchors(there), f"{target}{anchor} is not there"


def test_the_readme_has_links_to_check() -> None:
    assert len(links(ROOT / "README.md")) > 5


def test_every_page_is_in_the_navigation_and_the_other_way_round() -> None:
    nav = (ROOT / "mkdocs.yml").read_text("utf-8").partition("\nnav:\n")[2]
    named = re.findall(r": (\S+\.md)$", nav, flags=re.M)
    assert len(named) == len(set(named))
    assert set(named) == {str(p.relative_to(ROOT / "docs")) for p in ROOT.glob("docs/**/*.md")}
