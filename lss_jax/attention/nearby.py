"""What a narrow window shows: each chunk fetches the tokens before and behind it, where LSS would gather them all.

With a window known at compile time a query sees no key farther away than its `Reach`. So every chunk of a device needs
a *run* of keys: the chunk itself between its neighbours' tokens. They come from the devices that hold them, one send
for each distance between chunks; in the backward pass their gradients go back the same ways, in float32, and are added
up where the tokens are at home. The bytes are in proportion to the window, and not to the sequence.

To a kernel each chunk is a row of the batch, and its run is all the keys there are. Rows count as in `[B, c]`, for `c`
chunks per device: `D = B c`. The letter `r` is for the tokens of a run.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from lss_jax.attention.kernels import KERNELS
from lss_jax.attention.kernels.interface import Queries, Residuals
from lss_jax.attention.mask import Intervals
from lss_jax.attention.setting import Reach, Setting
from lss_jax.attention.traffic import Traffic
from lss_jax.parallel.layout import Layout, leave
from lss_jax.parallel.residuals import COMMUNICATED


class Piece(NamedTuple):
    """A part of a run: the last tokens of the chunk at a distance before it, or the first of one behind it."""

    distance: int  # in chunks: negative before, 0 for the chunk itself
    tokens: int


class Runs(NamedTuple):
    """The runs of all chunks, which are alike but for what lies beyond the ends of the sequence: zeros."""

    axis: str | None  # None: one device has all
    layout: Layout
    chunk: int  # tokens
    pieces: tuple[Piece, ...]  # in natural order

    @property
    def before(self) -> int:
        """The tokens of a run before its own chunk."""
        return sum(piece.tokens for piece in self.pieces if piece.distance < 0)

    @property
    def length(self) -> int:
        """The tokens of a run."""
        return sum(piece.tokens for piece in self.pieces)

    def sources(self, nth: int, piece: Piece) -> dict[int, list[tuple[int, int]]]:
        """Where a piece of every device's `nth` chunk is: for the holders' first, second, ... chunk, from whom to whom.

        No device sends twice in one of these lists, or receives twice in all of them.
        """
        found: dict[int, list[tuple[int, int]]] = {}
        chunks_NC = self.layout.chunks_NC
        for device, chunk in enumerate(chunks_NC[:, nth].tolist()):
            for source, of in np.argwhere(chunks_NC == chunk + piece.distance).tolist():
                found.setdefault(of, []).append((source, device))
        return found

    def first(self, device: jax.Array | int) -> jax.Array:
        """The natural position of the first token of each run of a device, `[c]`: negative before the sequence."""
        return jnp.asarray(self.layout.chunks_NC)[device] * self.chunk - self.before


def runs_of(l: int, setting: Setting) -> Runs | None:
    """The runs of segments of `l` tokens; None if every key may be seen, or where a gather is the better way.

    That is where runs would move more than half of its bytes: it is one collective, and they take many.
    """
    if setting.axis is None or setting.reach is None:
        return None
    runs, layout = runs_within(setting.reach, l, setting), setting.key_layout
    moved = layout.chunks_per_device * (runs.length - runs.chunk)
    return runs if 2 * moved <= (layout.devices - 1) * l else None


def runs_within(reach: Reach, l: int, setting: Setting) -> Runs:
    """The runs of segments of `l` tokens whose queries see so far."""
    layout = setting.key_layout
    chunk, farthest = l // layout.chunks_per_device, layout.chunks_NC.size - 1
    before, behind = (_pieces(min(tokens, farthest * chunk), chunk) for tokens in reach)
    pieces = (
        *(Piece(-distance, tokens) for distance, tokens in before[::-1]),
        Piece(0, chunk),
        *(Piece(*piece) for piece in behind),
    )
    return Runs(setting.axis, layout, chunk, pieces)


def _pieces(reach: int, chunk: int) -> list[tuple[int, int]]:
    """The chunks within reach by their distance, the nearest first, and how many tokens of each."""
    return [(hop, min(reach - (hop - 1) * chunk, chunk)) for hop in range(1, -(-reach // chunk) + 1)]


def forward(queries: Queries, kv_2BGlK: jax.Array, setting: Setting) -> Residuals:
    """This segment's `l` queries attend to the keys of their runs; saved is `kv_12DGrK`."""
    runs, kv_12DGrK = _runs(kv_2BGlK.shape[3], setting), fetch(kv_2BGlK, setting)
    output = KERNELS[setting.kernel].forward(by_chunk(queries, runs), kv_12DGrK, setting.unsharded)
    B, l, H, K = queries.q_BlHK.shape
    lse_BlH = None if output.lse_BlH is None else output.lse_BlH.reshape(B, l, H)
    return Residuals(queries, kv_12DGrK, output._replace(o_BlHK=output.o_BlHK.reshape(B, l, H, K), lse_BlH=lse_BlH))


def backward(saved: Residuals, do_BlHK: jax.Array, setting: Setting) -> tuple[Queries, jax.Array]:
    """The gradients of this segment's queries, and of its keys and values."""
    queries, kv_12DGrK, output = saved
    runs = _runs(do_BlHK.shape[1], setting)
    chunks = by_chunk(queries, runs)
    o_DqHK, do_DqHK = (x_BlHK.reshape(chunks.q_BlHK.shape) for x_BlHK in (output.o_BlHK, do_BlHK))
    of_chunks = Residuals(chunks, kv_12DGrK, output._replace(o_BlHK=o_DqHK))
    dchunks, dkv_12DGKr = KERNELS[setting.kernel].backward(of_chunks, do_DqHK, setting.unsharded)
    return queries.gradient(dchunks.q_BlHK.reshape(do_BlHK.shape)), returned(dkv_12DGKr, runs)


