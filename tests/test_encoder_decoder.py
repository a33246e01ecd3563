"""Encoder-decoders against a dense oracle: two sequences of different lengths and layouts, either of them padded."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import oracle_pairs
import pytest
from helpers import LLAMA, assert_close, make_loss_and_gradient, model_on, perturbed_params, sampled

from lss_jax.data.packing import Packing, Stream
from lss_jax.data.windows import PairWindows
from lss_jax.inspection import contract, hlo, operations
from lss_jax.models import encoder_decoder
from lss_jax.parallel.scopes import CROSS_ATTENTION
from lss_jax.tasks import make_task
from lss_jax.training.step import trace_train_step

PAIRS = {
    **{"task": "sequence_to_sequence", "model__family": "encoder_decoder", "model__vocab": 65, "model__heads": 8},
    **{"data__source": "copy", "data__source_len": 29, "data__seq_len": 47, "model__encoder_layers": 3},
}
MESHES = [(1, 8, 1), (2, 4, 1), (2, 2, 2), (1, 3, 1)]  # data x seq x model; no number of segments divides either length
LAYOUTS = [("contiguous", "contiguous"), ("zigzag", "contiguous"), ("contiguous", "zigzag"), ("zigzag", "zigzag")]
STRATEGIES = ["lss", "ring", "ulysses"]


def pairs_of(config, seed=0):
    """Pairs of all kinds of lengths: longer than either side has room for, without a target, and a row of nothing."""
    random, B = np.random.default_rng(seed), config.data.batch_size
    longest = np.array([[config.data.source_len], [config.data.seq_len]])
    lengths_2B = random.integers(5, longest + 1, (2, B))
    lengths_2B[0, 0], lengths_2B[1, 1], lengths_2B[1, 2] = 40, 60, 0
    pairs = [tuple(random.integers(0, 64, length).tolist() for length in row) for row in lengths_2B.T]
    return [*pairs[:-1], ([], [])]


def batch_of(config, mesh, pairs):
    """The same as the loader reads them, from documents of which the last row is behind the end."""
    documents = [pair for pair in pairs if pair[0]]
    ends = np.cumsum([len(source) + len(target) for source, target in documents])
    firsts = ends - [len(target) for _, target in documents]
    tokens = np.array([token for source, target in documents for token in source + target], np.uint8)
    windows = PairWindows(Stream(tokens, Packing(ends, firsts), None))
    return make_task(config).read([windows[number] for number in range(len(pairs))], 0, mesh, None)


def check_pairs(*sizes, bound=2e-5, **changes):
    """Loss and the gradient of every parameter by name."""
    model, mesh = model_on(*sizes, **{**PAIRS, **changes})
    params, pairs = perturbed_params(model), pairs_of(model.config)
    loss, gradient = jax.jit(make_loss_and_gradient(model, mesh))(params, batch_of(model.config, mesh, pairs), 0)
    expected_loss, expected = oracle_pairs.loss_and_gradient(params, pairs, model.config)
    assert_close({"loss": loss, "gradient": gradient}, {"loss": expected_loss, "gradient": expected}, bound)


CASES = [  # all meshes with every strategy, and each of these with all layouts
    (strategy, sizes, LAYOUTS[(turn + place) % len(LAYOUTS)])
    for turn, strategy in enumerate(STRATEGIES)
    for place, sizes in enumerate(MESHES)
    if strategy != "ulysses" or sizes[1] != 3  # 8 heads
]


@pytest.mark.parametrize("case", sampled(CASES, [("lss", (2, 2, 2), LAYOUTS[2])]), ids=str)
def test_loss_and_every_gradient_equal_the_oracle(case):
    strategy, sizes, (layout, source_layout) = case
    check_pairs(*sizes, attention__strategy=strategy, attention__layout=layout, attention__source_layout=source_layout)


OPTIONS = {
    "rope, without biases": ((2, 4, 1), {**LLAMA, "attention__source_layout": "zigzag"}),
    "normalized": ((2, 4, 1), {"model__qk_norm": True, "bound": 1e-4}),  # of which even one device is 2e-5 from it
    "sinusoidal, microbatches": ((2, 4, 1), {"model__positions": "sinusoidal", "optim__accumulate": 2}),
    "sharded weights": ((2, 2, 2), {"mesh__shard": "all", "model__vocab_parallel": True}),
    "tiles": ((2, 2, 2), {"model__tile": 3, "model__positions": "rope"}),
    "blocks, groups, gathered again": (
        (1, 4, 2),
        {"model__remat": "block", "attention__head_groups": 2, "attention__regather": True},
    ),
    "inputs of every other layer": (
        (2, 2, 2),
        {"model__remat": "input", "model__remat_every": 2, "model__layers": 4, "model__encoder_layers": 2},
    ),
    "all on the host": (
        (2, 4, 1),
        {"model__remat": "offload", "mesh__shard": "all", "optim__offload": True, "model__tile": 3},
    ),
}


@pytest.mark.parametrize("name", sampled(OPTIONS, []))
def test_every_option_equals_the_oracle(name):
    sizes, changes = OPTIONS[name]
    check_pairs(*sizes, attention__layout="zigzag", **changes)


@pytest.mark.parametrize("strategy", sampled(["lss"], []))
def test_dropout_is_the_same_on_every_mesh(strategy):
    """On embeddings, in both stacks, and of the weights of all three attentions."""
    found = []
    for sizes, layout in (((1, 1, 1), "contiguous"), ((2, 2, 2), "zigzag")):
        model, mesh = model_on(
            *sizes, **PAIRS, model__dropout=0.2, attention__layout=layout, attention__strategy=strategy
        )
        batch = batch_of(model.config, mesh, pairs_of(model.config))
        found.append(jax.jit(make_loss_and_gradient(model, mesh))(perturbed_params(model), batch, 3))
    assert_close(*reversed(found), 1e-5)


def own_part_everywhere(x_BpE, axis):
    """In place of the gather of the encoder's output."""
    return jnp.concatenate([x_BpE] * jax.lax.axis_size(axis), axis=1)


