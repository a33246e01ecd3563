"""Window with global tokens (Beltagy et al. 2020, arXiv 2004.05150): exact for a mask that is no interval.

A token sees its neighbours (Sec. 3.1, "sliding window"): `attention.window` tokens around it, or up to it where it sees
nothing later. And it sees the first `attention.global_tokens` of the sequence, which see all and are seen by all
("global attention"), as far as the task's mask shows them. Global and local attention have the same projections, where
the paper gives each its own.

A device fetches what its tokens see: halos, from the devices before it (and behind, unless causal), and the global
tokens, once. Where these see later tokens, every device answers for its own keys, and one gather of the answers, with
their log-sum-exp, puts these together. No transfer grows with the length of the sequence.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lss_jax.attention.collectives import all_gather, stacked
from lss_jax.attention.gaps import kernel_gap, mask_gaps
from lss_jax.attention.kernels import blocks
from lss_jax.attention.kernels.interface import FORWARD, PRODUCTS, Attended, Queries
from lss_jax.attention.mask import Intervals, MaskKind, neighbours
from lss_jax.attention.nearby import fetched, runs_within, sends
from lss_jax.attention.runs import attend_to_run, keys_from, together
from lss_jax.attention.setting import Approximation, Reach, Setting, reach_of
from lss_jax.attention.strategy import Local, Operations, Shards, Shown, Strategy
from lss_jax.attention.traffic import Sizes, Traffic
from lss_jax.config.schema import AttentionConfig, Config
from lss_jax.parallel.residuals import ATTENDED, COMMUNICATED


def longformer_attention(local: Local, setting: Setting) -> jax.Array:
    """This segment's attention `o_BlHK`, inside `shard_map` over `setting.axis`."""
    q_BlHK, k_BlGK, v_BlGK, mask, *_ = local
    l, told = q_BlHK.shape[1], _told(setting)
    first = (jax.lax.axis_index(setting.axis) if setting.axis else 0) * l
    kv_2BGlK = stacked(k_BlGK, v_BlGK)
    runs = runs_within(_reach(told), l, setting)
    near_2BGsK = fetched(kv_2BGlK, runs)[0]
    queries = Queries(q_BlHK, near(mask, first, l, told), _dropout(local, None), None)
    parts = [attend_to_run(queries, near_2BGsK, first - runs.before, setting)]
    if not told.global_tokens:
        return parts[0].o_BlHK.astype(q_BlHK.dtype)
    q_BgHK, kv_2BGgK = _global_tokens(q_BlHK, kv_2BGlK, setting)
    queries = queries._replace(mask=far(mask, told))
    parts.append(attend_to_run(queries, kv_2BGgK, jnp.zeros_like(first), setting))
    o_BlHK = together(_stacked(parts)).o_BlHK
    if not told.causal:
        o_BlHK = _with_answers(o_BlHK, q_BgHK, kv_2BGlK, local, setting)
    return checkpoint_name(o_BlHK.astype(q_BlHK.dtype), ATTENDED)


def _told(setting: Setting) -> Approximation:
    assert setting.approximation
    return setting.approximation


def near(mask: Intervals, first: jax.Array | int, l: int, told: Approximation) -> Intervals:
    """What local queries see of the neighbours that are not global."""
    positions_l = first + jnp.arange(l, dtype=jnp.int32)
    window = neighbours(positions_l, *_reach(told))
    return mask & window & Intervals(jnp.full_like(positions_l, told.global_tokens), window.end)


def far(mask: Intervals, told: Approximation) -> Intervals:
    """What local queries see of the global tokens."""
    return Intervals(mask.start, jnp.minimum(mask.end, told.global_tokens))


def answered(mask: Intervals, told: Approximation) -> Intervals:
    """What global queries see of a device's own keys: those that are there, by the mask of the queries beside them."""
    position_g = jnp.arange(told.global_tokens, dtype=jnp.int32)
    end_g = jnp.where(position_g < mask.end.max(-1)[..., None], mask.end.max(-1)[..., None], 0)
    return Intervals(jnp.zeros_like(end_g), end_g)


def _reach(told: Approximation) -> Reach:
    return reach_of(told.window, causal=told.causal)


def _global_tokens(q_BlHK: jax.Array, kv_2BGlK: jax.Array, setting: Setting) -> tuple[jax.Array, jax.Array]:
    """The global tokens' queries, keys and values, which the first device has.

    Where they see one another alone, nobody else needs the queries: they are each device's own, and not used.
    """
    told, G = _told(setting), kv_2BGlK.shape[2]
    q_BgHK, kv_2BGgK = q_BlHK[:, : told.global_tokens], kv_2BGlK[:, :, :, : told.global_tokens]
    if told.causal:
        return q_BgHK, _from_first_device(kv_2BGgK, setting)
    everywhere = _from_first_device(jnp.concatenate((*kv_2BGgK, q_BgHK.swapaxes(1, 2)), axis=1), setting)  # in one sum
    k_BGgK, v_BGgK, q_BHgK = jnp.split(everywhere, (G, 2 * G), axis=1)
    return q_BHgK.swapaxes(1, 2), jnp.stack((k_BGgK, v_BGgK))


def _from_first_device(x: jax.Array, setting: Setting) -> jax.Array:
    """The first device's `x` on every device; its gradient there is the sum over all, in float32."""
    if setting.axis is None:
        return x
    own = jnp.where(jax.lax.axis_index(setting.axis) == 0, x.astype(jnp.float32), 0.0)
    everywhere = jax.lax.pcast(jax.lax.psum(own, setting.axis), setting.axis, to="varying")
    return checkpoint_name(everywhere, COMMUNICATED).astype(x.dtype)


