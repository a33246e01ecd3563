"""Attention to another sequence: other lengths, other layouts, against a dense float32 oracle on one device.

Queries are of a sequence of 41 tokens and keys of a source of 93, so that nothing divides either, and each row of the
batch has a length of its own on both sides: padding sees nothing, and nobody sees the source's padding.
"""

import dataclasses
import itertools
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import BOUNDS, QUICK, B, H, K, Results, oracle
from helpers import assert_close, mesh_of, sampled
from jax.sharding import PartitionSpec as P
from oracle import dropout_factors
from oracle import hashed as plain_hash

from lss_jax.attention.head_groups import in_head_groups
from lss_jax.attention.kernels.targets import TARGETS
from lss_jax.attention.mask import Intervals
from lss_jax.attention.setting import Setting
from lss_jax.attention.strategies import EXACT, make_attend
from lss_jax.parallel.dropout import Dropout
from lss_jax.parallel.hashing import hashed
from lss_jax.parallel.layout import CHUNKS_PER_DEVICE, Layout
from lss_jax.parallel.mesh import DATA, SEQ, without_unsharded

pytestmark = pytest.mark.usefixtures("strict_ranks")

QUERIES, KEYS = 41, 93
QUERIES_B, KEYS_B = np.array([[41], [29]]), np.array([[93], [50]])  # of each row
RATE = 0.3


@dataclasses.dataclass(frozen=True)
class Case:
    """One program of attention to another sequence; its string is the name of its tests."""

    strategy: str
    layouts: tuple[str, str] = ("contiguous", "contiguous")  # of the queries, of the keys
    seq: int = 1
    data: int = 1
    kernel: str = "blockwise"
    kv_heads: int = 8
    blocks: tuple[int, int] = (8, 8)
    head_groups: int = 1
    regather: bool = False

    def __str__(self) -> str:
        parts = [self.strategy, *self.layouts, f"{self.data}x{self.seq}", self.kernel, f"{self.kv_heads}of{H}"]
        return "-".join([*parts, "by".join(map(str, self.blocks))] + [f"{self.head_groups}groups"] * self.regather)

    @property
    def orders(self) -> tuple[Layout, Layout]:
        return Layout(self.layouts[0], self.seq), Layout(self.layouts[1], self.seq)

    @property
    def lengths(self) -> tuple[int, int]:
        """Queries and keys, with padding."""
        return self.orders[0].padded(QUERIES), self.orders[1].padded(KEYS)


@lru_cache(maxsize=2)
def program(case: Case):
    """The strategy inside `shard_map`: global arrays in layout order, intervals and dropout (or None) to `Results`."""
    mesh = mesh_of(case.data, case.seq)
    x_spec, rows_spec, sequence_spec = (without_unsharded(spec, mesh) for spec in (P(DATA, SEQ), P(DATA), P(SEQ)))
    axis = SEQ if case.seq > 1 else None
    setting = Setting(axis, *case.orders, case.kernel, *case.blocks, case.regather, interpret=True, approximation=None)

    def on_device(q_BlHK, k_BsGK, v_BsGK, do_BlHK, mask, dropout):
        attend = partial(in_head_groups(make_attend(case.strategy, mask, setting), case.head_groups), dropout=dropout)
        o_BlHK, transpose = jax.vjp(attend, q_BlHK, k_BsGK, v_BsGK)
        return Results(o_BlHK, *transpose(do_BlHK))

    @partial(jax.jit, compiler_options=QUICK)
    def on_mesh(q, k, v, do, mask, dropout):
        dropout_spec = dropout and Dropout(P(), P(), rows_spec, sequence_spec, P())
        in_specs = (*[x_spec] * 4, Intervals(x_spec, x_spec), dropout_spec)
        checked = case.kernel not in TARGETS  # as in `attention_cases`
        segments = jax.shard_map(on_device, mesh=mesh, in_specs=in_specs, out_specs=x_spec, check_vma=checked)
        return segments(q, k, v, do, mask, dropout)

    return on_mesh


def attended(case: Case, arrays, mask: Intervals, dropout: Dropout | None = None) -> dict[str, np.ndarray]:
    """What the strategy makes of whole `q, k, v, do` in natural order."""
    of_queries, of_keys = (order.positions(length) for order, length in zip(case.orders, case.lengths, strict=True))
    orders = (of_queries, of_keys, of_keys, of_queries)
    in_layout = [x[:, order] for x, order in zip(arrays, orders, strict=True)]
    mask = Intervals(*(np.asarray(x, np.int32)[..., of_queries] for x in mask))
    results = program(case)(*in_layout, mask, dropout and dropout._replace(position_l=of_queries))
    back = (of_queries, of_queries, of_keys, of_keys)
    whole = [np.asarray(x)[:, np.argsort(order)] for x, order in zip(results, back, strict=True)]
    return Results(*whole)._asdict()


def arrays_of(case: Case) -> list[np.ndarray]:
    """Random `q, k, v, do`, with something in the padding too."""
    random = np.random.default_rng(0)
    queries, keys = case.lengths
    shapes = [(B, queries, H, K), (B, keys, case.kv_heads, K), (B, keys, case.kv_heads, K), (B, queries, H, K)]
    return [random.standard_normal(shape, np.float32) for shape in shapes]


