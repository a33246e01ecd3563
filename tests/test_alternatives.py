"""Strategies that are not exact: each equal to a dense oracle of its own, on every mesh, forward and backward."""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import QUICK, Results
from helpers import (
    assert_close,
    batch_on,
    make_loss_and_gradient,
    mesh_of,
    model_on,
    perturbed_params,
    sampled,
    small_config,
)
from jax.interpreters.partial_eval import dce_jaxpr
from jax.sharding import PartitionSpec as P
from oracle import dropout_factors
from oracle import hashed as plain_hash

import lss_jax
from lss_jax.attention.head_groups import in_head_groups
from lss_jax.attention.mask import Intervals, MaskKind, causal
from lss_jax.attention.performer import random_features
from lss_jax.attention.setting import Approximation, Setting
from lss_jax.attention.strategies import EXACT, STRATEGIES, make_attend
from lss_jax.attention.traffic import Sizes
from lss_jax.config.schema import ConfigError
from lss_jax.generation.decode import task_and_text
from lss_jax.inspection import contract, hlo, operations, planner
from lss_jax.parallel.dropout import Dropout
from lss_jax.parallel.hashing import hashed
from lss_jax.parallel.layout import Layout
from lss_jax.parallel.mesh import DATA, SEQ, without_unsharded
from lss_jax.tasks.language_model import LanguageModel
from lss_jax.training.setup import validate
from lss_jax.training.step import trace_train_step

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
        return Setting(
            axis, self.order, "blockwise", self.block, self.block, regather=False, interpret=True, approximation=told
        )

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


