"""Strategies that are not exact as functions of whole arrays in natural order, and a dense oracle of each."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from attention_cases import QUICK, Results
from helpers import assert_close, mesh_of
from jax.sharding import PartitionSpec as P
from oracle import dropout_factors
from oracle import hashed as plain_hash

from lss_jax.attention.head_groups import in_head_groups
from lss_jax.attention.mask import Intervals, MaskKind
from lss_jax.attention.performer import random_features
from lss_jax.attention.setting import Approximation, Setting
from lss_jax.attention.strategies import make_attend
from lss_jax.parallel.dropout import Dropout
from lss_jax.parallel.hashing import hashed
from lss_jax.parallel.layout import Layout
from lss_jax.parallel.mesh import DATA, SEQ, without_unsharded

LONGFORMER = {"attention__strategy": "longformer", "attention__layout": "contiguous", "attention__window": 8}
PERFORMER = {"attention__strategy": "performer", "attention__features": 16}
LINEAR = {"attention__strategy": "linear"}

B, H, K = 2, 6, 8
TOKENS = 45  # of which 3 devices have equal parts; the others need padding
SEED, FEATURES = 3, 20
ENDS = np.array([TOKENS, 31])  # of rows that are padded


@dataclasses.dataclass(frozen=True)
class Case:
    """One program; its string is the name of its tests."""

    strategy: str
    causal: bool
    data: int = 1
    seq: int = 1
    layout: str = "contiguous"
    kv_heads: int = H
    window: int = 7
    global_tokens: int = 3
    block: int = 5
    head_groups: int = 1
    padded: bool = False
    rate: float = 0.0

    def __str__(self) -> str:
        return "-".join(f"{value}" for value in dataclasses.astuple(self))

    @property
    def order(self) -> Layout:
        return Layout(self.layout, self.seq)

    @property
    def length(self) -> int:
        return self.order.padded(TOKENS)

    @property
    def setting(self) -> Setting:
        kind = MaskKind(self.causal, 0, 0, documents=False, padded=self.padded)
        told = Approximation(kind, self.window, self.global_tokens, FEATURES, SEED)
        axis = SEQ if self.seq > 1 else None
        orders, blocks = (self.order, self.order), (self.block, self.block)
        return Setting(axis, *orders, "blockwise", *blocks, regather=False, interpret=True, approximation=told)

    def mask(self) -> Intervals:
        """What the task shows: all tokens of a row, or each one and those before it; nothing to padding."""
        position_L = np.arange(self.length)
        ends = ENDS[:, None] if self.padded else TOKENS
        end = np.where(position_L < ends, np.minimum(position_L + 1, ends) if self.causal else ends, 0)
        return Intervals(np.zeros_like(end, np.int32), end.astype(np.int32))


def program(case: Case):
    mesh = mesh_of(case.data, case.seq)
    x_spec, rows_spec, sequence_spec = (without_unsharded(spec, mesh) for spec in (P(DATA, SEQ), P(DATA), P(SEQ)))
    mask_spec = x_spec if case.padded else sequence_spec
    dropout_spec = Dropout(P(), P(), rows_spec, sequence_spec, P()) if case.rate else None

    @partial(jax.jit, compiler_options=QUICK)
    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(*[x_spec] * 4, Intervals(mask_spec, mask_spec), dropout_spec),
        out_specs=x_spec,
    )
    def on_mesh(q_BlHK, k_BlGK, v_BlGK, do_BlHK, mask, dropout):
        attend = in_head_groups(make_attend(case.strategy, mask, case.setting), case.head_groups)
        o_BlHK, transpose = jax.vjp(lambda *arrays: attend(*arrays, dropout), q_BlHK, k_BlGK, v_BlGK)
        return Results(o_BlHK, *transpose(do_BlHK))

    return on_mesh


def arrays_of(case: Case) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    shapes = [(B, case.length, heads, K) for heads in (H, case.kv_heads, case.kv_heads, H)]
    return [random.standard_normal(shape, np.float32) for shape in shapes]


def arguments(case: Case) -> tuple[Any, ...]:
    """In layout order."""
    position_l = case.order.positions(case.length)
    arrays = [x[:, position_l] for x in arrays_of(case)]
    dropout = Dropout(case.rate, hashed(7), np.arange(B), position_l, 0) if case.rate else None
    return (*arrays, Intervals(*(x[..., position_l] for x in case.mask())), dropout)


def attended(case: Case) -> Results:
    results = program(case)(*arguments(case))
    place_L = np.argsort(case.order.positions(case.length))
    return Results(*(np.asarray(x)[:, place_L] for x in results))


def weights_of(case: Case):
    """The strategy's weights of each key for each query before they are divided by their sum, from its paper."""
    if case.strategy == "linear":

        def feature(x):
            return jnp.where(x > 0, x + 1, jnp.exp(x))

        return lambda q, k: jnp.einsum("bqhd,bshd->bhqs", feature(q), feature(k))
    if case.strategy == "performer":
        w_DK = random_features(SEED, FEATURES, K)

        def feature(x):
            x = x / K**0.25
            features = jnp.exp(x @ w_DK.T - (x**2).sum(-1, keepdims=True) / 2)
            return features + 1e-6 * jax.lax.stop_gradient(features.max(-1, keepdims=True))

        return lambda q, k: jnp.einsum("bqhd,bshd->bhqs", feature(q), feature(k))
    return lambda q, k: jnp.exp(jnp.einsum("bqhk,bshk->bhqs", q, k) / K**0.5)


def seen_by(case: Case) -> np.ndarray:
    """`[B, L, L]`, dense."""
    i, j = np.ogrid[: case.length, : case.length]
    end_B11 = (ENDS if case.padded else np.full(B, TOKENS))[:, None, None]
    seen = (i < end_B11) & (j < end_B11) & ((j <= i) | (not case.causal))
    if case.strategy == "longformer":
        near = i - j < case.window if case.causal else (i - j <= case.window // 2) & (j - i <= (case.window - 1) // 2)
        seen &= near | (i < case.global_tokens) | (j < case.global_tokens)
    return seen


def oracle(case: Case) -> Results:
    q, k, v, do = arrays_of(case)
    repeats, weights, seen_BLL = H // case.kv_heads, weights_of(case), seen_by(case)
    factor = dropout_factors(case.rate, int(plain_hash(7)[0]), B, H, case.length) if case.rate else 1.0

    def attention(q, k, v):
        a = weights(q, jnp.repeat(k, repeats, 2)) * seen_BLL[:, None]
        total = a.sum(-1, keepdims=True)
        a = a / jnp.where(total > 0, total, 1.0) * factor
        return jnp.einsum("bhqs,bshk->bqhk", a, jnp.repeat(v, repeats, 2))

    with jax.default_matmul_precision("float32"):
        o, transpose = jax.vjp(attention, q, k, v)
        return Results(*map(np.asarray, (o, *transpose(do))))


def check(case: Case) -> None:
    assert_close(attended(case)._asdict(), oracle(case)._asdict(), 2e-5)
