"""One suite for every strategy: attention and each gradient by name, against a dense float32 oracle on one device.

A strategy's class says what it can do, and what it cannot. The whole grid has the marker `grid`; what runs without it
has each mesh in each layout, with one strategy after the other, and everything else somewhere.
"""

import dataclasses
import itertools
from functools import cache, partial
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import (
    BOUNDS,
    QUICK,
    B,
    Case,
    H,
    K,
    Results,
    arrays_of,
    attended,
    check,
    masks_by_row,
    oracle,
    program,
    seen_by,
    shared_masks,
)
from helpers import assert_close, sampled, small_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from oracle import dropout_factors
from oracle import hashed as plain_hash

from lss_jax.attention.collectives import stacked
from lss_jax.attention.kernels import KERNELS, blockwise, tiles
from lss_jax.attention.kernels.interface import Queries, Residuals
from lss_jax.attention.mask import Intervals
from lss_jax.attention.setting import Scores, Setting
from lss_jax.attention.strategies import EXACT, STRATEGIES
from lss_jax.config.schema import ConfigError
from lss_jax.parallel.dropout import Dropout
from lss_jax.parallel.hashing import hashed
from lss_jax.parallel.layout import CHUNKS_PER_DEVICE, Layout
from lss_jax.training.setup import validate

pytestmark = pytest.mark.usefixtures("strict_ranks")

MESHES = [(1, 1), (1, 2), (1, 3), (1, 4), (1, 8), (2, 2), (2, 3), (2, 4)]  # data x seq
LAST = ("zigzag", *MESHES[-1])
KV_HEADS = [H, 8, 3, 1]  # of 24: one each, groups, fewer than devices, one for all
BLOCKS = [(8, 8), (7, 5), (64, 64)]  # several in a run, none that divides one, and runs too short for a block
DRAWS = settings(
    max_examples=30,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.differing_executors],  # the inherited tests are there for all classes
)


def grid_of(strategy: str, kernels: tuple[str, ...]):
    """All cases; most have the marker `grid`.

    Blockwise float32 meets all heads and masks everywhere, the other kernels and dtypes one choice of these per mesh
    and layout. That choice goes on from mesh to mesh, and from one layout to the other. Without the marker, every third
    of these choices is a strategy's own, and the last has all kernels: in float32 for lss, in bfloat16 for the others.
    """
    turn_of = list(EXACT).index(strategy)
    heads_and_masks = list(itertools.product(KV_HEADS, (False, True)))
    for place, (layout, (data, seq)) in enumerate(itertools.product(CHUNKS_PER_DEVICE, MESHES)):
        step = 3 * place + place // len(MESHES)
        for turn, (kv_heads, by_row) in enumerate(heads_and_masks):
            chosen = turn == step % len(heads_and_masks)
            blocks = BLOCKS[(place + turn) % len(BLOCKS)]
            for kernel, dtype in itertools.product(kernels, BOUNDS):
                case = Case(strategy, layout, data, seq, kv_heads, dtype, kernel, blocks, by_row=by_row)
                if (kernel, dtype) == ("blockwise", "float32"):
                    own = chosen and place % len(EXACT) == turn_of
                elif chosen:
                    in_turn = kernel == "blockwise" or (dtype == "float32") == (strategy == "lss")
                    own = (layout, data, seq) == LAST and in_turn
                else:
                    continue
                yield pytest.param(case, marks=[] if own else pytest.mark.grid)


def pytest_generate_tests(metafunc):
    """Each strategy's class says what its tests run over."""
    suite = metafunc.cls
    if suite is not None:
        over = {
            "case": suite.cases(),
            "dropout_case": suite.dropout_cases(),
            "mutation": sampled(suite.MUTATIONS, suite.SEEN_BY_DEFAULT or suite.MUTATIONS),
            "gap": suite.GAPS,
        }
        for argument in over.keys() & set(metafunc.fixturenames):
            metafunc.parametrize(argument, over[argument], ids=str)


@pytest.fixture
def mutated(monkeypatch):
    """For programs that are traced with a mutation, and are not to be used again."""
    program.cache_clear()
    yield monkeypatch
    program.cache_clear()


