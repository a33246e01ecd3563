"""Dense attention: the whole score matrix at once. Exact and simple, so the reference for every other path."""

import jax
import jax.numpy as jnp

from lss_jax.attention.mask import Intervals


def attention_rows(q_BlHK: jax.Array, k_BLGK: jax.Array, v_BLGK: jax.Array, mask: Intervals) -> jax.Array:
    """The rows of attention `o_BlHK` of some queries, over all `L` keys in natural order.

    `G` key/value heads serve `H` query heads, `R = H/G` neighbours each (Ainslie et al. 2023, arXiv 2305.13245), as
    `m = R*l` rows of one head. Every query must see a key. Scores and softmax are float32, the output is of the dtype
    of `q_BlHK`.
    """
    B, l, H, K = q_BlHK.shape
    G, R = k_BLGK.shape[2], H // k_BLGK.shape[2]
    q_BmGK = q_BlHK.reshape(B, l, G, R, K).transpose(0, 3, 1, 2, 4).reshape(B, R * l, G, K)
    s_BGmL = jnp.einsum("BmGK,BLGK->BGmL", q_BmGK, k_BLGK, preferred_element_type=jnp.float32) * K**-0.5
    key_L = jnp.arange(k_BLGK.shape[1])
    seen_lL = (mask.start_l[:, None] <= key_L) & (key_L < mask.end_l[:, None])
    s_BGmL = jnp.where(jnp.tile(seen_lL, (R, 1)), s_BGmL, -jnp.inf)
    e_BGmL = jnp.exp(s_BGmL - jax.lax.stop_gradient(s_BGmL.max(axis=-1, keepdims=True)))
    sum_BmG = jnp.einsum("BGmL->BmG", e_BGmL)
    o_BmGK = jnp.einsum("BGmL,BLGK->BmGK", e_BGmL.astype(v_BLGK.dtype), v_BLGK, preferred_element_type=jnp.float32)
    o_BmGK = o_BmGK / sum_BmG[..., None]  # divided last: `l x K` numbers, not `l x L`
    return o_BmGK.reshape(B, R, l, G, K).transpose(0, 2, 3, 1, 4).reshape(B, l, H, K).astype(q_BlHK.dtype)


def dense_attention(
    q_BLHK: jax.Array, k_BLGK: jax.Array, v_BLGK: jax.Array, *, mask: Intervals, axis: str | None
) -> jax.Array:
    """The strategy of a sequence that nobody cut: all rows on one device."""
    assert axis is None, "the config admits dense attention only on an uncut sequence"
    return attention_rows(q_BLHK, k_BLGK, v_BLGK, mask)
