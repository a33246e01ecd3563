"""A batch of windows of tokens: its arrays, their specs and their shapes."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from lss_jax.parallel.layout import Layout
from lss_jax.parallel.mesh import DATA, SEQ, shardings

IGNORED = -1  # a target that does not count


class Batch(NamedTuple):
    """The arrays of a batch, all int32; or, in the same fields, their specs, shardings or shapes.

    Shapes are global, with `L` padded and in layout order; inside `shard_map` the same names hold this device's rows
    and its segment, `l`.
    """

    tokens: Any  # [B, L]; of patches of images [P, B, L], the grey levels of their pixels
    targets: Any  # as tokens: the next token of each, across segment borders too, or a label; or `IGNORED`
    positions: Any  # [L], natural
    rows: Any  # [B], the number of each sequence in the global batch
    documents: Any  # [2, B, L], where in the window each token's document starts and ends; None if all are one
    target_bytes: Any  # [B, L], bytes of text that each target stands for; None if each is one byte


def batch_specs(*, packed: bool, encoded: bool = False, patched: bool = False) -> Batch:
    """The specs of a batch; `packed` adds those of `documents`, `encoded` those of `target_bytes`.

    With `patched`, tokens and targets have pixels on a first axis.

    Nothing is sharded over `model`: masks and a sharded vocabulary need the whole segment, and tokens are few bytes.
    """
    whole = P(DATA, SEQ)
    documents, target_bytes = P(None, DATA, SEQ) if packed else None, whole if encoded else None
    tokens = P(None, *whole) if patched else whole
    return Batch(tokens, tokens, P(SEQ), P(DATA), documents, target_bytes)


def batch_like(
    batch_size: int,
    seq_len: int,
    mesh: Mesh | AbstractMesh,
    layout: Layout,
    *,
    packed: bool,
    encoded: bool = False,
    patch_pixels: int = 0,
) -> Batch:
    """Global shapes and shardings of a batch, to compile a step before there is data.

    `patch_pixels` are those of a token of an image, 0 where tokens are numbers.
    """
    B, L = batch_size, layout.padded(seq_len)
    tokens = (patch_pixels, B, L) if patch_pixels else (B, L)
    shapes = Batch(tokens, tokens, (L,), (B,), (2, B, L) if packed else None, (B, L) if encoded else None)
    placed = shardings(batch_specs(packed=packed, encoded=encoded, patched=patch_pixels > 0), mesh)
    return Batch(*(s and jax.ShapeDtypeStruct(s, np.int32, sharding=p) for s, p in zip(shapes, placed, strict=True)))
