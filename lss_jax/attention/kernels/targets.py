"""What differs between GPUs and TPUs for a fused kernel: how blocks come to a program, and how large they may be."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu

SMALLEST = 16  # side of a matrix that a GPU multiplies


class Target(NamedTuple):
    """What differs between GPUs and TPUs."""

    walk: Callable  # (first, stop, body): how a program meets one block after the other
    buffers: Callable  # what it needs for that
    tables: Any  # where numbers lie that it finds its way by
    most_queries: int  # in a block, as far as the config allows
    most_keys: int
    most_bytes: int  # in a block of either, so that all that a program works with finds room on the chip
    least: int  # queries or keys in a block, when compiled
    compiler: Any  # its parameters, which also say which compiler it is


def _walk_by_loads(first, stop, body, *, init, sources, buffers):
    """`body(turn, load, carry)` for each turn; `load(n, row=None)` is what source `n` has there, or one row of it.

    A source is an array and a function from the turn to the leading indices into it. On a GPU a program reads from
    memory what it wants.
    """
    assert not buffers

    def one_turn(turn, carry):
        def load(n, row=None):
            ref, where = sources[n]
            rows = () if row is None else (pl.ds(row, 1),)
            index = (*where(turn), *rows)
            return ref[(*index, *[slice(None)] * (len(ref.shape) - len(index)))]

        return body(turn, load, carry)

    return jax.lax.fori_loop(first, stop, one_turn, init)


def _walk_by_copies(first, stop, body, *, init, sources, buffers):
    """The same on a TPU: every source is copied to the chip, one turn ahead, into one of two buffers in turn."""
    *rooms, semaphores = buffers

    def copies(turn):
        slot = jax.lax.rem(turn - first, 2)
        for n, (ref, where) in enumerate(sources):
            yield pltpu.make_async_copy(ref.at[where(turn)], rooms[n].at[slot], semaphores.at[n, slot])

    def start(turn):
        for copy in copies(turn):
            copy.start()

    def one_turn(turn, carry):
        pl.when(turn + 1 < stop)(partial(start, turn + 1))
        for copy in copies(turn):
            copy.wait()
        slot = jax.lax.rem(turn - first, 2)

        def load(n, row=None):
            return rooms[n][slot] if row is None else rooms[n][slot, pl.ds(row, 1), :]

        return body(turn, load, carry)

    pl.when(first < stop)(partial(start, first))
    return jax.lax.fori_loop(first, stop, one_turn, init)


def _two_buffers_each(blocks: Sequence[tuple[int, int, Any]]) -> list:
    """Two buffers on the chip for each block of these rows, columns and dtypes, and their semaphores."""
    rooms = [pltpu.VMEM((2, rows, columns), dtype) for rows, columns, dtype in blocks]
    return [*rooms, pltpu.SemaphoreType.DMA((len(blocks), 2))]


TARGETS = {
    "triton": Target(
        walk=_walk_by_loads,
        buffers=lambda _: [],
        tables=pl.BlockSpec(memory_space=pl.ANY),
        most_queries=128,
        most_keys=64,
        most_bytes=16 * 1024,
        least=SMALLEST,
        compiler=plgpu.CompilerParams(),
    ),
    "mosaic": Target(
        walk=_walk_by_copies,
        buffers=_two_buffers_each,
        tables=pl.BlockSpec(memory_space=pltpu.SMEM),
        most_queries=512,
        most_keys=512,
        most_bytes=256 * 1024,
        least=128,
        compiler=pltpu.CompilerParams(),
    ),
}
