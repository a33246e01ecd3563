"""Hashes of coordinates: the same numbers on every mesh, and on the host."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def hashed(key: jax.Array | int, *coordinates: int | jax.Array) -> jax.Array:
    """A hash of the coordinates, uint32, of their broadcast shape."""
    for coordinate in coordinates:
        key = mixed(key ^ mixed(coordinate))
    return jnp.asarray(key)


def mixed(x: Any) -> jax.Array:
    """Mixes 32 bits: each bit of the input changes each bit of the output with probability one half.

    Source: the finalizer of MurmurHash3 (Appleby 2011), after adding the golden ratio so that zero moves too.
    """
    return _mixed(jnp.asarray(x).astype(jnp.uint32))


def hashed_on_host(key: int, *coordinates: Any) -> np.ndarray:
    """The same numbers as `hashed`, by NumPy."""
    found = np.asarray(key, np.uint32)
    with np.errstate(over="ignore"):  # sums and products are modulo 2**32
        for coordinate in coordinates:
            found = _mixed(found ^ _mixed(np.asarray(coordinate).astype(np.uint32)))
    return found


def _mixed(x: Any) -> Any:
    x = x + np.uint32(0x9E3779B9)
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
