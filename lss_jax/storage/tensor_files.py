"""Headers of safetensors files that are written piece by piece; the library writes arrays that are all in memory.

Source: the format's description in its README (https://github.com/huggingface/safetensors).
"""

import json
import math
from collections.abc import Mapping

import ml_dtypes
import numpy as np

LENGTH_BYTES = 8  # of the header's length, with which a file begins
DTYPES: dict[str, np.dtype] = {  # by their codes
    "U8": np.dtype("<u1"),
    "U16": np.dtype("<u2"),
    "U32": np.dtype("<u4"),
    "I64": np.dtype("<i8"),
    "F32": np.dtype("<f4"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}


def header_of(arrays: Mapping[str, tuple[np.dtype, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """What a file begins with, before its arrays (dtype and shape, by name) one after the other, in this order."""
    entries: dict[str, object] = {"__metadata__": metadata}
    offset = 0
    for name, (dtype, shape) in arrays.items():
        start, offset = offset, offset + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": CODES[dtype], "shape": shape, "data_offsets": [start, offset]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % LENGTH_BYTES)
    return len(header).to_bytes(LENGTH_BYTES, "little") + header
