"""One checkpoint as one HDF5 file: the only module here that imports h5py."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hpc_absa.checkpoint.schema import FORMAT, FORMAT_VERSION, Content, Group, Scalar
from hpc_absa.errors import CheckpointError

RESERVED = ("format", "format_version", "created", "digest")
"""Root attributes that describe the file, not the content; the digest leaves them out."""


class NotACheckpointError(CheckpointError):
    """The path is no checkpoint of ours, good or damaged."""


def write(path: Path, content: Content) -> int:
    """Publish `content` at `path`, whole or not at all; returns the bytes written.

    Temporary file in the same folder, flush, fsync, rename, fsync of the folder: after a crash at any
    moment `path` is absent, the former file, or this one complete.

    Raises:
        CheckpointError: names path and cause (full disk, no permission, ...); nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with h5py.File(temporary, "w", locking=False) as file:
            _fill(file, content)
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            size = os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"{path}: cannot be written: {_cause(path, error)}") from None
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return size


def read(path: Path) -> Content:
    """The content of the checkpoint at `path`, verified against its digest.

    Raises:
        NotACheckpointError: no such file, not HDF5, or HDF5 of another program.
        CheckpointError: damaged, or written by a newer version.
    """
    with _opened(path) as file:
        version = int(file.attrs.get("format_version", 0))
        if version > FORMAT_VERSION:
            raise CheckpointError(
                f"{path}: format version {version}, expected at most {FORMAT_VERSION}: "
                "it was written by a newer hpc-absa; install that one to read it"
            )
        try:
            digest = str(file.attrs["digest"])
            content = _content(file)
        except (KeyError, OSError, RuntimeError, ValueError, TypeError) as error:
            raise CheckpointError(f"{path}: damaged: {error}") from None
    found = content.digest()
    if found != digest:
        raise CheckpointError(f"{path}: damaged: its content has digest {found}, not {digest}")
    return content


def verify(path: Path) -> None:
    """Raise what `read` raises; the content itself is not kept."""
    read(path)


@contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    if not path.is_file():
        raise NotACheckpointError(f"{path}: no such file")
    try:
        file = h5py.File(path, "r", locking=False)
    except OSError as error:
        if _has_signature(path):
            raise CheckpointError(f"{path}: damaged: {error}") from None
        raise NotACheckpointError(f"{path}: not an HDF5 file") from None
    with file:
        try:
            name = file.attrs.get("format")
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"{path}: damaged: {error}") from None
        if name != FORMAT:
            raise NotACheckpointError(
                f"{path}: an HDF5 file of format {name!r}, expected {FORMAT!r}"
            )
        yield file


def _has_signature(path: Path) -> bool:
    """A file that HDF5 cannot open though it begins as one, or is named as one, is damaged."""
    with path.open("rb") as file:
        return file.read(8) == b"\x89HDF\r\n\x1a\n" or path.suffix == ".h5"


def _fill(file: h5py.File, content: Content) -> None:
    file.attrs.update(
        format=FORMAT, format_version=FORMAT_VERSION, created=time.time(), digest=content.digest()
    )
    file.attrs.update(content.attributes)
    for name, group in content.groups.items():
        target = file.create_group(name)
        target.attrs.update(group.attributes)
        for key, array in group.arrays.items():
            target.create_dataset(key, data=array)


def _content(file: h5py.File) -> Content:
    attributes = {k: v for k, v in _attributes(file).items() if k not in RESERVED}
    return Content(attributes, {name: _group(file[name]) for name in file})


def _group(group: h5py.Group) -> Group:
    return Group(_attributes(group), {name: np.asarray(group[name][()]) for name in group})


def _attributes(place: Any) -> dict[str, Scalar]:
    """Attributes as Python scalars: HDF5 gives numpy's."""
    return {
        key: value.item() if isinstance(value, np.generic) else str(value)
        for key, value in place.attrs.items()
    }


def _sync_folder(folder: Path) -> None:
    """Make a rename durable; a file system that cannot sync a folder loses no more than the name."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def _cause(path: Path, error: BaseException) -> str:
    """HDF5 buries a full disk in a stack of its own; say what a person can act on."""
    text = str(error)
    if "No space left" in text or "errno = 28" in text:
        free = os.statvfs(path.parent).f_bavail * os.statvfs(path.parent).f_frsize
        return f"no space left on the device ({free / 1e6:.0f} MB free)"
    return text.splitlines()[0] if text else type(error).__name__
