"""Masks, token order and blocks: what each device holds and sees, one function at a time."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import mesh_of, relative_error, sampled
from jax.sharding import PartitionSpec as P

from lss_jax.attention.collectives import stacked
from lss_jax.attention.kernels.blocks import (
    KeyBlocks,
    QueryBlocking,
    chunks_of_all,
    chunks_of_device,
    even,
    key_blocks,
    query_blocking,
    touched,
)
from lss_jax.attention.kernels.dense import dense_attention
from lss_jax.attention.kernels.interface import Queries
from lss_jax.attention.mask import (
    Intervals,
    bidirectional,
    causal,
    documents,
    neighbours,
    packed,
    prefix_causal,
    window,
)
from lss_jax.parallel.layout import CHUNKS_PER_DEVICE, Layout
from lss_jax.parallel.mesh import MODEL, SEQ, sharded_axes, without_unsharded

LAYOUTS = [Layout(name, devices) for name in CHUNKS_PER_DEVICE for devices in (1, 2, 3, 5, 8)]
by_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.name}-{layout.devices}")


# Masks


QUERY, KEY = np.arange(12)[:, None], np.arange(12)
START_OF_DOCUMENT, END_OF_DOCUMENT = np.repeat([0, 3, 4], [3, 1, 8]), np.repeat([3, 4, 12], [3, 1, 8])
MASKS = {
    "causal": (causal(KEY), KEY <= QUERY),
    "bidirectional": (bidirectional(KEY, 9), (KEY < 9) & (QUERY < 9)),
    "prefix": (prefix_causal(KEY, 5), (KEY <= QUERY) | (KEY < 5)),
    "window": (causal(KEY) & window(KEY, 3), (KEY <= QUERY) & (KEY > QUERY - 3)),
    "window of one": (causal(KEY) & window(KEY, 1), KEY == QUERY),
    "neighbours": (neighbours(KEY, 2, 3), (KEY >= QUERY - 2) & (KEY <= QUERY + 3)),
    "packed": (packed(np.repeat([7, 0, 7], [3, 1, 8])), START_OF_DOCUMENT[:, None] == START_OF_DOCUMENT),
    "documents": (
        documents(np.stack((START_OF_DOCUMENT, END_OF_DOCUMENT))),
        START_OF_DOCUMENT[:, None] == START_OF_DOCUMENT,
    ),
    "reversed": (Intervals(KEY + 1, KEY), np.zeros((12, 12), bool)),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_shows_what_its_definition_says(name):
    mask, expected_LL = MASKS[name]
    np.testing.assert_array_equal(mask.sees(KEY), expected_LL)


def test_masks_meet_in_what_both_show():
    for mask, shown_LL in MASKS.values():
        for other, shown_by_other_LL in MASKS.values():
            np.testing.assert_array_equal((mask & other).sees(KEY), shown_LL & shown_by_other_LL)


def test_intervals_are_half_open_and_in_natural_positions():
    random = np.random.default_rng(0)
    q, k, v = (random.standard_normal((2, 24, 4, 8), np.float32) for _ in range(3))
    start, end = np.arange(24) // 3, np.arange(24) // 2 + 12
    found, *_ = jax.jit(dense_attention)(Queries(q, Intervals(start, end), None, None), stacked(k, v), 8**-0.5)
    seen = (start[:, None] <= np.arange(24)) & (np.arange(24) < end[:, None])
    assert relative_error(found, jax.nn.dot_product_attention(q, k, v, mask=seen[None, None])) < 1e-5


# Token order


def test_zigzag_gives_each_device_an_early_and_a_late_chunk():
    np.testing.assert_array_equal(Layout("zigzag", 2).positions(8), [0, 1, 6, 7, 2, 3, 4, 5])
    np.testing.assert_array_equal(Layout("zigzag", 3).positions(6), [0, 5, 1, 4, 2, 3])
    np.testing.assert_array_equal(Layout("contiguous", 3).positions(6), np.arange(6))


@by_layout
def test_natural_and_segments_are_inverse_and_agree_with_positions(layout):
    length = layout.padded(37)
    segments_Nl = layout.positions(length).reshape(layout.devices, -1)
    x_NalbE = jnp.asarray(segments_Nl)[:, None, :, None, None] * jnp.arange(1, 7).reshape(1, 2, 1, 1, 3)
    x_aLbE = layout.natural(x_NalbE, 2)
    np.testing.assert_array_equal(x_aLbE[0, :, 0, 0], np.arange(length))
    np.testing.assert_array_equal(x_aLbE[1, :, 0, 2], np.arange(length) * 6)
    np.testing.assert_array_equal(layout.segments(x_aLbE, 1), x_NalbE)


@by_layout
def test_padding_is_the_least_that_cuts_into_equal_chunks(layout):
    chunks = layout.devices * layout.chunks_per_device
    for length in range(1, 50):
        padded = layout.padded(length)
        assert padded % chunks == 0 and length <= padded < length + chunks


@pytest.mark.parametrize("parts", range(1, 7))
@pytest.mark.parametrize("devices", range(1, 7))
def test_of_natural_pieces_each_device_holds_an_even_and_an_odd_one(devices, parts):
    """So that two permutations are enough, whatever the mesh."""
    layout = Layout("zigzag", devices, parts)
    pieces = 2 * devices * parts
    assert layout.padded(1) == pieces, "a token each"
    np.testing.assert_array_equal(layout.pieces_D2.ravel(), layout.positions(pieces))
    assert set(layout.pieces_D2.sum(1) % 2) == {1}


@pytest.mark.parametrize("name", CHUNKS_PER_DEVICE)
@pytest.mark.parametrize("sizes", sampled([(8, 1), (2, 2), (3, 2), (2, 3), (2, 4), (1, 4)], [(8, 1), (2, 3)]), ids=str)
def test_rows_go_to_their_tokens_and_back(sizes, name):
    """Rank-coded: each row is its natural position."""
    seq, model = sizes
    layout, mesh = Layout(name, seq, model), mesh_of(1, seq, model)
    spec = without_unsharded(P((SEQ, MODEL)), mesh)
    axes = sharded_axes(mesh)
    position_L = jnp.arange(layout.padded(50))

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=spec, out_specs=(spec, spec))
    def there_and_back(rows_p):
        moved_p = layout.from_natural(rows_p, axes)
        return moved_p, layout.to_natural(moved_p, axes)

    there, back = there_and_back(position_L)
    np.testing.assert_array_equal(there, layout.positions(len(position_L)))
    np.testing.assert_array_equal(back, position_L)


@pytest.mark.parametrize("devices", [2, 3, 5, 8])
def test_zigzag_balances_a_causal_mask(devices):
    keys_seen_Nl = Layout("zigzag", devices).positions(16 * devices).reshape(devices, -1) + 1
    assert len(set(keys_seen_Nl.sum(1))) == 1


# Blocks


@pytest.mark.parametrize("target", sampled([1, 4, 5, 7, 64], [1, 5]))
@by_layout
def test_key_blocks_hold_each_position_once(layout, target):
    length = layout.devices * layout.chunks_per_device * 11
    position_Nl = layout.positions(length).reshape(layout.devices, -1)

    def answered_for(keys: KeyBlocks, position_nl) -> np.ndarray:
        assert 1 <= keys.size <= target
        begin_t, end_t, first_t, segment_t, offset_t = (np.asarray(x) for x in keys[:5])
        assert np.all((first_t <= begin_t) & (begin_t < end_t) & (end_t <= first_t + keys.size))
        assert np.all(begin_t[1:] >= end_t[:-1]), "the blocks are in natural order"
        for first, segment, place in zip(first_t, segment_t, offset_t, strict=True):
            read_k = position_nl[segment, place : place + keys.size]
            np.testing.assert_array_equal(read_k, first + np.arange(keys.size))
        return np.concatenate([np.arange(begin, end) for begin, end in zip(begin_t, end_t, strict=True)])

    of_all = answered_for(key_blocks(chunks_of_all(layout, position_Nl.shape[1]), target), position_Nl)
    np.testing.assert_array_equal(of_all, np.arange(length))
    for device, position_l in enumerate(position_Nl):
        keys = key_blocks(chunks_of_device(layout, len(position_l), jnp.int32(device)), target)
        np.testing.assert_array_equal(answered_for(keys, position_l[None]), np.sort(position_l))


@pytest.mark.parametrize("target", [1, 4, 5, 64])
def test_the_blocks_touched_are_those_with_a_key_that_is_seen(target):
    layout, segment_length = Layout("zigzag", 3), 14
    length = layout.devices * segment_length
    keys = key_blocks(chunks_of_all(layout, segment_length), target)
    block_L = np.searchsorted(np.asarray(keys.end_t), np.arange(length), side="right")
    start_iq, end_iq = np.random.default_rng(0).integers(0, length + 1, (2, 500, 3))
    start_iq[:100, 1:] = end_iq[:100, 1:]  # one query of three sees something, or none
    first_i, stop_i = map(np.asarray, touched(keys, jnp.asarray(start_iq), jnp.asarray(end_iq)))
    for start_q, end_q, first, stop in zip(start_iq, end_iq, first_i, stop_i, strict=True):
        seen = [block_L[start:end] for start, end in zip(start_q, end_q, strict=True) if start < end]
        if seen:
            blocks = np.concatenate(seen)
            assert (first, stop) == (blocks.min(), blocks.max() + 1)
        else:
            assert first == stop


def test_the_blocks_touched_of_one_device_leave_out_no_key_that_is_seen():
    layout, segment_length = Layout("zigzag", 3), 14
    start_iq, end_iq = np.random.default_rng(0).integers(0, 43, (2, 500, 2))
    end_iq = np.minimum(end_iq, start_iq + 9)
    for device in range(layout.devices):
        keys = key_blocks(chunks_of_device(layout, segment_length, jnp.int32(device)), 4)
        first_i1, stop_i1 = (np.asarray(x)[:, None] for x in touched(keys, jnp.asarray(start_iq), jnp.asarray(end_iq)))
        begin_t, end_t = np.asarray(keys.begin_t), np.asarray(keys.end_t)
        seen_iqt = np.maximum(begin_t, start_iq[..., None]) < np.minimum(end_t, end_iq[..., None])
        t = np.arange(len(begin_t))
        assert not np.any(seen_iqt.any(1) & ((t < first_i1) | (t >= stop_i1)))


@pytest.mark.parametrize("length", range(1, 12))
def test_even_blocks_cover_a_length(length):
    for target in range(1, 14):
        blocks, size = even(length, target)
        assert size <= target and (blocks - 1) * size < length <= blocks * size


@pytest.mark.parametrize("block_heads", [1, 3])
@pytest.mark.parametrize(("runs", "run_length", "size"), [(1, 12, 4), (1, 11, 4), (2, 7, 3), (2, 5, 5)])
def test_queries_are_cut_and_put_together_again(runs, run_length, size, block_heads):
    """Each query is coded by its row, place and head, from one on: zero is the padding."""
    batch, kv_heads, repeats, length = 2, 3, 2, runs * run_length
    blocking = QueryBlocking(batch, runs, run_length, size, kv_heads, block_heads)
    row, place, head = np.indices((batch, length, kv_heads * repeats))
    x_BlHK = jnp.asarray(1 + row * 10_000 + place * 100 + head)[..., None] * jnp.array([1, -1])
    x_igmK = blocking.split(x_BlHK)
    np.testing.assert_array_equal(blocking.join(x_igmK), x_BlHK)
    np.testing.assert_array_equal(blocking.split_per_head(x_BlHK[..., 0]), x_igmK[..., 0])

    row_i, head_i = map(np.asarray, blocking.batch_rows_and_heads())
    of_places = jnp.asarray(1 + place * 100)[..., 0]
    for of_rows in (of_places[0], of_places):
        place_iq = np.asarray(blocking.split_per_query(of_rows))
        assert x_igmK.shape[:3] == (len(row_i), block_heads, repeats * size)
        for (i, g, m), code in np.ndenumerate(np.asarray(x_igmK[..., 0])):
            of_query = place_iq[i, m % size]
            assert code == (of_query and of_query + row_i[i] * 10_000 + (head_i[i] + g) * repeats + m // size)


@pytest.mark.parametrize(
    ("length", "heads", "kv_heads", "key_block", "expected"),
    [(64, 8, 8, 32, 1), (64, 8, 8, 16, 2), (16, 8, 8, 8, 8), (16, 12, 6, 8, 6), (16, 6, 6, 16, 6), (16, 6, 6, 32, 3)],
)
def test_small_blocks_have_many_heads(length, heads, kv_heads, key_block, expected):
    """At most 64 queries and 32 keys of one head, or as many scores of several."""
    blocking = query_blocking((1, length, heads, kv_heads), Layout("contiguous", 1), (64, 32), key_block)
    assert blocking.block_heads == expected
