"""Writing files so that no reader sees a half-written one, also after a crash."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hpc_absa.errors import UsageError


@contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yields a temporary path beside `path`; renamed to it on success, removed on any error.

    Args:
        path: the file to create or replace.
        durable: fsync the file before the rename, and its folder after it.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        if durable:
            sync(temporary)
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.errno and error.filename is None:
            error.filename = str(path)  # a write to a full disk does not name its file
        raise
    if durable:
        sync(path.parent)


def write_atomic(path: Path, content: str | bytes, *, durable: bool = False) -> None:
    """Write `content` to `path`, complete or not at all."""
    with replacing(path, durable=durable) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


MARK = b"hpc-absa"
"""In the first or last bytes of every result file of ours that a later result may replace."""
ENDS = 1 << 16
"""Bytes at each end of a file in which the mark is searched; PDF has it at the end."""


def require_replaceable(path: Path, option: str = "--out", mark: bytes = MARK) -> None:
    """Refuse to replace a file that is not a result of ours, and to write where no folder is.

    Args:
        path: the file to be written.
        option: names the place, for the error.
        mark: what files of ours have.

    Raises:
        UsageError: there is such a file, or no folder.
    """
    if not path.parent.is_dir():
        raise UsageError(f"{path}: no folder {path.parent} to write to; make it first")
    try:
        with path.open("rb") as file:
            ours = mark in file.read(ENDS)
            file.seek(max(0, path.stat().st_size - ENDS))
            ours = ours or mark in file.read(ENDS)
    except FileNotFoundError:
        return
    except OSError:
        ours = False
    if not ours:
        raise UsageError(f"{path}: exists and is not of hpc-absa; choose another {option}")


def create_once(path: Path, content: str) -> bool:
    """Write `content` to `path` unless it exists; whether it was this call that created it.

    Of several processes, also on several hosts, exactly one succeeds: a hard link is atomic.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.write_text(content, encoding="utf-8")
        sync(temporary)
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


def sync(path: Path) -> None:
    """fsync a file, or a folder's renames; not every file system can sync a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)