MESHES = [(1, 1), (1, 8), (2, 4), (1, 3)]
CASES = [
    Case(strategy, causal, *mesh, layout=layout, kv_heads=kv_heads, padded=padded, block=block)
    for strategy in ("linear", "performer", "longformer")
    for causal in (True, False)
    for number, mesh in enumerate(MESHES)
    for layout in ("contiguous", "zigzag")
    if (strategy != "longformer" or layout == "contiguous") and (strategy != "performer" or mesh == (1, 3))
    for kv_heads, padded, block in [[(H, False, 5), (2, True, 4), (1, False, 64), (3, True, 3)][number]]
]
SAMPLE = [
    Case("linear", True, 2, 4, "zigzag", kv_heads=1, block=64),
    Case("performer", False, 1, 3, "zigzag", kv_heads=3, padded=True, block=3),
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
    return Sizes(B // case.data, case.length // case.seq, H // case.head_groups, case.kv_heads, K, 4)


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


# What they refuse

LONGFORMER = {"attention__strategy": "longformer", "attention__layout": "contiguous", "attention__window": 8}
PERFORMER = {"attention__strategy": "performer", "attention__features": 16}
LINEAR = {"attention__strategy": "linear"}
BAD = {
    "attention.window=4 makes a mask that attention.strategy='linear' cannot express; use attention.window=0": {
        **LINEAR,
        "attention__window": 4,
    },
    "attention.prefix=4 makes a mask that attention.strategy='performer' cannot express; use attention.prefix=0": {
        **PERFORMER,
        "attention__prefix": 4,
    },
    "packs documents that do not see one another, a mask that attention.strategy='longformer' cannot express": {
        **LONGFORMER,
        "data__separator": "a",
    },
    "model.dropout=0.1 drops attention weights too, which attention.strategy='linear' never has; use": {
        **LINEAR,
        "model__dropout": 0.1,
    },
    "attention.kernel='dense' is not for attention.strategy='linear', which is computed in blocks of its own": {
        **LINEAR,
        "attention__kernel": "dense",
    },
    'attention.features=0 leaves attention.strategy="performer" nothing to compute with; use': {
        "attention__strategy": "performer"
    },
    "attention.features=16 has no use with attention.strategy='lss', which has no random features": {
        "attention__features": 16
    },
    "attention.global_tokens=2 has no use with attention.strategy='linear', whose tokens see what": {
        **LINEAR,
        "attention__global_tokens": 2,
    },
    "attention.regather=True has no use with attention.strategy='linear'": {**LINEAR, "attention__regather": True},
    'attention.window=0 is no window, which attention.strategy="longformer" needs': {
        **LONGFORMER,
        "attention__window": 0,
    },
    "attention.layout='zigzag' puts tokens apart that attention.strategy=\"longformer\" keeps": {
        **LONGFORMER,
        "attention__layout": "zigzag",
    },
    "attention.global_tokens=7 are more than the 6 tokens of a segment (data.seq_len=48 over mesh.seq=8)": {
        **LONGFORMER,
        "attention__global_tokens": 7,
        "mesh__seq": 8,
    },
    "attention.features=-1 must be at least 0": {**PERFORMER, "attention__features": -1},
}


@pytest.mark.parametrize("message", BAD)
def test_what_they_cannot_do_is_one_line(message):
    with pytest.raises(ConfigError) as error:
        validate(small_config(**BAD[message]), 8)
    (line,) = [line for line in str(error.value).splitlines() if message in line]
    assert "; use " in line or "must be" in line


def test_a_task_that_does_not_say_its_mask_is_refused(monkeypatch):
    monkeypatch.setattr(LanguageModel, "mask_kind", None)
    validate(small_config(), 8)
    with pytest.raises(ConfigError, match=r"task='language_model' does not say what its mask is made of"):
        validate(small_config(**LINEAR), 8)


@pytest.mark.parametrize("strategy", [LINEAR, PERFORMER, LONGFORMER], ids=lambda config: config["attention__strategy"])
def test_they_generate_nothing(strategy):
    with pytest.raises(ConfigError, match=r"cannot generate: a step attends exactly .*; give a run of .*'lss', 'ring'"):
        task_and_text(small_config(**strategy))


def test_they_are_not_taken_for_exact_attention():
    x = np.zeros((1, 16, 2, 8), np.float32)
    with pytest.raises(ConfigError, match=r"strategy='linear' is not exact, which .*; use one of 'lss', 'ring', 'ulys"):
        lss_jax.dot_product_attention(x, x, x, mesh=mesh_of(1, 2), strategy="linear")


def test_a_plan_changes_no_model(monkeypatch):
    """Exact strategies stand in for one another; one that is not exact stands for itself alone."""

    def nothing(config, sizes, strategy, room):
        raise ConfigError(strategy)

    monkeypatch.setattr(planner, "roomiest", nothing)
    for config, names in ((small_config(), set(EXACT)), (small_config(**LINEAR), {"linear"})):
        _, impossible = planner.plan(config, 2, planner.Room(2**30, None))
        assert {one.strategy for one in impossible} == names


# In training

ENCODER = {"task": "masked_language_model", "model__family": "encoder", "model__vocab": 257}
TRAINING = {
    "linear": (
        {**LINEAR, "model__tied_head": False},
        {"mesh__shard": "all", "model__remat": "block", "model__tile": 6},
    ),
    "performer": (PERFORMER, {"model__remat": "input", "attention__head_groups": 2}),
    "longformer": (
        {**LONGFORMER, **ENCODER, "attention__global_tokens": 3},
        {"model__remat": "block", "attention__head_groups": 2, "model__tile": 6},
    ),
}


@pytest.mark.grid
@pytest.mark.parametrize("strategy", ["linear", "longformer"])
def test_a_step_is_the_same_on_every_mesh_with_all_that_makes_room(strategy):
    changes, room = TRAINING[strategy]
    found = {}
    for mesh, options in (((1, 1), {}), ((2, 4), room)):
        family, on = model_on(*mesh, **changes, **options)
        batch = batch_on(on, family.config)
        if family.config.task != "language_model":
            whole = jnp.broadcast_to(jnp.array([0, 48]).reshape(2, 1, 1), (2, 8, 48))
            batch = batch._replace(
                documents=jax.device_put(whole, batch.tokens.sharding.update(spec=P(None, DATA, SEQ)))
            )
        loss, gradient = jax.jit(make_loss_and_gradient(family, on))(perturbed_params(family), batch, 0)
        found[mesh] = {"loss": loss, "gradient": gradient}
    assert_close(found[2, 4], found[1, 1], 2e-5)


@pytest.mark.grid
@pytest.mark.parametrize("strategy", TRAINING)
def test_collectives_and_operations_of_a_step(strategy):
    changes, room = TRAINING[strategy]
    model, mesh = model_on(2, 2, 2, **changes, **room)
    traced = trace_train_step(model, mesh)
    found = contract.found(hlo.collectives(traced.lower().compile().as_text()), mesh)
    assert not contract.disagreements(found, contract.predicted(model, mesh))
    assert operations.traced(traced.jaxpr) == operations.outside_attention(model, mesh)
    assert operations.attention(model, mesh) > 0