class Mutation(NamedTuple):
    """A wrong version, of the right type, of a function of `jax.lax`, and a result that it spoils."""

    function: str
    wrong: object  # of the real one
    spoiled: str


class Conformance:
    """What every strategy is held to."""

    STRATEGY: ClassVar[str]
    KERNELS: ClassVar[tuple[str, ...]] = ("blockwise", "triton", "mosaic", "dense")
    DROPPING: ClassVar[tuple[str, ...]] = ("blockwise", "dense")  # kernels whose dropout is tested by default
    GAPS: ClassVar[dict[str, tuple[dict, str]]]  # what it cannot do: changes of a config, and what is said of them
    MUTATIONS: ClassVar[dict[str, Mutation]]
    SEEN_BY_DEFAULT: ClassVar[tuple[str, ...]] = ()  # those of the mutations that are; or all

    @classmethod
    def cases(cls):
        return list(grid_of(cls.STRATEGY, cls.KERNELS))

    @classmethod
    def dropout_cases(cls):
        cases = [
            Case(cls.STRATEGY, "contiguous", 1, 3, 3),
            *(Case(cls.STRATEGY, "zigzag", 2, 4, 8, kernel=kernel, by_row=True) for kernel in cls.KERNELS[1:]),
        ]
        return sampled(cases, [case for case in cases if case.kernel in cls.DROPPING])

    def test_equals_the_oracle(self, case):
        check(case)

    def test_drops_the_same_weights_everywhere(self, dropout_case):
        """One table of factors, of the whole sequence and all heads, tells the results of every strategy."""
        check_dropout(dropout_case)

    @DRAWS
    @given(data=st.data())
    def test_takes_any_intervals(self, data):
        case = Case(self.STRATEGY, "zigzag", 1, 3, 3, blocks=(7, 5))
        mask = data.draw(intervals((case.length,), case.length))
        arrays = arrays_of(case.length, case.kv_heads)
        assert_close(attended(case, arrays, mask)._asdict(), oracle(*arrays, seen_by(mask))._asdict(), 1e-5)

    def test_a_gap_is_refused(self, gap):
        changes, message = self.GAPS[gap]
        with pytest.raises(ConfigError, match=message):
            validate(small_config(attention__strategy=self.STRATEGY, **changes), 8)

    def test_a_wrong_collective_is_seen(self, mutation, mutated):
        function, wrong, spoiled = self.MUTATIONS[mutation]
        mutated.setattr(jax.lax, function, wrong(getattr(jax.lax, function)))
        with pytest.raises(AssertionError, match=rf"\['causal'\]\['{spoiled}'\]"):
            check(Case(self.STRATEGY, seq=4, kv_heads=8, kernel=self.KERNELS[-1]))


def own_part_everywhere(_):
    """In place of an all-gather."""
    return lambda x, axis_name: jnp.stack([x] * jax.lax.axis_size(axis_name))


def own_share(_):
    """In place of a reduce-scatter: no other device's share is added."""
    return lambda x, axis_name: x[jax.lax.axis_index(axis_name)]


def nothing_sent(rank):
    """In place of a permutation of arrays of this rank."""
    return lambda real: lambda x, axis_name, perm: x if x.ndim == rank else real(x, axis_name, perm)


def sent_back(real):
    """A permutation in the wrong direction."""
    return lambda x, axis_name, perm: real(x, axis_name, [(to, sender) for sender, to in perm])


def kept_in_call(number):
    """In place of one of the all-to-alls."""

    def wrong(real):
        calls = itertools.count()
        return lambda x, *args, **kwargs: x if next(calls) == number else real(x, *args, **kwargs)

    return wrong