@pytest.mark.grid
def test_an_output_that_is_not_gathered_is_seen(monkeypatch):
    monkeypatch.setattr(encoder_decoder, "gather_sequence", own_part_everywhere)
    with pytest.raises(AssertionError, match="relative error"):
        check_pairs(1, 2, 2)


# What is compiled

VARIANTS = {
    "plain": {},
    "contiguous, rope": {"attention__layout": "contiguous", "model__positions": "rope"},
    "zigzag, even lengths": {"attention__source_layout": "zigzag", "data__source_len": 32, "data__seq_len": 48},
    "ring": {"attention__strategy": "ring"},
    "ulysses": {"attention__strategy": "ulysses"},
    "groups": {"attention__head_groups": 2},
    "gathered again": {"attention__regather": True, "model__remat": "block"},
    "remat": {"model__remat": "block"},
    "input": {"model__remat": "input"},
    "offload": {"model__remat": "offload", "attention__regather": True},
    "tiles": {"model__tile": 3},
    "microbatches": {"optim__accumulate": 2},
    "dropout": {"model__dropout": 0.1},
    "weights": {"mesh__shard": "all", "model__norm": "rms", "model__mlp": "swiglu", "model__bias": False},
    "weights, untied": {"mesh__shard": "all", "model__tied_head": False, "model__remat": "block"},
    "unrolled": {"model__scan_layers": False},
    "queries and keys normalized": {"model__qk_norm": True, "model__kv_heads": 4, "model__remat": "block"},
    "the encoder is frozen": {"optim__frozen": "encoder/*,encoder_norm/*,source_positions/*,tokens/*"},
    "vocabulary": {"model__vocab_parallel": True},
    "vocabulary in tiles": {"model__vocab_parallel": True, "model__tile": 3},
}
COMPILED = ["plain", "ulysses", "weights, untied", "vocabulary in tiles"]


@cache
def traced_step(sizes, name):
    model, mesh = model_on(*sizes, **{**PAIRS, **VARIANTS[name]})
    return model, mesh, trace_train_step(model, mesh)


@pytest.mark.parametrize("case", sampled([((2, 2, 2), name) for name in COMPILED], [((2, 2, 2), "plain")]), ids=str)
def test_the_compiled_step_sends_what_is_predicted(case):
    model, mesh, traced = traced_step(*case)
    found = contract.found(hlo.collectives(traced.lower().compile().as_text()), mesh)
    assert not contract.disagreements(found, contract.predicted(model, mesh))
    if case[1] == "plain":
        check_cross_attention(model, found)


def check_cross_attention(model, found):
    """The paper's two collectives, once for each layer of the decoder."""
    gather, scatter = (CROSS_ATTENTION + way for way in (" forward", " backward"))
    times = {(line.place, line.kind): one.times for line, one in found.items() if CROSS_ATTENTION in line.place}
    assert times == dict.fromkeys([(gather, "all-gather"), (scatter, "reduce-scatter")], model.config.model.layers)


@pytest.mark.parametrize("name", sampled(VARIANTS, ["plain"]))
def test_operations_are_those_predicted(name):
    model, mesh, traced = traced_step((2, 2, 2), name)
    assert operations.traced(traced.jaxpr) == operations.outside_attention(model, mesh)
