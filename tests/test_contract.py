"""The contract with the compiler, read off the compiled step: which collectives, how many, over whom, how large.

What a strategy's layer takes is predicted by its own `traffic`, beside its collectives.
"""

from collections import Counter

import jax
import pytest
from contracts import LAYERS, check_contract, compiled_step, lowered_step
from helpers import batch_on, model_on, sampled

from lss_jax.inspection import contract, hlo, operations
from lss_jax.models import parameter_count
from lss_jax.parallel.mesh import named_axes
from lss_jax.training.step import make_eval_step, trace_train_step

SIZES = [(1, 1), (8, 1), (1, 8), (2, 4), (1, 2), (1, 1, 4), (2, 2, 2)]


@pytest.mark.parametrize(
    "sizes", sampled(SIZES, [(1, 1), (8, 1), (1, 8), (1, 1, 4), (2, 2, 2)], quick=[(1, 8), (2, 2, 2)]), ids=str
)
def test_collectives_of_a_training_step(sizes):
    check_contract(*sizes)


@pytest.mark.parametrize("sizes", sampled(SIZES, [(2, 2, 2)]), ids=str)
def test_collectives_of_a_training_step_whose_layers_are_unrolled(sizes):
    check_contract(*sizes, model__scan_layers=False)


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
    "groups": {"attention__head_groups": 2},
    "groups, gathered again": {"attention__head_groups": 2, "attention__regather": True},
    "documents": {"data__separator": "a"},
    "grouped queries": {"model__kv_heads": 2},
    "padded": {"data__seq_len": 45},
    "padded chunks": {"data__seq_len": 44},
    "dropout": {"model__dropout": 0.1},
    "dense": {"attention__kernel": "dense"},
}


SAMPLE = {"remat, gathered again", "groups", "documents", "padded", "dropout"}


@pytest.mark.parametrize("variant", sampled(VARIANTS, SAMPLE))
def test_collectives_of_every_variant(variant):
    check_contract(2, 4, **VARIANTS[variant])


def test_muon_takes_no_collectives_of_its_own():
    check_contract(2, 4, optim__name="muon")


HYBRID_VARIANTS = {
    **VARIANTS,
    "vocabulary": {"model__vocab_parallel": True},
    "vocabulary, untied": {"model__vocab_parallel": True, "model__tied_head": False, "model__vocab": 259},
    "vocabulary, microbatches": {"model__vocab_parallel": True, "optim__accumulate": 4, "data__seq_len": 96},
    "ring": {"attention__strategy": "ring"},
    "ulysses": {"attention__strategy": "ulysses", "attention__layout": "contiguous"},
    "moments in shares": {"mesh__shard": "optimizer"},
}
HYBRID_SAMPLE = {"vocabulary, microbatches", "ulysses", "moments in shares"}


@pytest.mark.parametrize("variant", sampled(HYBRID_VARIANTS, HYBRID_SAMPLE))
def test_collectives_of_every_variant_of_a_hybrid(variant):
    check_contract(2, 2, 2, **HYBRID_VARIANTS[variant])


WITHOUT_BIAS = {"model__norm": "rms", "model__mlp": "swiglu", "model__bias": False, "model__tied_head": False}
WEIGHTS = {**WITHOUT_BIAS, "mesh__shard": "all", "model__kv_heads": 8, "model__heads": 16}
LARGE = {
    "weights": WEIGHTS,
    "weights, remat": {**WEIGHTS, "model__remat": "block"},
    "weights of an odd size": {**WEIGHTS, "model__width": 48, "model__mlp_width": 44},
    "weights, tied, with biases": {"mesh__shard": "all", "model__remat": "block"},
    "tiles": {**WITHOUT_BIAS, "model__tile": 6},
    "tiles and a rest": {"model__tile": 5, "data__seq_len": 88},
    "offload": {**WEIGHTS, "model__remat": "offload"},
    "offload of every other": {**WEIGHTS, "model__remat": "offload", "model__remat_every": 2, "model__layers": 4},
    "offload, gathered again": {"model__remat": "offload", "attention__regather": True},
}
LARGE["all"] = {
    **WEIGHTS,
    "model__remat": "offload",
    "model__tile": 6,
    "attention__head_groups": 2,
    "attention__regather": True,
}
LARGE["all, microbatches"] = {**LARGE["all"], "optim__accumulate": 4}
LARGE["all, state on the host"] = {**LARGE["all"], "optim__offload": True}
LARGE["all, ulysses"] = {**LARGE["all"], "attention__strategy": "ulysses"}
LARGE["all, ring"] = {**LARGE["all"], "attention__strategy": "ring", "attention__regather": False}
LARGE_SIZES = [(2, 4, 1), (2, 2, 2), (8, 1, 1), (1, 8, 1), (1, 1, 4), (1, 3, 1)]
LARGE_CASES = [
    (sizes, name)
    for sizes in LARGE_SIZES
    for name in LARGE
    if (name != "all, ulysses" or sizes[1] != 3)  # it divides the heads of a group among the devices
    and (name != "all, microbatches" or sizes[0] <= 2)
]
LARGE_SAMPLE = [((2, 4, 1), "weights of an odd size"), ((2, 2, 2), "all"), ((1, 1, 4), "all, microbatches")]


@pytest.mark.parametrize("case", sampled(LARGE_CASES, LARGE_SAMPLE), ids=str)
def test_collectives_of_what_makes_room_for_large_models(case):
    """Those of sharded weights per layer and pass too; none is left over an axis of size 1."""
    sizes, name = case
    check_contract(*sizes, model__vocab_parallel=sizes[2] > 1, **LARGE[name])


@pytest.mark.parametrize("case", sampled(LARGE_CASES, LARGE_SAMPLE[:2]), ids=str)
def test_operations_of_what_makes_room_for_large_models(case):
    sizes, name = case
    model, mesh = model_on(*sizes, model__vocab_parallel=sizes[2] > 1, **{"model__layers": LAYERS, **LARGE[name]})
    traced = operations.traced(trace_train_step(model, mesh).jaxpr)
    assert traced == operations.outside_attention(model, mesh)


OF_STRATEGIES = [
    (strategy, variant)
    for strategy in ("ring", "ulysses")
    for variant in ("contiguous", "remat", "grouped queries", "documents", "microbatches")
]


@pytest.mark.parametrize("case", sampled(OF_STRATEGIES, [("ring", "remat"), ("ulysses", "documents")]), ids=str)
def test_collectives_of_every_strategy(case):
    strategy, variant = case
    check_contract(2, 4, attention__strategy=strategy, **VARIANTS[variant])


def test_ulysses_repeats_key_value_heads_for_many_devices():
    check_contract(1, 4, attention__strategy="ulysses", model__kv_heads=1)


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
    sizes = {(one.kind, one.group_size, one.elements) for one in found if one.elements > contract.SCALARS}
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
    batch = batch_on(mesh, model.config)
    found = hlo.collectives(make_eval_step(model, mesh).lower(model.shapes, batch).compile().as_text())
    times: Counter = Counter()
    for one in found:
        times["scalar all-reduce" if one.kind == "all-reduce" and one.elements <= 2 else one.kind] += one.times
    assert times == expected