class TestLss(Conformance):
    STRATEGY = "lss"
    DROPPING = ("blockwise", "triton")
    GAPS: ClassVar = {
        "groups that do not divide the heads": (
            {"attention__head_groups": 3},
            "model.kv_heads=4 is not divisible by attention.head_groups=3",
        ),
    }
    MUTATIONS: ClassVar = {
        "keys and values are not gathered": Mutation("all_gather", own_part_everywhere, "o"),
        "their gradients are not summed": Mutation("psum_scatter", own_share, "dk"),
    }

    @classmethod
    def dropout_cases(cls):
        uncut = Case(cls.STRATEGY, kv_heads=8, kernel="dense")
        return [
            *super().dropout_cases(),
            *sampled([uncut, Case(cls.STRATEGY, "contiguous", 1, 4, 8, head_groups=4)], []),
        ]

    @pytest.mark.parametrize(
        "groups_and_regather",
        sampled([(2, False), (3, False), (6, False), (1, True), (3, True)], [(2, False), (3, True)]),
        ids=str,
    )
    def test_gathers_in_groups_and_again(self, groups_and_regather):
        groups, regather = groups_and_regather
        case = Case(self.STRATEGY, "zigzag", 2, 2, 6, blocks=(64, 64), head_groups=groups, regather=regather)
        check(case)
        arrays, mask = arrays_of(case.length, 6), shared_masks(case.length)["causal"]
        ungrouped = attended(dataclasses.replace(case, regather=False), arrays, mask)
        assert_close(attended(case, arrays, mask)._asdict(), ungrouped._asdict(), 1e-6)

    @pytest.mark.parametrize(
        ("kernel", "end"),
        [
            ("blockwise", "first"),
            pytest.param("blockwise", "last", marks=pytest.mark.grid),
            ("triton", "last"),
            pytest.param("triton", "first", marks=pytest.mark.grid),
            pytest.param("mosaic", "first", marks=pytest.mark.grid),
            pytest.param("mosaic", "last", marks=pytest.mark.grid),
        ],
    )
    def test_a_block_left_out_is_seen(self, kernel, end, mutated):
        """The range of blocks that a block touches is one too short."""
        module, function = (blockwise, "touched") if kernel == "blockwise" else (tiles, "range_of")
        real, ends = getattr(module, function), {"first": (1, 0), "last": (0, -1)}[end]

        def too_few(*args):
            first, stop = real(*args)
            return first + ends[0], stop + ends[1]

        mutated.setattr(module, function, too_few)
        with pytest.raises(AssertionError, match=r"\['window'\]\['o'\]"):
            check(Case(self.STRATEGY, seq=3, kv_heads=1, kernel=kernel))


class TestRing(Conformance):
    STRATEGY = "ring"
    KERNELS = ("blockwise",)
    GAPS: ClassVar = {
        "the dense kernel": (
            {"attention__kernel": "dense", "mesh__seq": 4},
            "attention.kernel='dense' cannot take keys as they come by",
        ),
        "regather": ({"attention__regather": True}, "attention.regather=True has no use"),
    }
    MUTATIONS: ClassVar = {
        "keys and values stay": Mutation("ppermute", nothing_sent(rank=5), "o"),
        "their gradients stay": Mutation("ppermute", nothing_sent(rank=6), "dk"),
        "all go the wrong way round": Mutation("ppermute", sent_back, "o"),
    }


class TestUlysses(Conformance):
    STRATEGY = "ulysses"
    GAPS: ClassVar = {
        "heads that the devices do not divide": (
            {"model__heads": 4, "mesh__seq": 8},
            "model.heads=4 is not divisible by mesh.seq=8",
        ),
        "groups of fewer heads than devices": (
            {"model__heads": 4, "mesh__seq": 4, "attention__head_groups": 2},
            "model.heads=4 is not divisible by mesh.seq=4 times attention.head_groups=2",
        ),
    }
    MUTATIONS: ClassVar = {
        "the intervals are not gathered": Mutation("all_gather", own_part_everywhere, "o"),
        "queries, keys and values stay": Mutation("all_to_all", kept_in_call(0), "o"),
        "rows stay": Mutation("all_to_all", kept_in_call(1), "o"),
        "the cotangent of rows stays": Mutation("all_to_all", kept_in_call(2), "dq"),
        "gradients stay": Mutation("all_to_all", kept_in_call(3), "dk"),
    }
    SEEN_BY_DEFAULT = ("the intervals are not gathered", "queries, keys and values stay", "gradients stay")


def test_every_exact_strategy_is_here():
    assert {suite.STRATEGY for suite in Conformance.__subclasses__()} == set(EXACT)


