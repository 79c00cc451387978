"""Files that are written whole or not at all, so that who reads one, or is killed, never has half of it."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from pathlib import Path

import torch


@contextlib.contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """A path beside ``path`` to write to; what is there in the end becomes ``path``, and is removed after an error.

    Each has a name of its own: of several processes that write the same file, the last one's is kept, whole.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def save_whole(state: dict, path: str | Path) -> None:
    """``torch.save``, whole or not at all."""
    with whole(path) as part:
        torch.save(state, part)
