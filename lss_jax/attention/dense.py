"""Dense attention: the whole score matrix at once, as the paper has it. Exact and simple, and `l x L` in memory."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lss_jax.attention.mask import Intervals
from lss_jax.attention.setting import Setting
from lss_jax.dropout import PairDropout, dropped


def forward(
    q_BlHK: jax.Array, kv_N2BGlK: jax.Array, mask: Intervals, dropout: PairDropout | None, setting: Setting
) -> tuple[jax.Array, Callable]:
    """Attention rows `o_BlHK` over the keys and values of all segments, and their transpose.

    A query that sees nothing has a row of zeros.
    """

    def rows(q_BlHK: jax.Array, kv_N2BGlK: jax.Array) -> jax.Array:
        return attention_rows(q_BlHK, setting.layout.natural(kv_N2BGlK, 4), mask, dropout)

    return jax.vjp(rows, q_BlHK, kv_N2BGlK)


def backward(
    q_BlHK: jax.Array,
    kv_N2BGlK: jax.Array,
    mask: Intervals,
    dropout: PairDropout | None,
    o_BlHK: jax.Array,
    transpose: Callable,
    do_BlHK: jax.Array,
    setting: Setting,
) -> tuple[jax.Array, jax.Array]:
    """`dq_BlHK`, and this device's share of `dkv_N2BGKl` in float32; `transpose` holds all that is needed."""
    dq_BlHK, dkv_N2BGlK = transpose(do_BlHK)
    return dq_BlHK, dkv_N2BGlK.swapaxes(4, 5).astype(jnp.float32)


def attention_rows(
    q_BlHK: jax.Array, kv_2BGLK: jax.Array, mask: Intervals, dropout: PairDropout | None = None
) -> jax.Array:
    """The rows of attention `o_BlHK` of some queries, over all `L` keys in natural order.

    `G` key/value heads serve `H` query heads, `R = H/G` neighbours each (Ainslie et al. 2023, arXiv 2305.13245), as
    `m = R*l` rows of one head. Scores and softmax are float32, the output is of the dtype of `q_BlHK`.
    """
    B, l, H, K = q_BlHK.shape
    G, R = kv_2BGLK.shape[2], H // kv_2BGLK.shape[2]
    k_BGLK, v_BGLK = kv_2BGLK
    key_L = jnp.arange(k_BGLK.shape[2])
    q_BGmK = q_BlHK.reshape(B, l, G, R, K).transpose(0, 2, 3, 1, 4).reshape(B, G, R * l, K)
    s_BGmL = jnp.einsum("BGmK,BGLK->BGmL", q_BGmK, k_BGLK, preferred_element_type=jnp.float32) * K**-0.5
    seen = mask.sees(key_L)
    seen_B1mL = jnp.tile(seen if seen.ndim == 3 else seen[None], (1, R, 1))[:, None]
    max_BGm1 = jax.lax.stop_gradient(jnp.max(s_BGmL, -1, where=seen_B1mL, initial=-1e30, keepdims=True))
    e_BGmL = jnp.exp(jnp.where(seen_B1mL, s_BGmL - max_BGm1, -jnp.inf))
    sum_BGm = jnp.einsum("BGmL->BGm", e_BGmL)
    if dropout is not None:
        stream_BGm = dropout.stream_BlH.reshape(B, l, G, R).transpose(0, 2, 3, 1).reshape(B, G, R * l)
        e_BGmL = dropped(e_BGmL, stream_BGm[..., None], key_L, dropout.rate)
    o_BGmK = jnp.einsum("BGmL,BGLK->BGmK", e_BGmL.astype(v_BGLK.dtype), v_BGLK, preferred_element_type=jnp.float32)
    o_BGmK = o_BGmK / jnp.where(sum_BGm > 0, sum_BGm, 1.0)[..., None]  # divided last: `l x K` numbers, not `l x L`
    return o_BGmK.reshape(B, G, R, l, K).transpose(0, 3, 1, 2, 4).reshape(B, l, H, K).astype(q_BlHK.dtype)