def test_a_new_strategy_is_one_line(monkeypatch):
    """Its entry is all that the config and its rules ask for."""
    monkeypatch.setitem(STRATEGIES, "new", STRATEGIES["ring"])
    validate(small_config(attention__strategy="new", mesh__seq=4), 8)
    with pytest.raises(ConfigError, match=r"regather=True has no use with attention\.strategy='new'"):
        validate(small_config(attention__strategy="new", attention__regather=True), 8)
    with pytest.raises(ConfigError, match=r"'other' is not known; choose one of 'lss', .*, 'new'"):
        validate(small_config(attention__strategy="other"), 8)


RATE = 0.3


def some_dropout(length: int, *coordinates: int) -> Dropout:
    """In natural order."""
    return Dropout(RATE, hashed(7, *coordinates), np.arange(B), np.arange(length, dtype=np.int32), 0)


@cache
def factors(length: int, *coordinates: int) -> np.ndarray:
    """What dropout multiplies each attention weight by, `[B, H, L, L]`: 0, or a bit more than 1."""
    return dropout_factors(RATE, int(plain_hash(7, *coordinates)[0]), B, H, length)


def check_dropout(case: Case) -> None:
    length = case.length
    mask = masks_by_row(length)["documents"] if case.by_row else shared_masks(length)["causal, no padding"]
    arrays = arrays_of(length, case.kv_heads)
    right = oracle(*arrays, seen_by(mask), factors(length))
    assert_close(attended(case, arrays, mask, some_dropout(length))._asdict(), right._asdict(), 1e-5)


def test_dropout_drops_at_its_rate_and_keeps_the_mean():
    factors_BHLL = factors(96)
    noise = (RATE * (1 - RATE) / factors_BHLL.size) ** 0.5
    assert set(np.unique(factors_BHLL)) == {np.float32(0), np.float32(1) / np.float32(1 - RATE)}
    assert abs((factors_BHLL == 0).mean() - RATE) < 5 * noise
    assert abs(factors_BHLL.mean() - 1) < 5 * noise / (1 - RATE)


def test_dropout_has_another_pattern_for_each_row_head_query_key_layer_and_step():
    factors_XBHLL = np.stack([factors(96, step, layer) for step in (0, 1) for layer in (0, 1)])
    for axis in range(5):
        patterns = np.moveaxis(factors_XBHLL, axis, 0).reshape(factors_XBHLL.shape[axis], -1)
        largest = np.abs(np.corrcoef(patterns) - np.eye(len(patterns))).max()
        assert largest < 6 / patterns.shape[1] ** 0.5, f"patterns along axis {axis} are alike"


def test_dropout_repeats_no_pattern_between_blocks():
    blocks = factors(96).reshape(-1, 12, 8, 12, 8).swapaxes(2, 3).reshape(-1, 64)
    assert len(np.unique(blocks, axis=0)) == len(blocks)


def intervals(shape: tuple[int, ...], length: int):
    """Any intervals `[..., l]` of `length` keys, also empty, reversed, or beyond the ends.

    The first query sees all, so that there is something to measure errors by: of a lone key the gradient is zero, and
    what is computed is noise.
    """

    def with_a_scale(start_end_2l):
        start_end_2l[0, ..., 0], start_end_2l[1, ..., 0] = 0, length
        return Intervals(*start_end_2l)

    any_key = st.integers(-3, length + 3)
    return npst.arrays(np.int32, (2, *shape), elements=any_key, fill=st.nothing()).map(with_a_scale)


class Shape(NamedTuple):
    """What a kernel is compiled for; its queries are `queries` many, at any positions."""

    kernel: str
    layout: str
    segments: int
    segment_length: int
    kv_heads: int
    blocks: tuple[int, int]
    by_row: bool


