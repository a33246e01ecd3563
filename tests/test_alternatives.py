"""Strategies that are not exact: each equal to a dense oracle of its own, on every mesh, forward and backward."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from alternative_cases import B, Case, H, K, arguments, arrays_of, check, program, weights_of
from helpers import sampled
from jax.interpreters.partial_eval import dce_jaxpr

from lss_jax.attention.mask import causal
from lss_jax.attention.performer import random_features
from lss_jax.attention.strategies import EXACT, STRATEGIES, make_attend
from lss_jax.attention.traffic import Sizes
from lss_jax.inspection import hlo

MESHES = [(1, 1), (1, 8), (2, 4), (1, 3)]
CASES = [
    Case(strategy, is_causal, *mesh, layout=layout, kv_heads=kv_heads, padded=padded, block=block)
    for strategy in ("linear", "performer", "longformer")
    for is_causal in (True, False)
    for number, mesh in enumerate(MESHES)
    for layout in ("contiguous", "zigzag")
    if (strategy != "longformer" or layout == "contiguous") and (strategy != "performer" or mesh == (1, 3))
    for kv_heads, padded, block in [[(H, False, 5), (2, True, 4), (1, False, 64), (3, True, 3)][number]]
]
SAMPLE = [
    Case("linear", True, 2, 4, "zigzag", kv_heads=1, block=64),
    Case("longformer", False, 1, 8, kv_heads=2, padded=True, block=4),
]
OTHERS = [
    Case("linear", True, 1, 4, "zigzag", kv_heads=2, head_groups=2),
    Case("longformer", True, 1, 4, window=30, global_tokens=11),  # a halo of three devices, a segment of global tokens
    Case("longformer", False, 2, 4, window=100, global_tokens=1),  # more than there is
    Case("longformer", True, 1, 2, global_tokens=0),
    Case("longformer", False, 1, 3, rate=0.3, head_groups=3),
    Case("longformer", True, 1, 1, window=1, rate=0.3),
]


@pytest.mark.parametrize("case", sampled(CASES + OTHERS, SAMPLE), ids=str)
def test_equals_the_oracle(case):
    check(case)


@pytest.mark.parametrize("strategy", ["linear", "performer", "longformer"])
def test_every_strategy_that_is_not_exact_is_here(strategy):
    assert strategy in STRATEGIES.keys() - EXACT.keys() and len(STRATEGIES) - len(EXACT) == 3


def own_everywhere(x, axis_name):
    """In place of an all-gather."""
    return jnp.stack([x] * jax.lax.axis_size(axis_name))


REAL_PSUM = jax.lax.psum
MUTATIONS = {
    "states are not exchanged": (Case("linear", True, 1, 4), "all_gather", own_everywhere),
    "halos stay": (Case("longformer", True, 1, 4), "ppermute", lambda x, axis, moves: x),
    "global tokens are not fetched": (
        Case("longformer", False, 1, 4),
        "psum",
        lambda x, axis: REAL_PSUM(jnp.zeros_like(x), axis),
    ),
    "nobody else answers them": (Case("longformer", False, 1, 4), "all_gather", own_everywhere),
}


@pytest.mark.grid
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_wrong_collective_is_seen(mutation, monkeypatch):
    case, function, wrong = MUTATIONS[mutation]
    monkeypatch.setattr(jax.lax, function, wrong)
    with pytest.raises(AssertionError, match="relative error"):
        check(case)


# What they send, and what they compute


def sizes(case: Case) -> Sizes:
    l = case.length // case.seq
    return Sizes(B // case.data, l, l, H // case.head_groups, case.kv_heads, K, 4)


PROGRAMS = [
    Case("linear", True, 1, 8, "zigzag", kv_heads=2),
    Case("linear", False, 1, 8, "zigzag", kv_heads=2),
    Case("performer", True, 1, 3, kv_heads=3),
    Case("longformer", True, 1, 8, window=15),
    Case("longformer", False, 1, 8, kv_heads=2),
]


@pytest.mark.parametrize("case", sampled(PROGRAMS, PROGRAMS[:1]), ids=str)
def test_what_is_sent_is_what_is_predicted(case):
    text = program(case).lower(*arguments(case)).compile().as_text()
    found = sorted((one.kind, one.elements, one.bytes) for one in hlo.collectives(text) for _ in range(one.times))
    traffic = STRATEGIES[case.strategy].traffic(sizes(case), case.setting)
    assert found == sorted(
        (one.kind, one.elements, one.bytes) for way in traffic.values() for one in way for _ in range(one.times)
    )


def test_what_is_sent_does_not_grow_with_the_sequence():
    """The states of linear attention, and a window's halo: the same for sixteen times the tokens."""
    for strategy in ("linear", "performer", "longformer"):
        case = Case(strategy, True, 1, 8, window=5)
        short, long = (
            STRATEGIES[strategy].traffic(dataclasses.replace(sizes(case), l=l), case.setting) for l in (64, 1024)
        )
        assert short == long


