"""Attention over one run of neighbouring keys at a time, with its log-sum-exp, by which several are put together."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lss_jax.attention.kernels.blocks import KeyBlocks, KeyChunks, key_blocks
from lss_jax.attention.kernels.blockwise import (
    Cotangents,
    accumulate,
    differentiate,
    finish,
    in_blocks,
    no_gradients,
    nothing_yet,
    unblocked,
)
from lss_jax.attention.kernels.interface import Attended, Queries
from lss_jax.attention.setting import Setting
from lss_jax.parallel.residuals import ATTENDED


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def attend_to_run(queries: Queries, kv_2BGsK: jax.Array, first: jax.Array, setting: Setting) -> Attended:
    """The attention of queries to the `s` keys at natural positions from `first` on, if they exist; float32."""
    return _forward(queries, kv_2BGsK, first, setting)[0]


def _forward(queries, kv_2BGsK, first, setting):
    blocking, blocks = in_blocks(
        queries, kv_2BGsK.shape[2], keys := keys_from(first, kv_2BGsK.shape[3], setting), setting
    )
    softmax = accumulate(blocks, kv_2BGsK[None], keys, nothing_yet(blocks))
    o_igmK, lse_igm = finish(softmax)
    o_BlHK, lse_igm = checkpoint_name((blocking.join(o_igmK), lse_igm), ATTENDED)
    attended = Attended(o_BlHK, unblocked(blocking, softmax, lse_igm))
    return attended, (queries, kv_2BGsK, first, o_BlHK, lse_igm)


def _backward(setting, saved, given):
    queries, kv_2BGsK, first, o_BlHK, lse_igm = saved
    do_BlHK, dlse_BlH = given
    keys = keys_from(first, kv_2BGsK.shape[3], setting)
    blocking, blocks = in_blocks(queries, kv_2BGsK.shape[2], keys, setting)
    odo_BlH = (o_BlHK * do_BlHK).sum(-1) - dlse_BlH  # a score's weight is its share of both results
    do_igmK = blocking.split(do_BlHK.astype(queries.q_BlHK.dtype))
    cotangents = Cotangents(do_igmK, lse_igm, blocking.split_per_head(odo_BlH))
    start = no_gradients(blocks, kv_2BGsK[None])
    gradients = differentiate(blocks, kv_2BGsK[None], keys, cotangents=cotangents, gradients=start)
    dkv_2BGsK = gradients.dkv_n2BGKs[0].swapaxes(3, 4).astype(kv_2BGsK.dtype)
    return gradients.of_queries(queries, blocking), dkv_2BGsK, None


attend_to_run.defvjp(_forward, _backward)


def keys_from(first: jax.Array | int, count: int, setting: Setting) -> KeyBlocks:
    """The blocks of a run of keys."""
    nothing = jnp.zeros(1, jnp.int32)
    return key_blocks(KeyChunks(nothing + first, nothing, nothing, count), setting.block_keys)


def together(parts: Attended) -> Attended:
    """The attention to all keys from that to several runs without a key in common, stacked on axis 0."""
    largest_BlH = jax.lax.stop_gradient(parts.lse_BlH.max(0))
    largest_BlH = jnp.where(largest_BlH == -jnp.inf, 0.0, largest_BlH)
    weight_PBlH = jnp.exp(parts.lse_BlH - largest_BlH)
    sum_BlH = weight_PBlH.sum(0)
    seen_BlH = sum_BlH > 0
    sum_BlH = jnp.where(seen_BlH, sum_BlH, 1.0)
    o_BlHK = (parts.o_BlHK * weight_PBlH[..., None]).sum(0) / sum_BlH[..., None]
    return Attended(o_BlHK, jnp.where(seen_BlH, largest_BlH + jnp.log(sum_BlH), -jnp.inf))
