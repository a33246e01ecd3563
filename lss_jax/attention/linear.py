"""Linear attention (Katharopoulos et al. 2020, arXiv 2006.16236): not softmax attention, but a model of its own.

A query weighs a key by the product of their positive features, here `elu(x) + 1`. Sums over keys can then be taken
before any query is known: a *state* `[D, K + 1]`, of features times values and of features alone. Causal attention
adds to it block by block, and no weights exist but those within a block.

Over a sharded sequence the devices exchange the states of their chunks, whatever the length of these: one all-gather
per layer in the forward pass, and its transpose, one reduce-scatter, in the backward pass.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lss_jax.attention.collectives import all_gather
from lss_jax.attention.gaps import dropout_gap, kernel_gap, mask_gaps, window_gap
from lss_jax.attention.kernels.blocks import even
from lss_jax.attention.mask import MaskKind
from lss_jax.attention.setting import Setting
from lss_jax.attention.strategy import Local, Operations, Shards, Shown, Strategy
from lss_jax.attention.traffic import Sizes, Traffic
from lss_jax.config.schema import AttentionConfig, Config
from lss_jax.parallel.residuals import ATTENDED
from lss_jax.parallel.varying import varying_like

LOWEST = -1e30  # the scale of a state that nothing was added to

# From queries or keys `[..., K]` to features `[..., D]`, float32, and the logarithm of what they are to be multiplied
# by, `[...]`, which has no gradient: features of any size can then be added without overflow.
FeatureMap = Callable[[jax.Array], tuple[jax.Array, jax.Array]]


def elu_features(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The paper's feature map (Sec. 3.2.1, equation 7): positive, and as many features as the head is wide."""
    return jax.nn.elu(x.astype(jnp.float32)) + 1.0, jnp.zeros_like(x[..., 0], jnp.float32)


def linear_attention(local: Local, setting: Setting) -> jax.Array:
    """This segment's attention `o_BlHK`, inside `shard_map` over `setting.axis`."""
    return attend_by_states(local, setting, elu_features)


def attend_by_states(local: Local, setting: Setting, features: FeatureMap) -> jax.Array:
    """Attention whose weights are products of features: `o_BlHK`, zeros for queries that are masked out.

    The mask must show all tokens but the padding, or of these each one and those before it.
    """
    before = _exchanged(_chunk_states(local, setting, features), setting)
    return checkpoint_name(_rows(local, before, setting, features), ATTENDED)


class Blocks(NamedTuple):
    """A device's tokens in `t` blocks, one after the other in each of its `n` chunks, `c` tokens each; `R = H/G`."""

    q_tnBGRcK: jax.Array
    k_tnBGcK: jax.Array
    v1_tnBGcW: jax.Array  # the values, and a one, by which features alone are summed: `W = K + 1`
    seen_tnB1c: jax.Array  # False for padding, of rows or of blocks


class State(NamedTuple):
    """The sum over keys of features times values, which is to be multiplied by `exp(scale)`; float32."""

    sums_nBGDW: jax.Array
    scale_nBG: jax.Array


def _causal(setting: Setting) -> bool:
    assert setting.approximation
    return setting.approximation.causal


def _chunks(setting: Setting) -> int:
    """The number of a device's chunks; where a token sees all of them, in any order, they are one."""
    return setting.layout.chunks_per_device if _causal(setting) else 1


