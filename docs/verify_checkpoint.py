"""Verify a checkpoint with h5py and numpy alone: python verify_checkpoint.py FILE.

Exit status 0 where the file is good, 1 where it is damaged. The format is in checkpoint-format.md.
"""

import hashlib
import struct
import sys
import zlib

import h5py
import numpy as np

FILE_ATTRIBUTES = ("format", "format_version", "created", "digest")


def block(raw):
    """The first 512 bytes that belong to a file with these bytes."""
    text = f"hpc-absa checkpoint\ncrc32 {zlib.crc32(raw[512:]):08x}\nbytes {len(raw)}\n"
    return text.encode().ljust(512, b"\0")


def scalar(value):
    """Kind and bytes of an attribute."""
    if isinstance(value, (bool, np.bool_)):
        return "bool", struct.pack("<?", value)
    if isinstance(value, (int, np.integer)):
        return "int", struct.pack("<q", value)
    if isinstance(value, (float, np.floating)):
        return "float", struct.pack("<d", value)
    return "str", value.encode()


def records(file):
    """Path, kind and bytes of everything that the digest covers, in its order."""
    for key in sorted(set(file.attrs) - set(FILE_ATTRIBUTES)):
        yield f"/@{key}", *scalar(file.attrs[key])
    for name in sorted(file):
        yield f"/{name}", "group", b""
        for key in sorted(file[name].attrs):
            yield f"/{name}@{key}", *scalar(file[name].attrs[key])
        arrays = {}
        file[name].visititems(lambda key, item, found=arrays: found.update({key: item}))
        for key in sorted(key for key, item in arrays.items() if isinstance(item, h5py.Dataset)):
            array = np.asarray(arrays[key][()])
            yield f"/{name}/{key}", f"array {array.dtype.str} {list(array.shape)}", array.tobytes()


def main(path):
    """Print the verdict; returns the exit status."""
    with open(path, "rb") as opened:
        raw = opened.read()
    if raw[:512] != block(raw):
        print(f"{path}: damaged: its bytes do not match their checksum")
        return 1
    hasher = hashlib.sha256()
    with h5py.File(path, "r") as file:
        for record in records(file):
            for part in record:
                data = part.encode() if isinstance(part, str) else part
                hasher.update(struct.pack("<Q", len(data)) + data)
        wanted = file.attrs["digest"]
    good = wanted == f"sha256:{hasher.hexdigest()}"
    print(f"{path}: {'good' if good else 'damaged: its content does not match its digest'}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
