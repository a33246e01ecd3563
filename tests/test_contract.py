"""The contract with the compiler, read off the compiled step: which collectives, how many, over whom, how large."""

import hlo
import jax
import pytest
from helpers import model_on

from lss_jax.data.loader import batch_like
from lss_jax.models import parameter_count
from lss_jax.optimizer import make_optimizer
from lss_jax.state import init_state
from lss_jax.step import make_eval_step, make_train_step

LAYERS = 3


def compiled_step(data, seq, **changes):
    model, mesh = model_on(data, seq, model__layers=LAYERS, **changes)
    optimizer = make_optimizer(model.config.optim)
    state = jax.eval_shape(lambda: init_state(model, optimizer, mesh, 0))
    batch = batch_like(model.config.data.batch_size, model.config.data.seq_len, mesh)
    return model, hlo.collectives(make_train_step(model, optimizer, mesh).lower(state, batch).compile().as_text())


def predicted(data, seq, positions="learned", accumulate=1):
    """One gather and one scatter per layer and microbatch, and the two averages.

    One scalar more where the position table is cut: the sum of squares of its gradient, for the global norm.
    """
    per_layer = LAYERS * accumulate if seq > 1 else 0
    found = {
        "all-gather": per_layer,
        "reduce-scatter": per_layer,
        "all-reduce": (seq > 1) + (data > 1),
        "scalar all-reduce": int(seq > 1 and positions == "learned"),
    }
    return {kind: count for kind, count in found.items() if count}


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize(("data", "seq"), [(1, 1), (8, 1), (1, 8), (2, 4)])
def test_collectives_of_a_training_step(data, seq, scan):
    _, found = compiled_step(data, seq, model__scan_layers=scan)
    assert dict(hlo.counts(found)) == predicted(data, seq)


def test_rope_leaves_no_scalar():
    _, found = compiled_step(2, 4, model__positions="rope")
    assert dict(hlo.counts(found)) == predicted(2, 4, positions="rope")


def test_rematerialized_blocks_do_not_gather_again():
    _, found = compiled_step(2, 4, model__remat="block")
    assert dict(hlo.counts(found)) == predicted(2, 4)


def test_microbatches_share_the_two_averages():
    _, found = compiled_step(2, 4, optim__accumulate=4)
    assert dict(hlo.counts(found)) == predicted(2, 4, accumulate=4)


def test_groups_and_sizes():
    """Keys and values move within a sequence group, the gradient first there and then across the data groups."""
    model, found = compiled_step(2, 4, model__kv_heads=2)
    config = model.config
    rows, length, heads = config.data.batch_size // 2, config.data.seq_len, config.model.kv_heads
    pair = 2 * rows * length * heads * (config.model.width // config.model.heads)
    table = length * config.model.width
    replicated = parameter_count(model) - table + 2  # and the two sums of the loss, which ride along
    sizes = {(one.kind, one.group_size, one.elements) for one in found if one.elements > 2}
    assert sizes == {
        ("all-gather", 4, pair),
        ("reduce-scatter", 4, pair // 4),
        ("all-reduce", 4, replicated),
        ("all-reduce", 2, replicated + table // 4),
    }


def test_evaluation_gathers_and_adds_two_scalars_twice():
    model, mesh = model_on(2, 4, model__layers=LAYERS)
    batch = batch_like(model.config.data.batch_size, model.config.data.seq_len, mesh)
    found = hlo.collectives(make_eval_step(model, mesh).lower(model.shapes, batch).compile().as_text())
    assert dict(hlo.counts(found)) == {"all-gather": LAYERS, "scalar all-reduce": 2}
