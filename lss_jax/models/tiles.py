"""The tile law: what is computed for each token by itself is computed for a tile of tokens at a time.

Nothing of a size `tokens x F` or `tokens x V` then exists at once, neither in the forward nor in the backward pass,
which recomputes a tile from its input. Where a result is as large as the input it takes the input's place, and so does
the input's gradient: a loop over tiles needs no second array, unless somebody else still wants the first.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from lss_jax.config.schema import Config
from lss_jax.models.layers import is_trained
from lss_jax.parallel.layout import SEQUENCE, padded_length
from lss_jax.parallel.mesh import MODEL, SEQ
from lss_jax.parallel.varying import varying_like

Function = Callable[..., Any]


def in_tiles(
    function: Function, size: int, modules: Any, x_BpE: jax.Array, tokens: Any = None, context: Any = None
) -> Any:
    """`function(modules, x_BpE, tokens, context)`, for up to `size` tokens at a time; 0: all at once.

    Gradients of the modules' trained parameters are summed over tiles in float32, and rounded once.

    Args:
      function: treats every token by itself; its results have tokens on their second axis. It closes over no tracers.
      size: tokens of this device's part per tile.
      modules: an NNX module, or several in a tuple.
      x_BpE: activations of this device's part of the segment.
      tokens: a tree of integers with tokens on their last axis. There may be several parts of them one after the other,
        of which each tile has the same tokens, and so may the results have.
      context: a tree of anything else without gradients.
    """
    p = x_BpE.shape[1]
    if size == 0 or size >= p:
        return function(modules, x_BpE, tokens, context)
    graphdef, trained, *frozen = nnx.split(modules, is_trained, ...)

    def of_tile(trained: Any, frozen: Any, x_BtE: jax.Array, tokens: Any, context: Any) -> Any:
        return function(nnx.merge(graphdef, trained, *frozen), x_BtE, tokens, context)

    return _tiled(of_tile, tile_size(p, size), trained, frozen, x_BpE, tokens, context)


def tile_size(tokens: int, size: int) -> int:
    """The largest size of at least half of `size` that divides the tokens; if there is none, `size` and a rest."""
    return next((divisor for divisor in range(size, size // 2, -1) if tokens % divisor == 0), size)


def tiles_on(config: Config, mesh: Mesh | AbstractMesh, sequence: str = SEQUENCE) -> dict[int, int]:
    """The tiles of a device's part of a segment: their size in tokens, and how many there are of it."""
    part = padded_length(config, mesh, sequence) // mesh.shape[SEQ] // mesh.shape[MODEL]
    size = config.model.tile
    if size == 0 or size >= part:
        return {part: 1}
    size = tile_size(part, size)
    return {size: part // size} | ({part % size: 1} if part % size else {})


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _tiled(
    function: Function, size: int, trained: Any, frozen: Any, x_BpE: jax.Array, tokens: Any, context: Any
) -> Any:
    (B, p, _), state = x_BpE.shape, (trained, frozen)

    def of_tile(start: Any, t: int) -> Any:
        return function(*state, _cut(x_BpE, p, start, t, 1), _tokens(tokens, p, start, t), context)

    shapes = jax.eval_shape(lambda: of_tile(0, size))
    if _replaces(shapes, x_BpE):

        def in_place(start: Any, t: int, y_BpE: jax.Array) -> jax.Array:
            y_BtE = function(*state, _cut(y_BpE, p, start, t, 1), _tokens(tokens, p, start, t), context)
            return _put(y_BpE, y_BtE, p, start, 1)

        return _over_tiles(in_place, p, size, varying_like(x_BpE, (state, x_BpE, tokens)))

    def whole(leaf: Any) -> jax.Array:
        return jnp.zeros((B, leaf.shape[1] // size * p, *leaf.shape[2:]), leaf.dtype)

    def into(start: Any, t: int, y: Any) -> Any:
        return jax.tree.map(lambda y, tile: _put(y, tile, p, start, 1), y, of_tile(start, t))

    return _over_tiles(into, p, size, varying_like(jax.tree.map(whole, shapes), (state, x_BpE, tokens)))


def _forward(function, size, *arguments):
    return _tiled(function, size, *arguments), arguments


def _backward(function, size, saved, dy):
    trained, frozen, x_BpE, tokens, context = saved
    p = x_BpE.shape[1]

    def differentiate(start: Any, t: int, carry: Any) -> Any:
        d_trained, x_BpE = carry
        tokens_t = _tokens(tokens, p, start, t)
        x_BtE = _cut(x_BpE, p, start, t, 1)
        _, pullback = jax.vjp(
            lambda trained, x_BtE: function(trained, frozen, x_BtE, tokens_t, context), trained, x_BtE
        )
        d_tile, dx_BtE = pullback(jax.tree.map(lambda leaf: _cut(leaf, p, start, t, 1), dy))
        d_trained = jax.tree.map(lambda total, leaf: total + leaf.astype(jnp.float32), d_trained, d_tile)
        return d_trained, _put(x_BpE, dx_BtE, p, start, 1)

    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), trained)
    start = varying_like((nothing, x_BpE), (trained, frozen, x_BpE, tokens, dy))
    d_trained, dx_BpE = _over_tiles(differentiate, p, size, start)
    d_trained = jax.tree.map(lambda total, leaf: total.astype(leaf.dtype), d_trained, trained)
    return d_trained, None, dx_BpE, None, None


_tiled.defvjp(_forward, _backward)


def _over_tiles(body: Callable[[Any, int, Any], Any], p: int, size: int, carry: Any) -> Any:
    """`carry = body(start, tokens, carry)` for each tile, the rest last."""
    carry = jax.lax.fori_loop(0, p // size, lambda tile, carry: body(tile * size, size, carry), carry)
    return body(p - p % size, p % size, carry) if p % size else carry


def _replaces(shapes: Any, x_BpE: jax.Array) -> bool:
    """Whether the result for a tile has the shape and dtype of its input."""
    leaves = jax.tree.leaves(shapes)
    return len(leaves) == 1 and leaves[0].shape[2:] == x_BpE.shape[2:] and leaves[0].dtype == x_BpE.dtype


def _tokens(tokens: Any, p: int, start: Any, t: int) -> Any:
    return jax.tree.map(lambda leaf: _cut(leaf, p, start, t, leaf.ndim - 1), tokens)


def _cut(x: jax.Array, p: int, start: Any, t: int, axis: int) -> jax.Array:
    """The tile of `t` tokens from `start` on, of each part of `p` tokens: `[.., parts * t, ..]`."""
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    tile = jax.lax.dynamic_slice_in_dim(x.reshape(*before, -1, p, *after), start, t, axis + 1)
    return tile.reshape(*before, -1, *after)


def _put(x: jax.Array, tile: jax.Array, p: int, start: Any, axis: int) -> jax.Array:
    """`x` with a tile put where `_cut` takes it from."""
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    parts = x.shape[axis] // p
    tile = tile.reshape(*before, parts, -1, *after)
    return jax.lax.dynamic_update_slice_in_dim(x.reshape(*before, parts, p, *after), tile, start, axis + 1).reshape(
        x.shape
    )
