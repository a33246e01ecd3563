"""Ring attention (Liu et al. 2023, arXiv 2310.01889): keys and values go round, every device adds what it sees of them.

Per layer and training step `N - 1` sends of a segment's pair in the forward pass; in the backward pass as many, and `N`
of its gradient, which goes along with it and comes home in the end. Two segments' pairs are held at a time.
"""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp

from lss_jax.attention.collectives import stacked
from lss_jax.attention.kernels.blocks import KeyBlocks, chunks_of_all, chunks_of_device, key_blocks
from lss_jax.attention.kernels.blockwise import (
    accumulate,
    cotangents,
    differentiate,
    in_blocks,
    no_gradients,
    nothing_yet,
    output_of,
)
from lss_jax.attention.kernels.interface import Attended, Queries, cotangent_of_output
from lss_jax.attention.setting import Setting, at_precision
from lss_jax.attention.strategy import Local, Shards, Strategy, own_segment, refuses_nothing
from lss_jax.attention.traffic import Sizes, Traffic
from lss_jax.config.schema import AttentionConfig
from lss_jax.parallel.varying import varying_like


def ring_attention(local: Local, setting: Setting) -> jax.Array | Attended:
    """This segment's attention `o_BlHK`, inside `shard_map` over `setting.axis`.

    Blocks of keys that the mask rules out cost no work; the pair travels all the same, since another device may see it.
    """
    dropout = local.dropout and local.dropout.of_heads(jnp.arange(local.q_BlHK.shape[2]))
    queries = Queries(local.q_BlHK, local.mask, dropout, local.pairs)
    return _ring(queries, stacked(local.k_BlGK, local.v_BlGK), setting)


def traffic(sizes: Sizes, setting: Setting) -> dict[str, list[Traffic]]:
    """What one layer moves."""
    N = setting.layout.devices
    pair = Traffic("collective-permute", N - 1, sizes.pair, sizes.itemsize)
    return {"forward": [pair], "backward": [pair, Traffic("collective-permute", N, sizes.pair, 4)]}


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _ring(queries: Queries, kv_2BGlK: jax.Array, setting: Setting) -> jax.Array | Attended:
    return _forward(queries, kv_2BGlK, setting)[0]


@at_precision
def _forward(queries, kv_2BGlK, setting):
    keys = _keys_in_turn(0, kv_2BGlK, setting)
    blocking, blocks = in_blocks(queries, kv_2BGlK.shape[2], keys, setting)

    def attend(turn, kv_2BGlK, softmax):
        return accumulate(blocks, kv_2BGlK[None], _keys_in_turn(turn, kv_2BGlK, setting), softmax)

    def one_turn(turn, carry):
        kv_2BGlK, softmax = carry
        arriving_2BGlK = _send_on(kv_2BGlK, setting)  # travels while this segment's keys are attended to
        return arriving_2BGlK, attend(turn, kv_2BGlK, softmax)

    last = setting.layout.devices - 1
    start = varying_like((kv_2BGlK, nothing_yet(blocks)), (blocks, kv_2BGlK))
    kv_last_2BGlK, softmax = jax.lax.fori_loop(0, last, one_turn, start)
    output = output_of(blocking, attend(last, kv_last_2BGlK, softmax), queries.q_BlHK.dtype, setting)
    return output.given, (queries, kv_2BGlK, output)


@at_precision
def _backward(setting, saved, cotangent):
    queries, kv_2BGlK, output = saved
    do_BlHK = cotangent_of_output(cotangent)
    keys = _keys_in_turn(0, kv_2BGlK, setting)
    blocking, blocks = in_blocks(queries, kv_2BGlK.shape[2], keys, setting)
    given = cotangents(blocking, output, do_BlHK)

    def attend(turn, kv_2BGlK, gradients):
        keys = _keys_in_turn(turn, kv_2BGlK, setting)
        gradients = differentiate(blocks, kv_2BGlK[None], keys, cotangents=given, gradients=gradients)
        return gradients._replace(dkv_n2BGKs=_send_on(gradients.dkv_n2BGKs, setting))  # to where its keys are by then

    def one_turn(turn, carry):
        kv_2BGlK, gradients = carry
        arriving_2BGlK = _send_on(kv_2BGlK, setting)
        return arriving_2BGlK, attend(turn, kv_2BGlK, gradients)

    last = setting.layout.devices - 1
    start = varying_like((kv_2BGlK, no_gradients(blocks, kv_2BGlK[None])), (blocks, kv_2BGlK, given))
    kv_last_2BGlK, gradients = jax.lax.fori_loop(0, last, one_turn, start)
    gradients = attend(last, kv_last_2BGlK, gradients)  # after N sends those of keys and values are back at home
    dkv_2BGlK = gradients.dkv_n2BGKs[0].swapaxes(3, 4)
    return gradients.of_queries(queries, blocking), dkv_2BGlK.astype(kv_2BGlK.dtype)


_ring.defvjp(_forward, _backward)


def _send_on(x: jax.Array, setting: Setting) -> jax.Array:
    """Sends an array to the next device of the ring, and receives that of the device before."""
    if setting.axis is None:
        return x
    count = setting.layout.devices
    return jax.lax.ppermute(x, setting.axis, [(device, (device + 1) % count) for device in range(count)])


def _keys_in_turn(turn: jax.Array | int, kv_2BGlK: jax.Array, setting: Setting) -> KeyBlocks:
    """The blocks of the segment that this device holds in a turn: that of the device `turn` before it in the ring."""
    here = jax.lax.axis_index(setting.axis) if setting.axis else jnp.zeros((), jnp.int32)
    source = (here - turn) % setting.layout.devices
    return key_blocks(chunks_of_device(setting.key_layout, kv_2BGlK.shape[3], source), setting.block_keys)


def _problems(attention: AttentionConfig, _shards: Shards) -> Iterator[str]:
    """The softmax must go on from one segment's keys to the next's, which only the blockwise kernel does."""
    if attention.kernel not in ("auto", *RING.kernels):
        yield (
            f'attention.kernel={attention.kernel!r} cannot take keys as they come by, which attention.strategy="ring" '
            f'needs; use attention.kernel="blockwise"'
        )


def _key_blocks(segment_length: int, setting: Setting) -> KeyBlocks:
    """Key blocks of each segment by itself, since a device has one segment at a time."""
    return key_blocks(chunks_of_all(setting.key_layout, segment_length), setting.block_keys)


RING = Strategy(
    exact=True,
    defined_by=(),
    attention=ring_attention,
    traffic=traffic,
    whole_mask=None,
    kernels=("blockwise",),
    options=(),
    problems=_problems,
    refuses=refuses_nothing,
    own_window=False,
    in_kernel=own_segment,
    recomputed=lambda _: (True, True),
    key_blocks=_key_blocks,
    operations=None,
)