def fetch(kv_2BGlK: jax.Array, setting: Setting) -> jax.Array:
    """What `fetched` gives, to be saved as it is."""
    return checkpoint_name(fetched(kv_2BGlK, _runs(kv_2BGlK.shape[3], setting)), COMMUNICATED)


def _runs(l: int, setting: Setting) -> Runs:
    runs = runs_of(l, setting)
    assert runs, "the strategy has asked whether there are any"
    return runs


def fetched(kv_2BGlK: jax.Array, runs: Runs) -> jax.Array:
    """The keys and values of this device's runs, `kv_12DGrK`."""
    chunks = jnp.split(kv_2BGlK, runs.layout.chunks_per_device, axis=3)

    def arrived(nth: int, piece: Piece) -> jax.Array:
        if piece.distance == 0:
            return chunks[nth]
        sources = runs.sources(nth, piece).items()
        parts = [_sent(_edge(chunks[of], piece), moves, runs.axis) for of, moves in sources]
        return sum(parts[1:], parts[0]) if parts else jnp.zeros_like(kv_2BGlK[:, :, :, : piece.tokens])

    of_chunks = [jnp.concatenate([arrived(nth, piece) for piece in runs.pieces], 3) for nth in range(len(chunks))]
    kv_2BcGrK = jnp.stack(of_chunks, axis=2)
    return kv_2BcGrK.reshape(1, 2, -1, *kv_2BcGrK.shape[3:])


def returned(dkv_12DGKr: jax.Array, runs: Runs) -> jax.Array:
    """The gradient of this device's keys and values, `dkv_2BGKl`: the sum over all runs that they are in."""
    count = runs.layout.chunks_per_device
    _, _, D, *shape = dkv_12DGKr.shape
    of_chunks = jnp.split(dkv_12DGKr.reshape(2, D // count, count, *shape), count, axis=2)
    ends = np.cumsum([piece.tokens for piece in runs.pieces])[:-1].tolist()
    total: list[list[jax.Array]] = [[] for _ in of_chunks]  # what each own chunk gets
    for nth, of_run in enumerate(of_chunks):
        for piece, d_2BGKp in zip(runs.pieces, jnp.split(of_run[:, :, 0], ends, axis=4), strict=True):
            if piece.distance == 0:
                total[nth].append(d_2BGKp)
                continue
            for of, moves in runs.sources(nth, piece).items():
                back = _sent(d_2BGKp, [(there, here) for here, there in moves], runs.axis)
                total[of].append(_at_edge(back, piece, runs.chunk))
    return jnp.concatenate([sum(parts[1:], parts[0]) for parts in total], axis=4)


def by_chunk(queries: Queries, runs: Runs) -> Queries:
    """This device's queries as a kernel is given them: rows are chunks, and keys count from the first of a run."""
    q_BlHK, mask, dropout, _ = queries
    device = jax.lax.axis_index(runs.axis)
    B, (count, chunk) = q_BlHK.shape[0], (runs.layout.chunks_per_device, runs.chunk)
    q_DqHK = q_BlHK.reshape(B * count, chunk, *q_BlHK.shape[2:])
    if dropout is not None:
        stream_DqH = dropout.stream_BlH.reshape(B * count, chunk, -1)
        dropout = dropout._replace(stream_BlH=stream_DqH, first_B=jnp.tile(runs.first(device), B))
    return Queries(q_DqHK, in_runs(mask, runs, device, B), dropout, None)


def in_runs(mask: Intervals, runs: Runs, device: jax.Array | int, B: int) -> Intervals:
    """A device's mask, `[l]` or `[B, l]`, as `[D, q]`: with positions counted from the first of each run."""
    first_1c1 = runs.first(device)[None, :, None]

    def relative(position: jax.Array) -> jax.Array:
        position_bcq = position.reshape(-1, runs.layout.chunks_per_device, runs.chunk) - first_1c1
        return jnp.broadcast_to(position_bcq, (B, *position_bcq.shape[1:])).reshape(-1, runs.chunk)

    return Intervals(relative(mask.start), relative(mask.end))


def sends(runs: Runs, token: int, itemsize: int) -> Iterator[Traffic]:
    """The sends in one direction, of so many numbers per token."""
    for nth in range(runs.layout.chunks_per_device):
        for piece in runs.pieces:
            for moves in runs.sources(nth, piece).values():
                if leave(moves):
                    yield Traffic("collective-permute", 1, token * piece.tokens, itemsize)


def _edge(chunk_2BGlK: jax.Array, piece: Piece) -> jax.Array:
    """The tokens of a chunk that are a piece of others' runs."""
    tokens = piece.tokens
    return chunk_2BGlK[:, :, :, -tokens:] if piece.distance < 0 else chunk_2BGlK[:, :, :, :tokens]


def _at_edge(d_2BGKp: jax.Array, piece: Piece, chunk: int) -> jax.Array:
    """The gradient of such tokens as one of their whole chunk."""
    rest = chunk - piece.tokens
    return jnp.pad(d_2BGKp, [(0, 0)] * 4 + [(rest, 0) if piece.distance < 0 else (0, rest)])


def _sent(x: jax.Array, moves: list[tuple[int, int]], axis: str | None) -> jax.Array:
    """What arrives by these moves; zeros where nothing does."""
    if leave(moves):
        return checkpoint_name(jax.lax.ppermute(x, axis, moves), COMMUNICATED)
    stays = jnp.isin(jax.lax.axis_index(axis), jnp.array([device for device, _ in moves]))
    return jnp.where(stays, x, 0)
