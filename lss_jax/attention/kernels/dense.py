"""Dense attention: the whole score matrix at once, as the paper has it. Exact and simple, and `l x L` in memory.

It saves a log-sum-exp per query, as the other kernels do, and recomputes the scores from it in the backward pass (Dao
et al. 2022, arXiv 2205.14135): they exist for one layer at a time.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lss_jax.attention.kernels.blockwise import product
from lss_jax.attention.kernels.interface import Output, Queries, Residuals
from lss_jax.attention.pairs import applied, bias_gradient
from lss_jax.attention.setting import Setting
from lss_jax.parallel.dropout import PairDropout, dropped
from lss_jax.parallel.residuals import ATTENDED


def forward(queries: Queries, kv_N2BGlK: jax.Array, setting: Setting) -> Output:
    """Attention over the keys and values of all segments."""
    scale = setting.scale_of(queries.q_BlHK.shape[3])
    output = dense_attention(queries, setting.key_layout.natural(kv_N2BGlK, 4), scale)
    return checkpoint_name(output if setting.scores.residual else output._replace(lse_BlH=None), ATTENDED)


def backward(residuals: Residuals, do_BlHK: jax.Array, setting: Setting) -> tuple[Queries, jax.Array]:
    """The gradients of the queries, and these queries' part of `dkv_N2BGKl` in float32."""
    queries, kv_N2BGlK, (o_BlHK, lse_BGm, _) = residuals
    q_BlHK, _, dropout, pairs = queries
    k_BGLK, v_BGLK = setting.key_layout.natural(kv_N2BGlK, 4)
    G, scale = k_BGLK.shape[1], setting.scale_of(q_BlHK.shape[3])
    q_BGmK, do_BGmK = by_kv_head(q_BlHK, G), by_kv_head(do_BlHK, G)
    odo_BGm = jnp.einsum("BGmK,BGmK->BGm", by_kv_head(o_BlHK, G), do_BGmK, preferred_element_type=jnp.float32)
    p_BGmL = jnp.exp(_scores(queries, k_BGLK, scale) - lse_BGm[..., None])
    dv_BGKL = product("BGmK,BGmL->BGKL", do_BGmK, _dropped(p_BGmL, dropout))
    dp_BGmL = _dropped(product("BGmK,BGLK->BGmL", do_BGmK, v_BGLK), dropout)
    ds_BGmL = p_BGmL * (dp_BGmL - odo_BGm[..., None])
    dbias_BHlL = None
    if pairs is not None and pairs.bias_BHlL is not None:
        dbias_BHlL = bias_gradient(pairs.bias_BHlL, ds_BGmL, q_BlHK.shape[1])
    ds_BGmL = (ds_BGmL * scale).astype(q_BlHK.dtype)
    dk_BGKL = product("BGmK,BGmL->BGKL", q_BGmK, ds_BGmL)
    dq_BGmK = product("BGmL,BGLK->BGmK", ds_BGmL, k_BGLK)
    dkv_N2BGKl = setting.key_layout.segments(jnp.stack((dk_BGKL, dv_BGKL)), 4)
    return queries.gradient(by_query_head(dq_BGmK, q_BlHK.shape), dbias_BHlL), dkv_N2BGKl


def dense_attention(queries: Queries, kv_2BGLK: jax.Array, scale: float) -> Output:
    """Attention over all `L` keys in natural order; scores and softmax are float32."""
    (q_BlHK, _, dropout, _), (k_BGLK, v_BGLK) = queries, kv_2BGLK
    s_BGmL = _scores(queries, k_BGLK, scale)
    known_BGm = jax.nn.logsumexp(s_BGmL, axis=-1)
    lse_BGm = jnp.where(known_BGm == -jnp.inf, 0.0, known_BGm)
    p_BGmL = _dropped(jnp.exp(s_BGmL - lse_BGm[..., None]), dropout)
    o_BGmK = product("BGmL,BGLK->BGmK", p_BGmL, v_BGLK)
    lse_BlH = by_query_head(known_BGm[..., None], (*q_BlHK.shape[:3], 1))[..., 0]
    return Output(by_query_head(o_BGmK, q_BlHK.shape).astype(q_BlHK.dtype), lse_BGm, lse_BlH)


def by_kv_head(x_BlHK: jax.Array, kv_heads: int) -> jax.Array:
    """`x_BGmK`: `G` key/value heads serve `H` query heads, `R = H/G` neighbours each, as `m = R*l` queries of one head.

    Source: Ainslie et al. 2023, arXiv 2305.13245.
    """
    B, l, H, K = x_BlHK.shape
    return x_BlHK.reshape(B, l, kv_heads, H // kv_heads, K).transpose(0, 2, 3, 1, 4).reshape(B, kv_heads, -1, K)


def by_query_head(x_BGmK: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `by_kv_head`, for an `x_BlHK` of this shape."""
    B, l, _, K = shape
    return x_BGmK.reshape(B, x_BGmK.shape[1], -1, l, K).transpose(0, 3, 1, 2, 4).reshape(shape)


def _scores(queries: Queries, k_BGLK: jax.Array, scale: float) -> jax.Array:
    """`s_BGmL`, minus infinity where the query does not see the key."""
    q_BGmK = by_kv_head(queries.q_BlHK, k_BGLK.shape[1])
    s_BGmL = applied(queries.pairs, product("BGmK,BGLK->BGmL", q_BGmK, k_BGLK) * scale, queries.q_BlHK.shape[1])
    seen = queries.mask.sees(jnp.arange(k_BGLK.shape[2]))
    seen_BlL = seen if seen.ndim == 3 else seen[None]
    return jnp.where(jnp.tile(seen_BlL, (1, s_BGmL.shape[2] // seen_BlL.shape[1], 1))[:, None], s_BGmL, -jnp.inf)


def _dropped(x_BGmL: jax.Array, dropout: PairDropout | None) -> jax.Array:
    if dropout is None:
        return x_BGmL
    stream_BGm1 = by_kv_head(dropout.stream_BlH[..., None], x_BGmL.shape[1])
    position_B11L = jnp.arange(x_BGmL.shape[3])[None, None, None]
    if dropout.first_B is not None:
        position_B11L = position_B11L + dropout.first_B[:, None, None, None]
    return dropped(x_BGmL, stream_BGm1, position_B11L, dropout.rate)
