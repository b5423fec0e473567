"""What every target of `adaptc export` is asked."""

from __future__ import annotations

from dataclasses import dataclass

from adaptc.cli.render import Voice


@dataclass(frozen=True)
class Request:
    """The adapter, the base and the output as the user named them, and how to speak."""

    source: str
    base: str | None
    output: str | None
    alpha: float | None
    dialect: str | None
    force: bool
    voice: Voice
