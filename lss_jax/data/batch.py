"""A batch of windows: its arrays, their specs and shapes."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from lss_jax.parallel.layout import Layout
from lss_jax.parallel.mesh import DATA, SEQ, shardings

IGNORED = -1  # a target that does not count


class Batch(NamedTuple):
    """Global int32 arrays, or their specs, shardings or shapes; `L` is padded, and in layout order.

    `targets_BL` holds the next byte of each token, across segment borders too.
    """

    tokens_BL: Any
    targets_BL: Any
    positions_L: Any  # natural
    row_B: Any
    documents_2BL: Any  # where in the window each token's document starts and ends; None if all are one


def batch_specs(packed: bool) -> Batch:
    """How a batch is cut; `packed`: with documents.

    A model group has its segment whole: masks and a vocabulary in shares need all of it, and tokens are few bytes.
    """
    whole = P(DATA, SEQ)
    return Batch(whole, whole, P(SEQ), P(DATA), P(None, DATA, SEQ) if packed else None)


def batch_like(batch_size: int, seq_len: int, mesh: Mesh, layout: Layout, packed: bool) -> Batch:
    """Shapes and shardings of a batch, to compile a step before there is data."""
    B, L = batch_size, layout.padded(seq_len)
    shapes = Batch((B, L), (B, L), (L,), (B,), (2, B, L) if packed else None)
    placed = shardings(batch_specs(packed), mesh)
    return Batch(*(s and jax.ShapeDtypeStruct(s, np.int32, sharding=p) for s, p in zip(shapes, placed, strict=True)))