def _in_blocks(local: Local, setting: Setting) -> Blocks:
    q_BlHK, k_BlGK, v_BlGK, mask, *_ = local
    B, l, H, K = q_BlHK.shape
    G, n = k_BlGK.shape[2], _chunks(setting)
    t, c = even(l // n, setting.block_keys)

    def split(x: jax.Array) -> jax.Array:
        """`[B, l, ...]` as `[t, n, B, ..., c, last]`."""
        runs = x.reshape(B, n, l // n, *x.shape[2:])
        padded = jnp.pad(runs, [(0, 0), (0, 0), (0, t * c - l // n)] + [(0, 0)] * (x.ndim - 2))
        blocks = padded.reshape(B, n, t, c, *x.shape[2:])
        return jnp.moveaxis(blocks, (2, 1, 0, 3), (0, 1, 2, -2))

    seen_Bl11 = jnp.broadcast_to((mask.start < mask.end)[..., None, None], (B, l, 1, 1))
    v1_BlGW = jnp.concatenate((v_BlGK.astype(jnp.float32), jnp.ones_like(v_BlGK[..., :1], jnp.float32)), axis=-1)
    q_BlGRK = q_BlHK.reshape(B, l, G, H // G, K)
    return Blocks(split(q_BlGRK), split(k_BlGK), split(v1_BlGW), split(seen_Bl11)[..., 0])


def _joined(o_tnBGRcK: jax.Array, q_BlHK: jax.Array) -> jax.Array:
    """Blocks of rows as `o_BlHK`, in the dtype of the queries."""
    t, n, _, _, _, c, K = o_tnBGRcK.shape
    B, l, *_ = q_BlHK.shape
    o_BntcGRK = jnp.moveaxis(o_tnBGRcK, (2, 1, 0, 5), (0, 1, 2, 3))
    return o_BntcGRK.reshape(B, n, t * c, -1, K)[:, :, : l // n].reshape(q_BlHK.shape).astype(q_BlHK.dtype)


@partial(jax.checkpoint, static_argnums=(1, 2))  # so that queries, keys and values are saved as they are, and once
def _chunk_states(local: Local, setting: Setting, features: FeatureMap) -> State:
    """The state of each of this device's chunks: of all keys in it."""
    blocks = _in_blocks(local, setting)

    def one_block(state: State, block: Blocks) -> tuple[State, None]:
        return _with(state, _keys(block, features), block), None

    return jax.lax.scan(jax.checkpoint(one_block, prevent_cse=False), _no_keys(blocks, features), blocks)[0]


def _no_keys(blocks: Blocks, features: FeatureMap) -> State:
    """The state before any key."""
    n, B, G, _, W = blocks.v1_tnBGcW.shape[1:]
    D = jax.eval_shape(features, blocks.k_tnBGcK)[0].shape[-1]
    nothing = State(jnp.zeros((n, B, G, D, W), jnp.float32), jnp.full((n, B, G), LOWEST, jnp.float32))
    return varying_like(nothing, blocks)


class Keys(NamedTuple):
    """The features of a block's keys, which are to be multiplied by `exp(scale)`: zero for padding."""

    f_nBGkD: jax.Array
    scale_nBGk: jax.Array


def _keys(block: Blocks, features: FeatureMap) -> Keys:
    f_nBGkD, scale_nBGk = features(block.k_tnBGcK)
    return Keys(f_nBGkD, jnp.where(block.seen_tnB1c, jax.lax.stop_gradient(scale_nBGk), -jnp.inf))


def _with(state: State, keys: Keys, block: Blocks) -> State:
    """The state with the keys of a block, at the larger of their scales."""
    scale_nBG = jnp.maximum(state.scale_nBG, keys.scale_nBGk.max(-1))
    weighted_nBGkD = keys.f_nBGkD * jnp.exp(keys.scale_nBGk - scale_nBG[..., None])[..., None]
    added_nBGDW = jnp.einsum("nBGkD,nBGkW->nBGDW", weighted_nBGkD, block.v1_tnBGcW)
    shrink_nBG11 = jnp.exp(state.scale_nBG - scale_nBG)[..., None, None]
    return State(state.sums_nBGDW * shrink_nBG11 + added_nBGDW, scale_nBG)


def _exchanged(own: State, setting: Setting) -> State:
    """For each of this device's chunks the sum of the states of those before it; of all, where a token sees all."""
    n, layout = len(own.sums_nBGDW), setting.layout
    own_nBGX = jnp.concatenate((own.sums_nBGDW.reshape(*own.scale_nBG.shape, -1), own.scale_nBG[..., None]), axis=-1)
    all_NnBGX = all_gather(own_nBGX, setting.axis)  # every later token needs the sum over every earlier key
    sums_NnBGDW = all_NnBGX[..., :-1].reshape(-1, *own.sums_nBGDW.shape)
    scale_NnBG = jax.lax.stop_gradient(all_NnBGX[..., -1])
    here = jax.lax.axis_index(setting.axis) if setting.axis else 0

    def before(nth: int) -> State:
        number_Nn = jnp.asarray(layout.chunks_NC[:, :n])
        counts_Nn = number_Nn < layout.chunk_at(here, nth) if _causal(setting) else number_Nn >= 0
        counted_NnBG = jnp.where(counts_Nn[..., None, None], scale_NnBG, LOWEST)
        scale_BG = counted_NnBG.max((0, 1))
        factor_NnBG = jnp.where(counts_Nn[..., None, None], jnp.exp(counted_NnBG - scale_BG), 0.0)
        return State((sums_NnBGDW * factor_NnBG[..., None, None]).sum((0, 1)), scale_BG)

    return jax.tree.map(lambda *chunks: jnp.stack(chunks), *map(before, range(n)))


@partial(jax.checkpoint, static_argnums=(2, 3))
def _rows(local: Local, before: State, setting: Setting, features: FeatureMap) -> jax.Array:
    """The output of each query, `o_BlHK`; in the backward pass recomputed a block at a time."""
    blocks, causal = _in_blocks(local, setting), _causal(setting)
    earlier_ck = jnp.tri(blocks.q_tnBGRcK.shape[5], dtype=bool)

    def one_block(state: State, block: Blocks) -> tuple[State, jax.Array]:
        f_nBGRcD, _ = features(block.q_tnBGRcK)  # the scale of a query's features cancels
        if not causal:
            return state, _divided(jnp.einsum("nBGRcD,nBGDW->nBGRcW", f_nBGRcD, state.sums_nBGDW), block)
        keys = _keys(block, features)
        # each query's own scale: what comes after it may be larger by any factor
        scale_nBGc = jnp.maximum(jax.lax.cummax(keys.scale_nBGk, 3), state.scale_nBG[..., None])
        factor_nBGck = jnp.where(earlier_ck, keys.scale_nBGk[..., None, :] - scale_nBGc[..., None], -jnp.inf)
        a_nBGRck = jnp.einsum("nBGRcD,nBGkD->nBGRck", f_nBGRcD, keys.f_nBGkD) * jnp.exp(factor_nBGck)[:, :, :, None]
        o1_nBGRcW = jnp.einsum("nBGRcD,nBGDW->nBGRcW", f_nBGRcD, state.sums_nBGDW)
        o1_nBGRcW *= jnp.exp(state.scale_nBG[..., None] - scale_nBGc)[:, :, :, None, :, None]
        o1_nBGRcW += jnp.einsum("nBGRck,nBGkW->nBGRcW", a_nBGRck, block.v1_tnBGcW)
        return _with(state, keys, block), _divided(o1_nBGRcW, block)

    start = varying_like(before, (before, blocks))
    return _joined(jax.lax.scan(jax.checkpoint(one_block, prevent_cse=False), start, blocks)[1], local.q_BlHK)


def _divided(o1_nBGRcW: jax.Array, block: Blocks) -> jax.Array:
    """Weighted sums of values divided by the sums of weights, which come last."""
    seen_nBGRc1 = block.seen_tnB1c[..., None, :, None] & (o1_nBGRcW[..., -1:] > 0)
    o_nBGRcK = o1_nBGRcW[..., :-1] / jnp.where(seen_nBGRc1, o1_nBGRcW[..., -1:], 1.0)
    return jnp.where(seen_nBGRc1, o_nBGRcK, 0.0)


def state_traffic(sizes: Sizes, setting: Setting, D: int) -> dict[str, list[Traffic]]:
    """What one layer moves, with `D` features: the states of all chunks, and their gradients; float32."""
    own = _chunks(setting) * sizes.B * sizes.G * (D * (sizes.K + 1) + 1)
    gather = Traffic("all-gather", 1, setting.layout.devices * own, 4)
    return {"forward": [gather], "backward": [Traffic("reduce-scatter", 1, own, 4)]}


def state_operations(sizes: Sizes, setting: Setting, D: int, projected: int) -> Operations:
    """Operations of one layer with `D` features, each a sum of so many products (0: none).

    The backward pass recomputes each block, and before that the states from which blocks start.
    """
    causal, W = _causal(setting), sizes.K + 1
    t, c = even(sizes.l // _chunks(setting), setting.block_keys)
    keys = sizes.B * sizes.G * _chunks(setting) * t * c
    queries = keys * (sizes.H // sizes.G)
    of_keys, of_queries = keys * D * projected, queries * D * projected
    grow, read, within = keys * D * W, queries * D * W, causal * queries * c * (D + W)
    forward = (1 + causal) * (of_keys + grow) + of_queries + read + within
    backward = 3 * (1 + causal) * of_keys + (5 if causal else 2) * grow + 2 * of_queries + 3 * (read + within)
    return Operations(2 * forward, 2 * (forward + backward))


def _problems(attention: AttentionConfig, _shards: Shards) -> Iterator[str]:
    """There is one way to compute it."""
    yield from kernel_gap(attention)


def _refuses(config: Config, seen: MaskKind, _shards: Shards) -> Iterator[str]:
    """It shows all of a row, or all up to each token; and there are no weights to drop."""
    yield from (*mask_gaps(config, seen), *window_gap(config, seen), *dropout_gap(config))


def _operations(_shown: Shown, sizes: Sizes, setting: Setting) -> Operations:
    return state_operations(sizes, setting, sizes.K, projected=0)


LINEAR = Strategy(
    exact=False,
    defined_by=(),
    attention=linear_attention,
    traffic=lambda sizes, setting: state_traffic(sizes, setting, sizes.K),
    whole_mask=None,
    kernels=("blockwise",),
    options=(),
    problems=_problems,
    refuses=_refuses,
    own_window=False,
    in_kernel=None,
    recomputed=lambda _: (True, True),
    key_blocks=None,
    operations=_operations,
)