def masks_of(case: Case) -> dict[str, Intervals]:
    queries, keys = case.lengths
    position = np.arange(queries)
    start = np.zeros((B, queries), int)
    anything_2Bl = np.random.default_rng(1).integers(0, keys + 1, (2, B, queries))
    return {
        "all of the source": Intervals(start, np.where(position < QUERIES_B, KEYS_B, 0)),
        "anything": Intervals(*anything_2Bl),
    }


def seen_by(mask: Intervals, keys: int) -> np.ndarray:
    """`[B, l, s]`"""
    key_s = np.arange(keys)
    return (mask.start[..., None] <= key_s) & (key_s < mask.end[..., None])


def check(case: Case) -> None:
    arrays = arrays_of(case)
    for name, mask in masks_of(case).items():
        right = oracle(*arrays, seen_by(mask, case.lengths[1]))._asdict()
        assert_close({name: attended(case, arrays, mask)}, {name: right}, BOUNDS["float32"])


LAYOUTS = list(itertools.product(CHUNKS_PER_DEVICE, CHUNKS_PER_DEVICE))
CASES = [
    Case(strategy, layouts, seq, blocks=blocks)
    for strategy in EXACT
    for (layouts, blocks), seq in itertools.product(
        zip(LAYOUTS, [(8, 8), (7, 5), (64, 64), (8, 16)], strict=True), (1, 3, 8)
    )
]
OTHERS = [
    *(Case(strategy, LAYOUTS[1], 3, kernel="dense") for strategy in ("lss", "ulysses")),
    *(Case(strategy, LAYOUTS[2], 2, kernel=kernel) for strategy in ("lss", "ulysses") for kernel in TARGETS),
    *(Case(strategy, LAYOUTS[1], 2, data=2, head_groups=4) for strategy in EXACT),
    *(Case(strategy, LAYOUTS[2], 4, head_groups=2, regather=True) for strategy in ("lss", "ulysses")),
    *(Case(strategy, LAYOUTS[3], 4, kv_heads=1) for strategy in EXACT),
]
SAMPLE = [
    Case("lss", LAYOUTS[1], 8, blocks=(7, 5)),
    Case("ring", LAYOUTS[2], 3, blocks=(64, 64)),
    Case("ulysses", LAYOUTS[1], 3, kernel="dense"),
]


@pytest.mark.parametrize("case", sampled([*CASES, *OTHERS], SAMPLE), ids=str)
def test_attention_to_another_sequence_equals_the_oracle(case):
    check(case)


DROPPING = [
    Case("lss", LAYOUTS[1], 3),
    Case("ring", LAYOUTS[2], 4),
    Case("ulysses", LAYOUTS[3], 4),
    Case("lss", LAYOUTS[2], 2, data=2, kernel="dense"),
    Case("lss", head_groups=4),
]


@pytest.mark.parametrize("case", sampled(DROPPING, DROPPING[:1]), ids=str)
def test_dropout_is_by_the_natural_positions_of_both_sides(case):
    """One table of factors tells the results of every strategy, mesh and layout."""
    arrays, mask = arrays_of(case), masks_of(case)["all of the source"]
    queries, keys = case.lengths
    dropout = Dropout(RATE, hashed(7, 1), np.arange(B), np.arange(queries, dtype=np.int32), 0)
    factor_BHLL = dropout_factors(RATE, int(plain_hash(7, 1)[0]), B, H, max(case.lengths))
    right = oracle(*arrays, seen_by(mask, keys), factor_BHLL[:, :, :queries, :keys])
    assert_close(attended(case, arrays, mask, dropout), right._asdict(), BOUNDS["float32"])


def own_part_everywhere(x, axis_name):
    """In place of an all-gather."""
    return jnp.stack([x] * jax.lax.axis_size(axis_name))


def own_share(x, axis_name):
    """In place of a reduce-scatter: no other device's share is added."""
    return x[jax.lax.axis_index(axis_name)]


WRONG = {
    "keys and values are not gathered": ("lss", "all_gather", own_part_everywhere, "o"),
    "their gradients are not summed": ("lss", "psum_scatter", own_share, "dk"),
    "keys and values stay": ("ring", "ppermute", lambda x, axis_name, perm: x, "o"),
    "no head is exchanged": ("ulysses", "all_to_all", lambda x, *args, **kwargs: x, "o"),
}


@pytest.fixture
def mutated(monkeypatch):
    """For programs that are traced with a mutation, and are not to be used again."""
    program.cache_clear()
    yield monkeypatch
    program.cache_clear()


@pytest.mark.parametrize("name", sampled(WRONG, list(WRONG)[:2]))
def test_a_wrong_collective_is_seen(name, mutated):
    strategy, function, wrong, spoiled = WRONG[name]
    mutated.setattr(jax.lax, function, wrong)
    with pytest.raises(AssertionError, match=rf"\['all of the source'\]\['{spoiled}'\]"):
        check(Case(strategy, LAYOUTS[1], 2))


def test_keys_in_the_layout_of_the_queries_are_seen(mutated):
    real = Setting

    def alike(axis, layout, key_layout, *others, **options):
        return real(axis, layout, layout, *others, **options)

    mutated.setitem(globals(), "Setting", alike)
    with pytest.raises(AssertionError, match="relative error"):
        check(Case("lss", LAYOUTS[1], 3))
