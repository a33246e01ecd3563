"""The contract with the compiler, read off the compiled step: which collectives, how many, over whom, how large.

What a strategy's layer takes is predicted by its own `traffic`, beside its collectives.
"""

from collections import Counter

import jax
import pytest
from helpers import model_on

from lss_jax import hlo
from lss_jax.attention import STRATEGIES
from lss_jax.attention.setting import Sizes, layout_on, setting_on
from lss_jax.checkpoint import like
from lss_jax.data.loader import batch_like
from lss_jax.models import parameter_count
from lss_jax.optimizer import make_optimizer
from lss_jax.state import init_state, state_shardings
from lss_jax.step import make_eval_step, make_train_step

LAYERS = 3


def batch_shapes(model, mesh):
    config = model.config
    layout, packed = layout_on(config, mesh), bool(config.data.separator)
    return batch_like(config.data.batch_size, config.data.seq_len, mesh, layout, packed)


def lowered_step(data, seq, **changes):
    model, mesh = model_on(data, seq, model__layers=LAYERS, **changes)
    optimizer = make_optimizer(model.config.optim)
    shapes = jax.eval_shape(lambda: init_state(model, optimizer, mesh, 0))
    state = like(shapes, state_shardings(model, optimizer, mesh))
    return model, mesh, make_train_step(model, optimizer, mesh).lower(state, batch_shapes(model, mesh))


def compiled_step(data, seq, **changes):
    model, mesh, lowered = lowered_step(data, seq, **changes)
    return model, mesh, hlo.collectives(lowered.compile().as_text())


def sizes_of(config, mesh):
    """Of one call of attention on one device."""
    data, layout = mesh.shape["data"], layout_on(config, mesh)
    return Sizes(
        B=config.data.batch_size // data // config.optim.accumulate,
        l=layout.padded(config.data.seq_len) // layout.devices,
        H=config.model.heads,
        G=config.model.kv_heads,
        K=config.model.width // config.model.heads,
        itemsize=4,
    )


def predicted(config, mesh):
    """How often each kind of collective runs, and how many bytes come out of them on a device: (kind, bytes) to times.

    Per layer and microbatch what the strategy says. For the whole step the two averages; where the position table is
    cut, a scalar for its share of the global norm (or, of a length that the mesh does not divide, its gradient, which
    is then whole everywhere), and under zigzag the exchange of its rows, there and back; and for Ulysses one gather of
    the intervals of all queries.
    """
    data, seq, accumulate = mesh.shape["data"], mesh.shape["seq"], config.optim.accumulate
    attention, sizes = config.attention, sizes_of(config, mesh)
    times: Counter = Counter()
    table = config.model.positions == "learned"
    if seq > 1:
        traffic = STRATEGIES[attention.strategy].traffic(sizes, setting_on(config, mesh))
        for one in traffic["forward"] + traffic["backward"]:
            times[one.kind, one.bytes] += one.times * LAYERS * accumulate
        if table and attention.layout == "zigzag":
            times["collective-permute", sizes.l // 2 * config.model.width * 4] += 4
        if attention.strategy == "ulysses":
            packed = bool(config.data.separator)  # else all microbatches share the intervals
            times["all-gather", seq * 2 * (sizes.B if packed else 1) * sizes.l * 4] += accumulate if packed else 1
        indivisible = sizes.l * seq != config.data.seq_len
        times["scalar all-reduce", None] += int(table and not indivisible)
        times["all-gather", seq * sizes.l * config.model.width * 4] += int(table and indivisible)
    times["all-reduce", None] += (seq > 1) + (data > 1)
    return +times


def found_in(collectives):
    """The same of a compiled program; the sizes of the averages have a test of their own."""
    times: Counter = Counter()
    for one in collectives:
        is_sum = one.kind == "all-reduce"
        kind = "scalar all-reduce" if is_sum and one.elements <= 2 else one.kind
        times[kind, None if is_sum else one.bytes] += one.times
    return times


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize(("data", "seq"), [(1, 1), (8, 1), (1, 8), (2, 4)])
def test_collectives_of_a_training_step(data, seq, scan):
    model, mesh, found = compiled_step(data, seq, model__scan_layers=scan)
    assert found_in(found) == predicted(model.config, mesh)


VARIANTS = {
    "contiguous": {"attention__layout": "contiguous"},
    "rope": {"model__positions": "rope"},
    "microbatches": {"optim__accumulate": 4},
    "remat": {"model__remat": "block"},
    "remat, gathered again": {"model__remat": "block", "attention__regather": True},
    "gathered again": {"attention__regather": True},
    "groups": {"attention__gather_groups": 2},
    "groups, gathered again": {"attention__gather_groups": 2, "attention__regather": True},
    "documents": {"data__separator": "a"},
    "grouped queries": {"model__kv_heads": 2},
    "padded": {"data__seq_len": 45},
    "padded chunks": {"data__seq_len": 44},
    "dropout": {"model__dropout": 0.1},
    "dense": {"attention__kernel": "dense"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_collectives_of_every_variant(variant):
    model, mesh, found = compiled_step(2, 4, **VARIANTS[variant])
    assert found_in(found) == predicted(model.config, mesh)


@pytest.mark.parametrize("variant", ["contiguous", "remat", "grouped queries", "documents", "microbatches"])
@pytest.mark.parametrize("strategy", ["ring", "ulysses"])
def test_collectives_of_every_strategy(strategy, variant):
    model, mesh, found = compiled_step(2, 4, attention__strategy=strategy, **VARIANTS[variant])
    assert found_in(found) == predicted(model.config, mesh)


def test_ulysses_repeats_key_value_heads_for_many_devices():
    model, mesh, found = compiled_step(1, 4, attention__strategy="ulysses", model__kv_heads=1)
    assert found_in(found) == predicted(model.config, mesh)


def test_bfloat16_travels_as_such_and_its_gradients_in_float32():
    """Read before XLA compiles: on CPU it carries bfloat16 through collectives as float32."""
    _, _, lowered = lowered_step(2, 4, model__dtype="bfloat16", attention__layout="contiguous")
    lines = lowered.as_text().splitlines()
    gathered = [line for line in lines if "stablehlo.all_gather" in line]
    assert gathered and all("xbf16>" in line for line in gathered)
    scattered = [index for index, line in enumerate(lines) if "stablehlo.reduce_scatter" in line]
    assert scattered and all("tensor<f32>" in lines[index + 1] for index in scattered), "it adds float32 numbers"


def test_groups_and_sizes():
    """Keys and values move within a sequence group, the gradient first there and then across the data groups."""
    model, _, found = compiled_step(2, 4, model__kv_heads=2, attention__layout="contiguous")
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
    model, mesh = model_on(2, 4, model__layers=LAYERS, attention__layout="contiguous")
    found = hlo.collectives(
        make_eval_step(model, mesh).lower(model.shapes, batch_shapes(model, mesh)).compile().as_text()
    )
    assert dict(hlo.counts(found)) == {"all-gather": LAYERS, "scalar all-reduce": 2}