def products(jaxpr) -> int:
    """Operations of all matrix products, every loop as often as it runs."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            operand, result = equation.invars[0].aval, equation.outvars[0].aval
            total += 2 * math.prod(operand.shape[axis] for axis in contracted) * math.prod(result.shape)
        inner = [leaf for leaf in jax.tree.leaves(list(equation.params.values())) if hasattr(leaf, "eqns")]
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        total += times * sum(products(getattr(leaf, "jaxpr", leaf)) for leaf in inner)
    return total


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("strategy", ["linear", "performer"])
def test_operations_are_those_of_the_traced_program(strategy, is_causal):
    case = Case(strategy, is_causal, kv_heads=3, block=4)
    q, k, v, do = arrays_of(case)

    def forward(q, k, v):
        return make_attend(strategy, case.mask(), case.setting)(q, k, v)

    def both(q, k, v, do):
        o, transpose = jax.vjp(forward, q, k, v)
        return o, transpose(do)

    predicted = STRATEGIES[strategy].operations(lambda _: case.mask(), sizes(case), case.setting)
    for function, arrays, expected in (
        (forward, (q, k, v), predicted.forward),
        (both, (q, k, v, do), predicted.training),
    ):
        jaxpr = jax.make_jaxpr(function)(*arrays).jaxpr
        used, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
        assert products(used) == expected


@pytest.mark.grid
def test_a_window_costs_its_width():
    """Twice the tokens take twice the operations, with blocks that the window fills."""
    costs = []
    for l in (128, 256):
        case = Case("longformer", True, window=32, global_tokens=4, block=16)
        costs.append(STRATEGIES["longformer"].operations(causal, dataclasses.replace(sizes(case), l=l), case.setting))
    assert 1.9 < costs[1].training / costs[0].training < 2.2
    assert costs[0].training == 3.5 * costs[0].forward


# Random features


def test_features_are_orthogonal_and_as_long_as_normal_vectors():
    w_DK = random_features(0, 32, 16).astype(np.float64)
    gram_KK = w_DK[:16] @ w_DK[:16].T
    assert np.abs(gram_KK - np.diag(np.diag(gram_KK))).max() < 1e-4
    lengths = np.linalg.norm(random_features(1, 1600, 16), axis=1)
    assert abs((lengths**2).mean() - 16) < 0.5
    assert np.array_equal(random_features(0, 8, 16), w_DK[:8].astype(np.float32)), "fewer are the first of more"


def test_more_features_come_nearer_to_softmax_attention():
    case = Case("performer", False)
    q, k, *_ = (x / 2 for x in arrays_of(case))
    exact = weights_of(dataclasses.replace(case, strategy="longformer"))(q, k)
    errors = []
    for features in (16, 4096):
        w_DK = random_features(0, features, K)
        phi = [jnp.exp(x / K**0.25 @ w_DK.T - (x**2).sum(-1, keepdims=True) / K**0.5 / 2) for x in (q, k)]
        approximate = jnp.einsum("bqhd,bshd->bhqs", *phi) / features
        errors.append(float(jnp.abs(approximate / exact - 1).mean()))
    assert errors[1] < 0.1 < errors[0]


def test_large_queries_and_keys_overflow_nothing():
    case = Case("performer", True, kv_heads=3, block=16)
    arguments_30 = [30 * x for x in arguments(case)[:4]]
    assert all(np.isfinite(x).all() for x in program(case)(*arguments_30, *arguments(case)[4:]))
