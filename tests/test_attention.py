"""The parts of attention one by one: dropout's hash, and what each collective moves."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import Case, attended
from helpers import assert_close, mesh_of, sampled
from jax.sharding import PartitionSpec as P

from lss_jax.attention import ring, ulysses
from lss_jax.attention.head_groups import in_head_groups
from lss_jax.attention.kernels import KERNELS
from lss_jax.attention.mask import Intervals, bidirectional, causal
from lss_jax.attention.setting import Setting
from lss_jax.attention.strategies import EXACT, make_attend
from lss_jax.config.schema import AttentionConfig, DataConfig
from lss_jax.data.corpus import ACLSUM
from lss_jax.data.kinds import KINDS
from lss_jax.data.sources import SOURCES
from lss_jax.parallel.dropout import Dropout
from lss_jax.parallel.hashing import hashed, mixed
from lss_jax.parallel.layout import CHUNKS_PER_DEVICE, Layout
from lss_jax.parallel.mesh import SEQ

# Dropout's hash


def test_each_bit_changes_each_bit_half_of_the_time():
    x = np.random.default_rng(0).integers(0, 2**32, 20_000, np.uint32)
    for bit in range(32):
        changed = np.asarray(mixed(x) ^ mixed(x ^ np.uint32(1 << bit)))
        often = ((changed[:, None] >> np.arange(32, dtype=np.uint32)) & 1).mean(0)
        assert np.abs(often - 0.5).max() < 0.03, (bit, often)


def test_no_two_small_numbers_have_one_hash():
    assert len(np.unique(mixed(jnp.arange(100_000)))) == 100_000


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.uint32, np.int64])
def test_a_hash_does_not_depend_on_the_dtype_of_a_coordinate(dtype):
    one, two = np.arange(100), np.arange(100)[::-1]
    expected = hashed(1, jnp.asarray(one, jnp.int32), jnp.asarray(two, jnp.int32))
    np.testing.assert_array_equal(hashed(jnp.uint32(1), one.astype(dtype), two.astype(dtype)), expected)
    assert hashed(1, 0, 99) == expected[0], "Python's numbers too"


def test_the_order_and_the_number_of_coordinates_count():
    coordinates = [(2, 3), (3, 2), (1, 2), (1, 2, 0), (1, 2, 0, 0)]
    assert len({int(hashed(0, *numbers)) for numbers in coordinates}) == len(coordinates)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])
def test_dropout_of_activations_drops_at_its_rate(rate):
    x_BlE = jnp.ones((4, 64, 128))
    found = np.asarray(Dropout(rate, hashed(0, 1), jnp.arange(4), jnp.arange(64), 0)(x_BlE))
    noise = (rate * (1 - rate) / found.size) ** 0.5
    assert abs((found == 0).mean() - rate) <= 5 * noise
    np.testing.assert_allclose(found[found > 0], 1 / (1 - rate), rtol=1e-6)


def test_dropout_of_a_part_is_that_part_of_dropout():
    x_BlE = jax.random.normal(jax.random.key(0), (4, 12, 16))
    whole = Dropout(0.5, hashed(0, 1), jnp.arange(4), jnp.arange(12), 0)
    place_l = np.array([9, 2, 3])
    part = whole._replace(row_B=jnp.arange(2, 4), position_l=place_l)
    np.testing.assert_array_equal(part(x_BlE[2:, place_l]), whole(x_BlE)[2:, place_l])
    assert not np.array_equal(whole.at(1)(x_BlE), whole.at(2)(x_BlE)), "another layer drops others"


# What collectives move


def setting_on(layout: Layout) -> Setting:
    return Setting(
        SEQ if layout.devices > 1 else None,
        layout,
        layout,
        "blockwise",
        8,
        8,
        regather=False,
        interpret=True,
        approximation=None,
    )


@pytest.mark.parametrize("strategy", EXACT)
def test_each_device_gets_another_one_s_keys_and_gives_back_their_gradients(strategy):
    """Rank-coded: device i sees the keys of device i + 3, whose values are their rank; its cotangents are 10**i."""
    case = Case(strategy, seq=8)
    rank_L = np.arange(8).repeat(case.length // 8)
    asked_L = (rank_L + 3) % 8
    zeros = np.zeros((1, case.length, 8, 1), np.float32)
    ranks, powers = (zeros + x[:, None, None].astype(np.float32) for x in (rank_L, 10.0**rank_L))
    mask = Intervals(*((asked_L + side) * (case.length // 8) for side in (0, 1)))
    results = attended(case, (zeros, zeros, ranks, powers), mask)
    np.testing.assert_allclose(results.o, zeros + asked_L[:, None, None], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(results.dv, zeros + 10.0 ** ((rank_L - 3) % 8)[:, None, None], rtol=1e-5)


LAYOUTS = [(strategy, layout) for strategy in EXACT for layout in CHUNKS_PER_DEVICE]


@pytest.mark.parametrize(
    "strategy_and_layout",
    sampled(LAYOUTS, [("lss", "zigzag"), ("ring", "contiguous"), ("ulysses", "zigzag")]),
    ids="-".join,
)
def test_no_output_depends_on_a_later_token(strategy_and_layout):
    strategy, layout = strategy_and_layout
    case = Case(strategy, layout, seq=4, kv_heads=1)
    random = np.random.default_rng(0)
    q, k, v = (random.standard_normal((1, case.length, heads, 8), np.float32) for heads in (4, 1, 1))
    for token in (0, 1, 11, 12, 50, case.length - 1):
        do = np.zeros_like(q)
        do[:, token] = 1.0
        results = attended(case, (q, k, v, do), causal(np.arange(case.length)))
        assert not results.dk[:, token + 1 :].any() and not results.dv[:, token + 1 :].any()
        assert results.dv[:, : token + 1].all(), "and it does depend on every earlier one"
        assert not np.delete(results.dq, token, axis=1).any()


def test_the_ring_sends_to_the_next_device_and_comes_home():
    setting = setting_on(Layout("contiguous", 8))

    @jax.jit
    @partial(jax.shard_map, mesh=mesh_of(1, 8), in_specs=P(SEQ), out_specs=(P(SEQ), P(SEQ)))
    def sent(x):
        once = ring._send_on(x, setting)
        for _ in range(7):
            x = ring._send_on(x, setting)
        return once, ring._send_on(x, setting)

    once, home = sent(jnp.arange(8))
    np.testing.assert_array_equal(once, (np.arange(8) - 1) % 8)
    np.testing.assert_array_equal(home, np.arange(8))


@pytest.mark.parametrize("name", CHUNKS_PER_DEVICE)
def test_ulysses_exchanges_a_part_of_the_sequence_for_a_part_of_the_heads(name):
    """Coded by position and head: whole sequences in natural order, in between; the inverse brings all back."""
    layout = Layout(name, 3)
    setting, position_L = setting_on(layout), layout.positions(12)
    coded = [jnp.broadcast_to(position_L[:, None] * 100 + jnp.arange(heads), (2, 12, heads)) for heads in (6, 3)]
    by_sequence, by_heads = P(None, SEQ), P(None, None, SEQ)

    @jax.jit
    @partial(jax.shard_map, mesh=mesh_of(1, 3), in_specs=by_sequence, out_specs=(by_heads, by_sequence))
    def there_and_back(arrays_BlHK):
        exchanged = ulysses._to_heads(arrays_BlHK, setting)
        return exchanged, ulysses._to_sequence(exchanged, setting)

    arrays = tuple(x[..., None] for x in coded)
    there, back = there_and_back(arrays)
    for exchanged, x in zip(there, arrays, strict=True):
        np.testing.assert_array_equal(exchanged, x[:, np.argsort(position_L)])
    assert_close(back, arrays, 1e-9)


@pytest.mark.parametrize("way", sampled(["forward", "backward"], ["backward"]))
def test_of_many_groups_one_is_held_at_a_time(way):
    """In the compiled program gathering in 8 groups saves more than half of the gathered pair."""
    L, heads, width = 4096, 8, 32
    shape = jax.ShapeDtypeStruct((1, L, heads, width), jnp.float32)
    shapes = (shape,) * 3
    pair = 2 * L * heads * width * 4

    def temporary_bytes(groups):
        layout = Layout("zigzag", 8)
        setting = Setting(SEQ, layout, layout, "blockwise", 256, 256, True, interpret=True, approximation=None)

        @partial(jax.shard_map, mesh=mesh_of(1, 8), in_specs=P(None, SEQ), out_specs=P(None, SEQ))
        def rows(q_BlHK, k_BlHK, v_BlHK):
            mask = bidirectional(jax.lax.axis_index(SEQ) * (L // 8) + jnp.arange(L // 8), L)
            return in_head_groups(make_attend("lss", mask, setting), groups)(q_BlHK, k_BlHK, v_BlHK)

        def loss(q_BLHK, k_BLHK, v_BLHK):
            return jnp.sum(rows(q_BLHK, k_BLHK, v_BLHK) ** 2)

        program = rows if way == "forward" else jax.grad(loss, argnums=(0, 1, 2))
        return jax.jit(program).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(1) - temporary_bytes(8) > pair / 2


@pytest.mark.parametrize(
    ("section", "key", "known"),
    [
        (AttentionConfig, "layout", CHUNKS_PER_DEVICE),
        (AttentionConfig, "kernel", {"auto", *KERNELS}),
        (DataConfig, "source", SOURCES.keys() | KINDS.keys() | {ACLSUM}),
    ],
)
def test_the_config_names_what_there_is(section, key, known):
    assert set(section.__annotations__[key].__args__) == set(known)
