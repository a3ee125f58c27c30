"""Verify a checkpoint and its shards with h5py and xxhash: python verify_checkpoint.py FILE.

Exit status: 0 good, 1 damaged. The format is in checkpoint-format.md.
"""

import hashlib
import pathlib
import struct
import sys
import zlib

import h5py
import numpy as np
import xxhash

HASHES = {"xxh3-128": xxhash.xxh3_128, "sha256": hashlib.sha256}
KINDS = (("bool", np.bool_, "<?"), ("int", np.integer, "<q"), ("float", np.floating, "<d"))


def block(raw):
    """The first block that a file with these bytes must have."""
    fields = raw[:60].split() + [b"0"] * 4
    size, chunk = int(fields[3]) if fields[3].isdigit() else 0, 1 << 22
    sums = " ".join(f"{zlib.crc32(raw[i : i + chunk]):08x}" for i in range(size, len(raw), chunk))
    text = f"hpc-absa checkpoint\nblock {size}\nbytes {len(raw)}\ncrc32 of each {chunk}\n{sums}\n"
    return text.encode().ljust(size, b"\0")


def scalars(path, attributes, leave_out=()):
    """A record for each attribute: its path, kind and bytes."""
    for key, value in sorted(attributes.items()):
        kinds = [
            (kind, struct.pack(code, value)) for kind, of, code in KINDS if isinstance(value, of)
        ]
        if key not in leave_out:
            yield f"{path}@{key}", *(kinds[0] if kinds else ("str", value.encode()))


def arrays(group, prefix=""):
    """Names and arrays of a group; h5py follows the links into the shards."""
    for name, item in group.items():
        inside = isinstance(item, h5py.Group)
        yield from arrays(item, f"{prefix}{name}/") if inside else [(prefix + name, item[()])]


def records(file, hashed):
    """Path, kind and bytes of everything that the digest covers, in its order."""
    yield from scalars("/", file.attrs, ("format", "format_version", "created", "digest"))
    for name in sorted(set(file) - {"shards"}):
        yield f"/{name}", "group", b""
        yield from scalars(f"/{name}", file[name].attrs)
        for key, value in sorted(arrays(file[name]), key=lambda item: item[0]):
            array = np.asarray(value)
            kind = f"array {array.dtype.str} {list(array.shape)}"
            yield f"/{name}/{key}", kind, hashed(array.tobytes()).digest()


def damage(path, digest=None):
    """What is wrong with a file, and with its shards; None if nothing is.

    `digest` is the one that a checkpoint records for its shard.
    """
    raw = path.read_bytes() if path.is_file() else b""
    if not raw or not raw.startswith(block(raw)):
        return f"{path.name}: its bytes do not match their checksums"
    with h5py.File(path, "r") as file:
        for name, expected in file["shards"].attrs.items() if "shards" in file else ():
            if wrong := damage(path.with_name(name), expected):
                return wrong
        if "shard" in file.attrs and not digest:
            return f"{path.name}: it is a shard, no whole checkpoint"
        name, _, _ = file.attrs["digest"].partition(":")
        hashed = HASHES[name]
        hasher = hashed()
        for part in (part for record in records(file, hashed) for part in record):
            data = part.encode() if isinstance(part, str) else part
            hasher.update(struct.pack("<Q", len(data)) + data)
        computed = f"{name}:{hasher.hexdigest()}"
        good = computed == file.attrs["digest"] and computed == (digest or computed)
    return None if good else f"{path.name}: its content does not match its digest"


if __name__ == "__main__":
    wrong = damage(pathlib.Path(sys.argv[1]))
    print(f"damaged: {wrong}" if wrong else "good")
    sys.exit(1 if wrong else 0)