def _with_answers(
    o_BlHK: jax.Array, q_BgHK: jax.Array, kv_2BGlK: jax.Array, local: Local, setting: Setting
) -> jax.Array:
    """`o_BlHK` with the rows of global tokens, who see what is on all devices, put together on the first device."""
    (_, l, _, _), g = o_BlHK.shape, _told(setting).global_tokens
    first = (jax.lax.axis_index(setting.axis) if setting.axis else jnp.int32(0)) * l
    queries = Queries(
        q_BgHK, answered(local.mask, _told(setting)), _dropout(local, jnp.arange(g, dtype=jnp.int32)), None
    )
    own = attend_to_run(queries, kv_2BGlK, first, setting)
    answers_NBgHW = all_gather(jnp.concatenate((own.o_BlHK, own.lse_BlH[..., None]), axis=-1), setting.axis)
    o_BgHK = together(Attended(answers_NBgHW[..., :-1], answers_NBgHW[..., -1])).o_BlHK
    here = first == 0
    return jnp.concatenate((jnp.where(here, o_BgHK, o_BlHK[:, :g]), o_BlHK[:, g:]), axis=1)


def _dropout(local: Local, position_g: jax.Array | None):
    """Dropout of this segment's queries, or of the queries at these positions."""
    if local.dropout is None:
        return None
    dropout = local.dropout if position_g is None else local.dropout._replace(position_l=position_g)
    return dropout.of_heads(jnp.arange(local.q_BlHK.shape[2]))


def _stacked(parts: list[Attended]) -> Attended:
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *parts)


def _traffic(sizes: Sizes, setting: Setting) -> dict[str, list[Traffic]]:
    """What one layer moves: bytes in proportion to the window and to the global tokens."""
    told, token = _told(setting), 2 * sizes.B * sizes.G * sizes.K
    halos = list(sends(runs_within(_reach(told), sizes.l, setting), token, sizes.itemsize))
    g = told.global_tokens
    if not g:
        return {"forward": halos, "backward": halos}
    heads = 2 * sizes.G if told.causal else 2 * sizes.G + sizes.H
    summed = Traffic("all-reduce", 1, sizes.B * g * heads * sizes.K, 4)
    if told.causal:
        return {"forward": [*halos, summed], "backward": [*halos, summed]}
    answer = sizes.B * g * sizes.H * (sizes.K + 1)
    gathered = Traffic("all-gather", 1, setting.layout.devices * answer, 4)
    return {
        "forward": [*halos, summed, gathered],
        "backward": [*halos, summed, Traffic("reduce-scatter", 1, answer, 4)],
    }


def _operations(shown: Shown, sizes: Sizes, setting: Setting) -> Operations:
    """By the blocks that the kernel visits, as of the exact strategies."""
    told, l = _told(setting), sizes.l
    runs = runs_within(_reach(told), l, setting)

    def scores(mask: Intervals, queries: int, first: int, keys: int) -> int:
        return blocks.scores(keys_from(first, keys, setting), (sizes.B, queries, sizes.H, sizes.G), setting, mask)

    def of_device(first: int) -> int:
        mask = shown(first + jnp.arange(l, dtype=jnp.int32))
        total = scores(near(mask, first, l, told), l, first - runs.before, runs.length)
        if told.global_tokens:
            total += scores(far(mask, told), l, 0, told.global_tokens)
        if told.global_tokens and not told.causal:
            total += scores(answered(mask, told), told.global_tokens, first, l)
        return total

    most = max(of_device(device * l) for device in range(setting.layout.devices))
    return Operations(2 * sizes.K * FORWARD * most, 2 * sizes.K * PRODUCTS[setting.kernel] * most)


def _problems(attention: AttentionConfig, _shards: Shards) -> Iterator[str]:
    """A window, and neighbours that are neighbours."""
    yield from kernel_gap(attention)
    if attention.window == 0:
        yield (
            'attention.window=0 is no window, which attention.strategy="longformer" needs; use attention.window=256, '
            'for example, or attention.strategy="lss", which shows all'
        )
    if attention.layout != "contiguous":
        yield (
            f'attention.layout={attention.layout!r} puts tokens apart that attention.strategy="longformer" keeps '
            f'together, and a window balances itself; use attention.layout="contiguous"'
        )


def _refuses(config: Config, seen: MaskKind, shards: Shards) -> Iterator[str]:
    """All global tokens are on the first device."""
    yield from mask_gaps(config, seen)
    segment = -(-config.data.seq_len // shards.seq)
    if config.attention.global_tokens > segment:
        yield (
            f"attention.global_tokens={config.attention.global_tokens} are more than the {segment} tokens of a segment "
            f"(data.seq_len={config.data.seq_len} over mesh.seq={shards.seq}), of which the first device has them all; "
            f"use attention.global_tokens={segment} or fewer"
        )


LONGFORMER = Strategy(
    exact=False,
    defined_by=("attention.window", "attention.global_tokens"),
    attention=longformer_attention,
    traffic=_traffic,
    whole_mask=None,
    kernels=("blockwise",),
    options=("global_tokens",),
    problems=_problems,
    refuses=_refuses,
    own_window=True,
    in_kernel=None,
    recomputed=lambda _: (True, True),
    key_blocks=None,
    operations=_operations,
)
