"""The contract with the compiler, read off the compiled step: which collectives, how many, over whom, how large.

What a strategy's layer takes is predicted by its own `traffic`, beside its collectives.
"""

import math
from collections import Counter

import jax
import pytest
from helpers import model_on, sampled

from lss_jax import hlo
from lss_jax.attention import STRATEGIES
from lss_jax.attention.setting import Sizes, layout_on, setting_on
from lss_jax.checkpoint import like
from lss_jax.data.loader import batch_like
from lss_jax.mesh import named_axes
from lss_jax.models import build_model, parameter_count
from lss_jax.optimizer import make_optimizer
from lss_jax.state import init_state, kept_specs, moment_specs, state_shardings
from lss_jax.step import make_eval_step, make_train_step

LAYERS = 3
NORMS = 24  # at most: of nine kernels and biases, the head, the tokens and the positions, for two global norms


def batch_shapes(model, mesh):
    config = model.config
    layout, packed = layout_on(config, mesh), bool(config.data.separator)
    return batch_like(config.data.batch_size, config.data.seq_len, mesh, layout, packed)


def lowered_step(*sizes, **changes):
    model, mesh = model_on(*sizes, **{"model__layers": LAYERS, **changes})
    optimizer = make_optimizer(model.config.optim)
    shapes = jax.eval_shape(lambda: init_state(model, optimizer, mesh, 0))
    state = like(shapes, state_shardings(model, optimizer, mesh))
    return model, mesh, make_train_step(model, optimizer, mesh).lower(state, batch_shapes(model, mesh))


def compiled_step(*sizes, **changes):
    model, mesh, lowered = lowered_step(*sizes, **changes)
    return model, mesh, hlo.collectives(lowered.compile().as_text())


def sizes_of(config, mesh):
    """Of one call of attention on one device."""
    data, layout = mesh.shape["data"], layout_on(config, mesh)
    return Sizes(
        B=config.data.batch_size // data // config.optim.accumulate,
        l=layout.padded(config.data.seq_len) // layout.devices,
        H=config.model.heads // layout.parts,
        G=config.model.kv_heads // layout.parts,
        K=config.model.width // config.model.heads,
        itemsize=4,
    )


def predicted(config, mesh):
    """How often each kind of collective runs, and how many bytes come out of them on a device: (kind, bytes) to times.

    Per layer and microbatch what the strategy and the regions take; per microbatch what a vocabulary in shares takes.
    """
    per_microbatch = of_vocabulary(config, mesh)
    for _ in range(config.model.layers):
        per_microbatch += of_attention(config, mesh) + of_regions(config, mesh)
    times = of_step(config, mesh) + of_sharded_state(config, mesh)
    for _ in range(config.optim.accumulate):
        times += per_microbatch
    return times


def of_attention(config, mesh):
    """One layer: what the strategy says."""
    times: Counter = Counter()
    if mesh.shape["seq"] > 1:
        strategy = STRATEGIES[config.attention.strategy]
        traffic = strategy.traffic(sizes_of(config, mesh), setting_on(config, mesh))
        for one in traffic["forward"] + traffic["backward"]:
            times[one.kind, one.bytes] += one.times
    return times


