"""Small files that would become large in memory, for the tests and `benchmarks/hostile.py`."""

import struct

from lorapack.core.checked import MOST
from lorapack.read.files import LARGEST_JSON


def headed(header: bytes) -> bytes:
    """A safetensors file without data."""
    return struct.pack("<Q", len(header)) + header


def wide(size: int) -> bytes:
    return b'{"a":[' + b"[]," * (size // 3 - 4) + b"[]]}"


def many_keys(size: int) -> bytes:
    return b"{" + b",".join(b'"%d":0' % n for n in range(size // 11)) + b"}"


def many_tensors(count: int) -> bytes:
    one = '"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return headed(("{" + ",".join(one % n for n in range(count)) + "}").encode())


HEADERS = {
    "2^60 numbers in one tensor": lambda: headed(
        b'{"x":{"dtype":"F32","shape":[1073741824,1073741824],"data_offsets":[0,4611686018427387904]}}'
    ),
    "10^7 tensors": lambda: many_tensors(10**7),
    "a header longer than any model's": lambda: many_tensors(2 * LARGEST_JSON // 50),
    "as many tensors as a header may have": lambda: many_tensors(LARGEST_JSON // 60),
    "a header of empty lists": lambda: headed(wide(LARGEST_JSON)),
}
TEXTS = {
    "a file of empty lists": lambda: wide(LARGEST_JSON),
    "a file of many keys": lambda: many_keys(LARGEST_JSON),
    "a file of zeros in a list of choices": lambda: b'{"choices":[' + b"0," * (LARGEST_JSON // 2 - 20) + b"0]}",
    "as many wrong choices as are looked at": lambda: b'{"choices":[' + b"0," * (MOST - 10) + b"0]}",
    "as many unknown keys as are looked at": lambda: many_keys(11 * (MOST - 10)),
    "lists in lists in lists": lambda: b'{"a":' + b"[" * (LARGEST_JSON // 2) + b"}",
    "a number without end": lambda: b'{"a":' + b"9" * (LARGEST_JSON - 10) + b"}",
}
