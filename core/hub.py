"""Folders of the Hugging Face Hub, by id, through the cache of huggingface_hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from adaptc.errors import UsageError


def is_hub_id(name: str, suffixes: Sequence[str] = ()) -> bool:
    """Return whether `name` could be "owner/model", and no path or file with one of `suffixes`."""
    parts = name.split("/")
    return not (len(parts) != 2 or not all(parts) or name.startswith((".", "~")) or ".." in parts
                or name.endswith(tuple(suffixes)))


def fetch(name: str, patterns: Sequence[str]) -> Path:
    """Return the local folder of Hub repository `name` with its files that fit `patterns`, fetched where not cached.

    Raises UsageError where huggingface_hub is not installed or the repository cannot be had.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as e:
        raise UsageError(f"{name} does not exist here, and Hub ids need huggingface_hub",
                         hint="pip install 'adaptc[hub]'") from e
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as e:  # the library raises a dozen types for offline, missing and forbidden
        raise UsageError(f"{name} does not exist here and could not be fetched from the Hub: {type(e).__name__}",
                         hint="check the name and the connection; gated repositories need `hf auth login`") from e