def of_regions(config, mesh):
    """One layer: attention and MLP each gather and scatter forward, and backward; with remat they gather once more."""
    model = mesh.shape["model"]
    if model == 1:
        return Counter()
    segment = segment_bytes(config, mesh)
    gathers = 4 + 2 * (config.model.remat == "block")
    return Counter({("all-gather", segment): gathers, ("reduce-scatter", segment // model): 4})


def of_vocabulary(config, mesh):
    """Rows out of the table's shares, segments into the head's; for the loss two numbers and a maximum per token."""
    model, sizes = mesh.shape["model"], sizes_of(config, mesh)
    if model == 1 or not config.model.vocab_parallel:
        return Counter()
    segment, scalars = segment_bytes(config, mesh), 2 * sizes.B * sizes.l * 4
    gathers = Counter({("all-gather", segment): 2, ("all-gather", scalars): 1})
    scatters = Counter({("reduce-scatter", segment // model): 2, ("reduce-scatter", scalars // model): 1})
    return gathers + scatters + Counter({("all-reduce", None): 1})


def of_step(config, mesh):
    """Once: a sum over each axis; norms of what is cut, for the global norm, over the axes that cut it.

    A learned table of a length that the mesh does not divide is whole between steps, and so is its gradient, which is
    gathered; under zigzag its rows are exchanged, there and back. Ulysses gathers the intervals of all queries.
    """
    data, seq, model = (mesh.shape[axis] for axis in ("data", "seq", "model"))
    attention, sizes, width = config.attention, sizes_of(config, mesh), config.model.width
    times = Counter({("all-reduce", None): (data > 1) + (seq > 1) + (model > 1)})
    times["scalar all-reduce", None] += int(model > 1)
    if config.model.positions == "learned" and seq * model > 1:
        if sizes.l * seq != config.data.seq_len:
            times["all-gather", seq * sizes.l * width * 4] += 1
        elif seq > 1:
            times["scalar all-reduce", None] += 1
        if attention.layout == "zigzag" and seq > 1:
            times["collective-permute", sizes.l // model // 2 * width * 4] += 4
    if attention.strategy == "ulysses" and seq > 1:
        packed = bool(config.data.separator)  # else all microbatches share the intervals
        rows, runs = (sizes.B, config.optim.accumulate) if packed else (1, 1)
        times["all-gather", seq * 2 * rows * sizes.l * 4] += runs
    return +times


def of_sharded_state(config, mesh):
    """Once, for every parameter that other devices update a part of: this device's whole of it."""
    model = build_model(config)
    trees = (model.shapes, kept_specs(model, mesh), moment_specs(model, mesh))
    times: Counter = Counter()
    for leaf, kept, moment in zip(*map(jax.tree.leaves, trees), strict=True):
        if named_axes(kept) != named_axes(moment):
            times["all-gather", leaf.size * 4 // math.prod(mesh.shape[axis] for axis in named_axes(kept))] += 1
    return times


def segment_bytes(config, mesh):
    """Of a segment's activations."""
    sizes = sizes_of(config, mesh)
    return sizes.B * sizes.l * config.model.width * sizes.itemsize


def found_in(collectives):
    """The same of a compiled program; the sizes of the sums have a test of their own."""
    times: Counter = Counter()
    for one in collectives:
        is_sum = one.kind == "all-reduce"
        kind = "scalar all-reduce" if is_sum and one.elements <= NORMS else one.kind
        times[kind, None if is_sum else one.bytes] += one.times
    return times


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("sizes", [(1, 1), (8, 1), (1, 8), (2, 4), (1, 1, 4), (2, 2, 2)])
def test_collectives_of_a_training_step(sizes, scan):
    model, mesh, found = compiled_step(*sizes, model__scan_layers=scan)
    assert found_in(found) == predicted(model.config, mesh)


@pytest.mark.parametrize(("sizes", "per_layer"), [((1, 8), 2), ((1, 1, 4), 8), ((2, 2, 2), 10)])
def test_lss_takes_two_collectives_a_layer_where_nvidia_takes_eight(sizes, per_layer):
    """The paper's comparison (Sec. 3): what runs once in each turn of the loop over layers."""
    found = compiled_step(*sizes)[2]
    assert {one.times for one in found} == {1, LAYERS}
    assert sum(one.times == LAYERS for one in found) == per_layer


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


HYBRID_VARIANTS = {
    **VARIANTS,
    "vocabulary": {"model__vocab_parallel": True},
    "vocabulary, untied": {"model__vocab_parallel": True, "model__tied_head": False},
    "vocabulary, microbatches": {"model__vocab_parallel": True, "optim__accumulate": 4, "data__seq_len": 96},
    "ring": {"attention__strategy": "ring"},
    "ulysses": {"attention__strategy": "ulysses", "attention__layout": "contiguous"},
    "moments in shares": {"optim__shard_state": True},
}
HYBRID_SAMPLE = {"remat, gathered again", "padded", "vocabulary, microbatches", "ulysses", "moments in shares"}


@pytest.mark.parametrize("variant", sampled(HYBRID_VARIANTS, HYBRID_SAMPLE))
def test_collectives_of_every_variant_of_a_hybrid(variant):
    model, mesh, found = compiled_step(2, 2, 2, **HYBRID_VARIANTS[variant])
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


def test_what_moves_between_regions_moves_in_bfloat16():
    """Sums as well, as Megatron's do; read before XLA compiles."""
    _, _, lowered = lowered_step(1, 1, 2, model__dtype="bfloat16")
    lines = lowered.as_text().splitlines()
    gathered = [line for line in lines if "stablehlo.all_gather" in line]
    scattered = [index for index, line in enumerate(lines) if "stablehlo.reduce_scatter" in line]
    assert len(gathered) == len(scattered) == 4, "of the one layer that is scanned"
    assert all("xbf16>" in line for line in gathered)
    assert all("tensor<bf16>" in lines[index + 1] for index in scattered)


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


def test_groups_and_sizes_of_a_hybrid():
    """Activations move within a model group; the weights that it shares are added up there first."""
    model, _, found = compiled_step(2, 2, 2, attention__layout="contiguous")
    config, width = model.config, model.config.model.width
    rows, length, table = config.data.batch_size // 2, config.data.seq_len // 2, config.data.seq_len * width
    pair, segment = 2 * rows * length * width, rows * length * width
    by_spec = Counter()
    for shape, spec in zip(jax.tree.leaves(model.shapes), jax.tree.leaves(model.specs), strict=True):
        by_spec[named_axes(spec)] += shape.size
    shared = by_spec[frozenset()] + 2  # norms, tokens, biases after a scatter; and the two sums of the loss
    of_model_group = shared + by_spec[frozenset(["model"])] // 2
    sizes = {(one.kind, one.group_size, one.elements) for one in found if one.elements > NORMS}
    assert sizes == {
        ("all-gather", 2, segment),  # over model
        ("reduce-scatter", 2, segment // 2),
        ("all-gather", 2, pair),  # over seq: both segments, half of the heads
        ("reduce-scatter", 2, pair // 2),
        ("all-reduce", 2, shared),
        ("all-reduce", 2, of_model_group),
        ("all-reduce", 2, of_model_group + table // 4),
    }


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((2, 4), {"all-gather": LAYERS, "scalar all-reduce": 2}),
        ((2, 2, 2), {"all-gather": 3 * LAYERS, "reduce-scatter": 2 * LAYERS, "scalar all-reduce": 3}),
    ],
)
def test_evaluation_goes_forward_and_adds_two_scalars_over_each_axis(sizes, expected):
    model, mesh = model_on(*sizes, model__layers=LAYERS, attention__layout="contiguous")
    found = hlo.collectives(
        make_eval_step(model, mesh).lower(model.shapes, batch_shapes(model, mesh)).compile().as_text()
    )
    assert dict(hlo.counts(found)) == expected
