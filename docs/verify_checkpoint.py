"""Verify a checkpoint with h5py and numpy alone: python verify_checkpoint.py FILE.

Exit status 0 where the file and its shards are good, 1 where one is damaged. The format is in
checkpoint-format.md.
"""

import hashlib
import pathlib
import struct
import sys
import zlib

import h5py
import numpy as np

FILE_ATTRIBUTES = ("format", "format_version", "created", "digest")


def sealed(raw):
    """Whether the first block is the one that belongs to these bytes."""
    words = raw[:60].split()
    if len(words) < 4 or not words[3].isdigit():
        return False
    size, chunk = int(words[3]), 1 << 22
    sums = [zlib.crc32(raw[at : at + chunk]) for at in range(size, len(raw), chunk)]
    text = f"hpc-absa checkpoint\nblock {size}\nbytes {len(raw)}\ncrc32 of each {chunk}\n"
    return raw[:size] == (text + " ".join(f"{s:08x}" for s in sums) + "\n").encode().ljust(
        size, b"\0"
    )


def scalar(value):
    """Kind and bytes of an attribute."""
    if isinstance(value, (bool, np.bool_)):
        return "bool", struct.pack("<?", value)
    if isinstance(value, (int, np.integer)):
        return "int", struct.pack("<q", value)
    if isinstance(value, (float, np.floating)):
        return "float", struct.pack("<d", value)
    return "str", value.encode()


def data_sets(group, prefix=""):
    """Names and data sets of a group; links lead into the shards."""
    for name in group:
        item = group[name]
        if isinstance(item, h5py.Group):
            yield from data_sets(item, f"{prefix}{name}/")
        else:
            yield prefix + name, item


def records(file):
    """Path, kind and bytes of everything that the digest covers, in its order."""
    for key in sorted(set(file.attrs) - set(FILE_ATTRIBUTES)):
        yield f"/@{key}", *scalar(file.attrs[key])
    for name in sorted(set(file) - {"shards"}):
        yield f"/{name}", "group", b""
        for key in sorted(file[name].attrs):
            yield f"/{name}@{key}", *scalar(file[name].attrs[key])
        for key, item in sorted(data_sets(file[name])):
            array = np.asarray(item[()])
            value = hashlib.sha256(array.tobytes()).digest()
            yield f"/{name}/{key}", f"array {array.dtype.str} {list(array.shape)}", value


def damage(path):
    """What is wrong with a file, None where nothing is."""
    if not path.is_file() or not sealed(path.read_bytes()):
        return "its bytes do not match their checksums"
    hasher = hashlib.sha256()
    with h5py.File(path, "r") as file:
        shards = file["shards"].attrs.items() if "shards" in file else ()
        for name, digest in shards:
            wrong = damage(path.with_name(name))
            if wrong:
                return f"shard {name}: {wrong}"
            with h5py.File(path.with_name(name), "r") as shard:
                if shard.attrs["digest"] != digest:
                    return f"shard {name}: it is another one"
        if "shard" in file.attrs and path.suffix != ".shard":
            return "it is a shard, under the name of a whole checkpoint"
        for record in records(file):
            for part in record:
                data = part.encode() if isinstance(part, str) else part
                hasher.update(struct.pack("<Q", len(data)) + data)
        good = file.attrs["digest"] == f"sha256:{hasher.hexdigest()}"
    return None if good else "its content does not match its digest"


if __name__ == "__main__":
    found = damage(pathlib.Path(sys.argv[1]))
    print(f"{sys.argv[1]}: {'damaged: ' + found if found else 'good'}")
    sys.exit(1 if found else 0)
