"""One checkpoint as one HDF5 file: the only module here that imports h5py."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hpc_absa.checkpoint import seal
from hpc_absa.checkpoint.schema import FORMAT, FORMAT_VERSION, Content, Group, Scalar
from hpc_absa.errors import CheckpointError

RESERVED = ("format", "format_version", "created", "digest")
"""Root attributes that describe the file, not the content; the digest leaves them out."""


class NotACheckpointError(CheckpointError):
    """The path is no checkpoint of ours, good or damaged."""


def write(path: Path, content: Content) -> int:
    """Publish `content` at `path`, whole and verified or not at all; returns the bytes written.

    Temporary file in the same folder, fsync, read back, rename, fsync of the folder: after a crash
    at any moment `path` is absent, the former file, or this one complete.

    Raises:
        CheckpointError: names path and cause (full disk, no permission, ...); nothing is left.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with h5py.File(temporary, "w", locking=False, userblock_size=seal.SIZE) as file:
            _fill(file, content)
        size = seal.seal(temporary)
        verify(temporary)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if not isinstance(error, Exception):
            raise
        raise CheckpointError(f"{path}: cannot be written: {_cause(path, error)}") from None
    return size


def read(path: Path) -> Content:
    """The content of the checkpoint at `path`, verified against its checksum and its digest.

    Raises:
        NotACheckpointError: no such file, or one that does not begin as a checkpoint.
        CheckpointError: damaged, or written by a newer version.
    """
    _require_sealed(path)
    try:
        with h5py.File(path, "r", locking=False) as file:
            version = int(file.attrs["format_version"])
            digest = str(file.attrs["digest"])
            content = _content(file) if version <= FORMAT_VERSION else Content({}, {})
    # h5py has no one kind of error for what it cannot make sense of.
    except Exception as error:
        raise CheckpointError(f"{path}: damaged: {_first_line(error)}") from None
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format version {version}, expected at most {FORMAT_VERSION}: "
            "it was written by a newer hpc-absa; install that one to read it"
        )
    found = content.digest()
    if found != digest:
        raise CheckpointError(f"{path}: damaged: its content has digest {found}, not {digest}")
    return content


def verify(path: Path) -> None:
    """Raise what `read` raises; the content itself is not kept."""
    read(path)


def _require_sealed(path: Path) -> None:
    """Refuse whatever is not, byte for byte, a file that `write` has made."""
    try:
        if not path.exists():
            raise NotACheckpointError(f"{path}: no such file")
        if not path.is_file():
            raise NotACheckpointError(f"{path}: not a file")
        if seal.is_sealed(path):
            wrong = seal.broken(path)
        elif seal.is_hdf5(path):
            raise NotACheckpointError(f"{path}: an HDF5 file, but no checkpoint of {FORMAT}")
        elif path.suffix == ".h5":
            wrong = "it does not begin as a checkpoint"
        else:
            raise NotACheckpointError(f"{path}: not a checkpoint")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    if wrong:
        raise CheckpointError(f"{path}: damaged: {wrong}")


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
    groups = {name: Group(_attributes(file[name]), dict(_arrays(file[name]))) for name in file}
    return Content(attributes, groups)


def _arrays(group: h5py.Group, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """Names and arrays; HDF5 made groups of the slashes that a name had."""
    for name, item in group.items():
        if isinstance(item, h5py.Group):
            yield from _arrays(item, f"{prefix}{name}/")
        else:
            yield prefix + name, np.asarray(item[()])


def _attributes(place: Any) -> dict[str, Scalar]:
    """Attributes as Python scalars: HDF5 gives numpy's."""
    return {
        key: value.item() if isinstance(value, np.generic) else str(value)
        for key, value in place.attrs.items()
    }


def _sync_folder(folder: Path) -> None:
    """Make a rename durable; where a file system cannot sync a folder, no more than it is lost."""
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
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
