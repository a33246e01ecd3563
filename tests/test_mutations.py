"""The tests against the oracle can fail: each collective is dropped in turn, and the comparison sees it.

A dropped collective gives what one device has of its own, with the type of the real one. Just leaving a sum out does
not even trace: `check_vma=True` proves that no average was forgotten.
"""

import jax
import jax.numpy as jnp
import pytest
from helpers import check_against_oracle, sampled
from jax.sharding import PartitionSpec as P

import lss_jax.training.step
from lss_jax.parallel.gradients import double_sum
from lss_jax.parallel.mesh import DATA, MODEL, SEQ
from lss_jax.parallel.tensor_parallel import own_part

REAL_PSUM = jax.lax.psum


def own_segment_everywhere(x, axis_name):
    """In place of an all-gather."""
    return jnp.stack([x] * jax.lax.axis_size(axis_name))


def own_share_of_own_segment(x, axis_name):
    """In place of a reduce-scatter."""
    return x[jax.lax.axis_index(axis_name)]


def stays_at_home(x, axis_name, perm):
    """In place of a permutation: here, of the position table's chunks into their layout."""
    return x


def only_over_model(wrong, real):
    """The wrong function in the regions, the real one elsewhere."""
    return lambda x, axis_name, **options: (wrong if axis_name == MODEL else real)(x, axis_name, **options)


def own_part_everywhere(x, axis_name, *, axis, tiled):
    """In place of a gather into a region."""
    return jnp.concatenate([x] * jax.lax.axis_size(axis_name), axis)


def own_term_of_own_part(x, axis_name, *, scatter_dimension, tiled):
    """In place of a scatter out of a region."""
    return own_part(x, axis_name, scatter_dimension)


def first_share_of(dropped):
    """In place of an all-reduce over `dropped`."""

    def psum(x, axis_name):
        if axis_name != dropped:
            return REAL_PSUM(x, axis_name)
        return REAL_PSUM(jnp.where(jax.lax.axis_index(axis_name) == 0, x, 0), axis_name)

    return psum


DROPPED = {
    "gather of keys and values": ("all_gather", own_segment_everywhere),
    "scatter of their gradients": ("psum_scatter", own_share_of_own_segment),
    "exchange of position rows": ("ppermute", stays_at_home),
    "average inside the sequence group": ("psum", first_share_of(SEQ)),
    "average across the data groups": ("psum", first_share_of(DATA)),
}


DROPPED_ON_HYBRID = {
    "gather into a region": ("all_gather", only_over_model(own_part_everywhere, jax.lax.all_gather)),
    "scatter out of a region": ("psum_scatter", only_over_model(own_term_of_own_part, jax.lax.psum_scatter)),
    "exchange of position rows": ("ppermute", stays_at_home),
    "sum over the parts of a segment": ("psum", first_share_of(MODEL)),
    "average inside the sequence group": ("psum", first_share_of(SEQ)),
}


@pytest.mark.parametrize(
    "dropped", sampled(DROPPED, DROPPED, quick=["gather of keys and values", "average inside the sequence group"])
)
def test_a_dropped_collective_is_seen(dropped, monkeypatch):
    name, replacement = DROPPED[dropped]
    monkeypatch.setattr(jax.lax, name, replacement)
    with pytest.raises(AssertionError, match="relative error"):
        check_against_oracle(2, 4)


@pytest.mark.parametrize("vocab_parallel", sampled([False, True], {False}))
@pytest.mark.parametrize("dropped", sampled(DROPPED_ON_HYBRID, set(DROPPED_ON_HYBRID) - set(DROPPED)))
def test_a_dropped_collective_is_seen_on_a_hybrid(dropped, vocab_parallel, monkeypatch):
    name, replacement = DROPPED_ON_HYBRID[dropped]
    monkeypatch.setattr(jax.lax, name, replacement)
    with pytest.raises(AssertionError, match="relative error"):
        check_against_oracle(1, 2, 2, model__vocab_parallel=vocab_parallel)


@pytest.mark.parametrize("axis", [MODEL, SEQ, DATA])
def test_a_forgotten_sum_does_not_trace(axis, monkeypatch):
    monkeypatch.setattr(jax.lax, "psum", lambda x, axis_name: x if axis_name == axis else REAL_PSUM(x, axis_name))
    with pytest.raises(ValueError, match="require replication which can't be statically inferred"):
        check_against_oracle(2, 2, 2)


def test_a_forgotten_cast_is_seen(monkeypatch):
    """Parameters that do not vary get their sums from autodiff, unasked; our own backward passes refuse the sum."""
    monkeypatch.setattr(lss_jax.training.step, "varying", lambda params, specs, mesh: params)
    with pytest.raises(ValueError, match="must produce an output with the same type"):
        check_against_oracle(2, 4)


def test_a_table_summed_over_its_own_axis_is_seen(monkeypatch):
    """A position table that took part in the first average would mix the rows of different segments."""

    def everything_is_shared(partial, specs, mesh):
        return double_sum(partial, jax.tree.map(lambda _: P(), specs), mesh)

    monkeypatch.setattr(lss_jax.training.step, "double_sum", everything_is_shared)
    with pytest.raises(AssertionError, match="table_LE"):
        check_against_oracle(2, 4)
