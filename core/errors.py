"""What adaptc says when it cannot do something: one base class, one clause a message."""

from __future__ import annotations


class AdaptcError(Exception):
    """A fact about the user's data that stops the work.

    The message is one clause, lower case, subject first, numbers in it. The command line adds the path and prints the
    hint once, at the outermost frame. `exit_code` is 1 for data and 2 for usage.
    """

    exit_code = 1
    path: str | None = None  # the input it is about, set by the command line

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(one_line(message))
        self.hint = hint and one_line(hint)


def one_line(text: str, limit: int = 1500) -> str:
    """Return text as one printable line: control characters out of files escaped, cut at `limit` characters."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[: limit + 1])
    return text if len(text) <= limit else text[:limit] + "..."


class FormatError(AdaptcError):
    """The bytes are not what their format promises: truncated, overlapping, half a pair, non-finite."""


class UnsupportedError(AdaptcError):
    """The input is recognised by name, and adaptc refuses it with the reason."""


class NeedsError(AdaptcError):
    """Something outside the adapter is missing: base weights, a scale, calibration statistics."""


class LossError(AdaptcError):
    """Writing would lose something the adapter holds; `losses` lists it."""

    def __init__(self, message: str, losses: tuple[str, ...], *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.losses = losses


class UsageError(AdaptcError):
    """The request itself makes no sense: rank 0, an unknown pass, an output that would overwrite the input."""

    exit_code = 2