SHAPES = [
    Shape("blockwise", "contiguous", 1, 13, 6, (4, 5), True),
    Shape("blockwise", "contiguous", 3, 7, 2, (5, 4), False),
    Shape("blockwise", "zigzag", 2, 10, 1, (3, 4), True),
    Shape("blockwise", "zigzag", 3, 8, 3, (4, 2), False),
    Shape("blockwise", "zigzag", 4, 6, 2, (64, 64), True),
    Shape("triton", "contiguous", 2, 40, 6, (16, 16), True),
    Shape("triton", "zigzag", 2, 66, 2, (32, 16), False),
    Shape("mosaic", "contiguous", 1, 50, 1, (16, 32), False),
    Shape("mosaic", "zigzag", 3, 34, 3, (16, 16), True),
    Shape("dense", "contiguous", 1, 13, 2, (8, 8), True),
    Shape("dense", "zigzag", 3, 6, 3, (8, 8), False),
]


@partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def kernel_alone(shape: Shape, q_BlHK, k_BLGK, v_BLGK, do_BlHK, mask) -> Results:
    """A kernel as one device runs it, outside `shard_map`: whole keys in natural order to `Results`."""
    layout = Layout(shape.layout, shape.segments)
    setting = Setting(
        None, layout, layout, shape.kernel, *shape.blocks, regather=False, interpret=True, approximation=None
    )
    kernel = KERNELS[shape.kernel]
    kv_N2BGlK = layout.segments(stacked(k_BLGK, v_BLGK), 3)
    queries = Queries(q_BlHK, mask, None, None)
    output = kernel.forward(queries, kv_N2BGlK, setting)
    dqueries, dkv_N2BGKl = kernel.backward(Residuals(queries, kv_N2BGlK, output), do_BlHK, setting)
    dk_BLGK, dv_BLGK = layout.natural(dkv_N2BGKl, 5).transpose(0, 1, 4, 2, 3)
    return Results(output.o_BlHK, dqueries.q_BlHK, dk_BLGK, dv_BLGK)


@pytest.mark.parametrize(
    "shape", sampled(SHAPES, [SHAPES[i] for i in (3, 6, 8, 9)]), ids=lambda shape: "-".join(map(str, shape))
)
@DRAWS
@given(data=st.data())
def test_kernels_take_any_intervals(shape, data):
    length, l, heads = shape.segments * shape.segment_length, shape.segment_length, 6
    random = np.random.default_rng(0)
    sizes = ((l, heads), (length, shape.kv_heads), (length, shape.kv_heads), (l, heads))
    arrays = [random.standard_normal((B, *size, K), np.float32) for size in sizes]
    mask = data.draw(intervals((B, l) if shape.by_row else (l,), length))
    right = oracle(*arrays, seen_by(mask, length))
    assert_close(kernel_alone(shape, *arrays, mask)._asdict(), right._asdict(), 1e-5)


@pytest.mark.parametrize("by_row", [False, True], ids=["shared_masks", "masks_by_row"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_gives_the_log_sum_exp_at_any_scale(kernel, by_row):
    """Minus infinity where a query sees nothing, which is zero to those who do not ask."""
    layout, length = Layout("zigzag", 2), 40
    scores = Scores(scale=0.7, residual=True, precision=None)
    setting = Setting(None, layout, layout, kernel, 16, 16, False, interpret=True, approximation=None, scores=scores)
    q_BLHK, k_BLGK, v_BLGK, _ = arrays_of(length, 8)
    start, end = np.arange(length) // 3, np.arange(length) % 5 * 9
    mask = Intervals(*(np.stack((x, x[::-1])) if by_row else x for x in (start, end)))
    kv_N2BGlK = layout.segments(stacked(k_BLGK, v_BLGK), 3)
    output = jax.jit(KERNELS[kernel].forward, static_argnums=2)(Queries(q_BLHK, mask, None, None), kv_N2BGlK, setting)
    s_BHLL = np.einsum("bqhk,bshk->bhqs", q_BLHK, np.repeat(k_BLGK, H // 8, 2)) * 0.7
    with np.errstate(divide="ignore"):
        expected_BHL = np.log((np.exp(s_BHLL) * seen_by(mask, length)[:, None]).sum(-1))
    found_BHL = np.asarray(output.lse_BlH).swapaxes(1, 2)
    np.testing.assert_array_equal(np.isneginf(found_BHL), np.isneginf(expected_BHL))
    assert np.isneginf(expected_BHL).any()
    np.testing.assert_allclose(found_BHL, expected_BHL, rtol=1e-5, atol=1e-5)
