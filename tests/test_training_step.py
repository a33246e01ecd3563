"""One step, and twenty, on every mesh against the oracle: loss, and each parameter's gradient by name."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import (
    MESHES,
    assert_close,
    batch_on,
    check_against_oracle,
    make_loss_and_gradient,
    mesh_of,
    model_on,
    perturbed_params,
    random_bytes,
    relative_error,
    sampled,
    windows_of,
)
from jax.sharding import PartitionSpec as P

from lss_jax.data.batch import IGNORED
from lss_jax.models.losses import cross_entropy, vocab_parallel_cross_entropy
from lss_jax.parallel.dropout import AFTER_ATTENTION, AFTER_MLP, ATTENTION_WEIGHTS, EMBEDDING, LAYER, Dropout
from lss_jax.parallel.mesh import MODEL
from lss_jax.training.optimizer import make_optimizer
from lss_jax.training.state import init_state
from lss_jax.training.step import make_eval_step, make_train_step

VARIANTS = {
    "learned": {},
    "rope": {"model__positions": "rope"},
    "none": {"model__positions": "none"},
    "untied": {"model__tied_head": False},
    "gqa": {"model__kv_heads": 2},
    "mqa": {"model__kv_heads": 1},
    "unrolled": {"model__scan_layers": False},
    "remat": {"model__remat": "block"},
    "remat and regather": {"model__remat": "block", "attention__regather": True},
    "regather": {"attention__regather": True},
    "groups": {"attention__head_groups": 2},
    "linear rope": {"model__positions": "rope", "model__rope_scaling": "linear", "model__rope_factor": 4.0},
    "ntk rope": {"model__positions": "rope", "model__rope_scaling": "ntk", "model__rope_factor": 4.0},
    "rope by row and column": {"model__positions": "rope", "model__rope_columns": 7, "model__rope_base": 100.0},
    "yarn": {
        **{"model__positions": "rope", "model__rope_scaling": "yarn", "model__rope_factor": 8.0},
        **{"model__rope_original": 40, "model__rope_high": 4.0},
    },
    "llama 3": {
        **{"model__positions": "rope", "model__rope_scaling": "llama3", "model__rope_factor": 8.0},
        **{"model__rope_original": 40, "model__rope_high": 4.0, "model__norm": "rms", "model__mlp": "swiglu"},
        **{"model__kv_heads": 2, "model__bias": False, "model__tied_head": False},
    },
    "qwen 2": {
        **{"model__positions": "rope", "model__norm": "rms", "model__mlp": "swiglu", "model__kv_heads": 2},
        **{"model__bias": False, "model__qkv_bias": True},
    },
    "qwen 3": {
        **{"model__positions": "rope", "model__norm": "rms", "model__mlp": "swiglu", "model__kv_heads": 2},
        **{"model__bias": False, "model__qk_norm": True, "model__head_width": 12, "model__norm_epsilon": 1e-5},
    },
    "qwen 3 in head groups and tiles": {
        **{"model__positions": "rope", "model__qk_norm": True, "model__tile": 4, "attention__head_groups": 2},
    },
    "sinusoidal": {"model__positions": "sinusoidal"},
    "window": {"attention__window": 7},
    "prefix": {"attention__prefix": 11},
    "prefix and window": {"attention__prefix": 11, "attention__window": 7},
    "documents": {"data__separator": "a"},
    "documents in microbatches": {"data__separator": "a", "optim__accumulate": 2},
    "documents and window": {"data__separator": "a", "attention__window": 7},
    "dense": {"attention__kernel": "dense"},
    "small blocks": {"attention__block_queries": 4, "attention__block_keys": 5},
    "wide": {"model__mlp_width": 48, "model__layers": 3},
}


HYBRIDS = [(2, 2, 2), (1, 2, 4), (1, 4, 2), (1, 3, 2), (1, 1, 8)]  # data x seq x model; the last is Nvidia's alone
HYBRID_VARIANTS = {
    **VARIANTS,
    "vocabulary": {"model__vocab_parallel": True},
    "vocabulary, documents in microbatches": {"model__vocab_parallel": True, **VARIANTS["documents in microbatches"]},
    "vocabulary with padding": {"model__vocab_parallel": True, "model__vocab": 257},
    "vocabulary with padding, untied, sinusoidal": {
        "model__vocab_parallel": True,
        "model__vocab": 261,
        "model__tied_head": False,
        "model__positions": "sinusoidal",
    },
    "rope, prefix and window": {**VARIANTS["rope"], **VARIANTS["prefix and window"]},
}
HYBRID_SAMPLE = {
    "qwen 3",
    "remat and regather",
    "vocabulary with padding, untied, sinusoidal",
    "vocabulary, documents in microbatches",
}


@pytest.mark.parametrize("mesh", sampled(MESHES, [(1, 1), (8, 1), (1, 8), (2, 3)], quick=[(1, 8)]), ids=str)
def test_gradient_equals_the_oracle_on_every_mesh(mesh):
    check_against_oracle(*mesh)


@pytest.mark.parametrize("mesh", sampled(HYBRIDS, [(1, 4, 2), (1, 1, 8)]), ids=str)
def test_gradient_equals_the_oracle_on_every_hybrid(mesh):
    check_against_oracle(*mesh, model__heads=8)


@pytest.mark.parametrize(
    "variant", sampled(HYBRID_VARIANTS, HYBRID_SAMPLE, quick=["vocabulary, documents in microbatches"])
)
def test_gradient_equals_the_oracle_for_every_model_on_a_hybrid(variant):
    heads = {"model__kv_heads": 2} if variant == "mqa" else {}  # one key/value head cannot be cut
    check_against_oracle(2, 2, 2, **{**HYBRID_VARIANTS[variant], **heads})


@pytest.mark.parametrize("layout", sampled(["contiguous", "zigzag"], {"zigzag"}))
@pytest.mark.parametrize("strategy", sampled(["lss", "ring", "ulysses"], {"ring", "ulysses"}))
@pytest.mark.parametrize("mesh", sampled([(1, 3, 2), (2, 2, 2), (1, 2, 4)], {(1, 3, 2)}))
def test_gradient_equals_the_oracle_for_every_strategy_and_layout_on_hybrids(mesh, strategy, layout):
    """With learned positions, grouped queries, a vocabulary in shares, and a length that no mesh divides."""
    heads = {"model__heads": 24, "model__width": 48, "model__kv_heads": 4}
    changes = {"attention__strategy": strategy, "attention__layout": layout, "data__seq_len": 41}
    check_against_oracle(*mesh, **heads, **changes, model__vocab_parallel=mesh[2] == 2)


SAMPLE = {
    "yarn",
    "qwen 2",
    "qwen 3 in head groups and tiles",
    "rope",
    "gqa",
    "remat and regather",
    "groups",
    "prefix and window",
    "documents in microbatches",
}


@pytest.mark.parametrize("variant", sampled(VARIANTS, SAMPLE))
def test_gradient_equals_the_oracle_for_every_model(variant):
    check_against_oracle(2, 4, **VARIANTS[variant])


OF_STRATEGIES = [
    ((2, seq), strategy, layout)
    for seq in (4, 3)
    for strategy in ("lss", "ring", "ulysses")
    for layout in ("contiguous", "zigzag")
]


ONE_MESH_TO_A_LAYOUT = [case for case in OF_STRATEGIES if (case[0] == (2, 3)) == (case[2] == "zigzag")]
QUICK = [((2, 3), "ring", "zigzag"), ((2, 3), "ulysses", "zigzag")]


@pytest.mark.parametrize("case", sampled(OF_STRATEGIES, ONE_MESH_TO_A_LAYOUT, quick=QUICK), ids=str)
def test_gradient_equals_the_oracle_for_every_strategy_and_layout(case):
    """With learned positions, fewer key/value heads than devices, and a length that neither 4 nor 3 divides."""
    (data, seq), strategy, layout = case
    changes = {"model__heads": 12, "model__width": 48, "model__kv_heads": 2, "data__seq_len": 41}
    check_against_oracle(data, seq, attention__strategy=strategy, attention__layout=layout, **changes)


@pytest.mark.parametrize("strategy", sampled(["lss", "ring", "ulysses"], ["ring"]))
def test_gradient_equals_the_oracle_for_packed_documents(strategy):
    check_against_oracle(2, 4, attention__strategy=strategy, data__separator="a", data__seq_len=41)


@pytest.mark.parametrize("seq_len", sampled([3, 7, 9, 47], [3]))
def test_any_length_on_eight_devices(seq_len):
    """Shorter than the mesh, and with segments that are all padding."""
    check_against_oracle(1, 8, data__seq_len=seq_len)


@pytest.mark.parametrize("case", sampled([(1, 1, 4), (2, 4, 2), (1, 8, 8)], [(2, 4, 2)]), ids=str)
def test_accumulated_gradient_equals_the_oracle(case):
    data, seq, accumulate = case
    check_against_oracle(data, seq, optim__accumulate=accumulate)


def test_ignored_targets_count_nowhere():
    """The loss law: some devices count many targets, one counts none, and microbatches differ too."""
    source = random_bytes(61)  # of 8 windows of 48, one is whole, one has 12 targets, six have none
    check_against_oracle(2, 4, source=source)
    check_against_oracle(1, 8, source=source, optim__accumulate=4)


@pytest.mark.parametrize("mesh", sampled([(2, 4), (1, 2, 4)], {(2, 4)}))
def test_bfloat16_stays_near_the_float32_oracle(mesh):
    """bfloat16 has 8 bits of mantissa: 5% of the largest entry of each gradient."""
    check_against_oracle(*mesh, bound=5e-2, model__dtype="bfloat16")


@cache
def oracle_curve(steps, name):
    """Losses of `steps` steps of the oracle, and the final parameters."""
    model, _ = model_on(1, 1, optim__name=name)
    config = model.config
    params = jax.tree.map(np.asarray, model.init(jax.random.key(config.seed)))
    moments, losses = (jax.tree.map(np.zeros_like, params),) * 2, []
    for step in range(steps):
        in_float32 = jax.tree.map(np.float32, params)
        loss, gradient = oracle.loss_and_gradient(in_float32, windows_of(config, seed=step), config)
        params, moments = oracle.OPTIMIZERS[name](params, gradient, moments, step, config.optim)
        losses.append(float(loss))
    return losses, params


ALL_MESHES = [*((*mesh, 1) for mesh in MESHES), (2, 2, 2), (1, 1, 4), (1, 3, 2)]


WITH_MUON = [(mesh, "muon") for mesh in ALL_MESHES if mesh[2] == 1]  # it needs whole matrices


@pytest.mark.parametrize(
    "case",
    sampled(
        [*((mesh, "adamw") for mesh in ALL_MESHES), *WITH_MUON, ((2, 4, 1), "lion")],
        {((2, 2, 2), "adamw"), ((2, 4, 1), "muon"), ((2, 4, 1), "lion")},
    ),
)
def test_twenty_steps_follow_the_oracle(case):
    mesh, name = case
    model, mesh = model_on(*mesh, optim__name=name)
    optimizer = make_optimizer(model.config.optim)
    state = init_state(model, optimizer, mesh, model.config.seed)
    train_step, losses = make_train_step(model, optimizer, mesh), []
    for step in range(20):
        state, metrics = train_step(state, batch_on(mesh, model.config, seed=step))
        losses.append(float(metrics["loss"]))
    expected, params = oracle_curve(20, name)
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    assert losses[-1] < 0.95 * losses[0], "it learns"
    assert int(state.step) == 20
    assert_close(state.params, params, 1e-2)  # Adam divides by small numbers: the curve above is the sharp test


@pytest.mark.parametrize("sizes", sampled([(2, 4), (2, 2, 2)], {(2, 2, 2)}))
def test_moments_in_shares_give_the_same_parameters(sizes):
    """Each device has a share of what its copies of a parameter would all have."""
    states = []
    for shard in ("none", "optimizer"):
        model, mesh = model_on(*sizes, mesh__shard=shard, model__vocab_parallel=len(sizes) == 3)
        optimizer = make_optimizer(model.config.optim)
        state, train_step = init_state(model, optimizer, mesh, 0), make_train_step(model, optimizer, mesh)
        for step in range(3):
            state, _ = train_step(state, batch_on(mesh, model.config, seed=step))
        states.append(state)
    whole, shared = states
    assert_close(shared.params, whole.params, 1e-6)
    here = [sum(x.addressable_shards[0].data.size for x in jax.tree.leaves(s.opt_state)) for s in states]
    assert here[1] < 1.05 * here[0] / (sizes[0] * sizes[1])


@pytest.mark.parametrize("mesh", sampled([(2, 4), (2, 2, 2)], [(2, 2, 2)]), ids=str)
def test_evaluation_equals_the_oracle(mesh):
    model, mesh = model_on(*mesh, model__vocab_parallel=len(mesh) == 3)
    params = perturbed_params(model)
    windows = oracle.Windows(random_bytes(200), np.arange(8) * 48)
    sums = make_eval_step(model, mesh)(params, batch_on(mesh, model.config, 0, *windows))
    expected, _ = oracle.loss_and_gradient(params, windows, model.config)
    assert float(sums.tokens) == 199
    assert relative_error(sums.mean(), expected) < 1e-5


def test_vocab_parallel_cross_entropy_is_cross_entropy():
    """Value and gradient, also of logits whose exponentials overflow, and with tokens that do not count."""
    random, mesh = np.random.default_rng(0), mesh_of(1, 1, 4)
    logits_BLV = random.normal(0, 30, (2, 8, 12)).astype(np.float32)
    logits_BLV[0] += 1e4
    targets_BL = random.integers(IGNORED, 12, (2, 8), np.int32)

    @partial(jax.shard_map, mesh=mesh, in_specs=(P(None, None, MODEL), P()), out_specs=P())
    def in_shares(logits_BLV, targets_BL):
        return jax.lax.psum(jax.tree.map(jnp.sum, vocab_parallel_cross_entropy(logits_BLV, targets_BL, MODEL)), MODEL)

    def value_and_gradient(function):
        return jax.jit(jax.value_and_grad(lambda logits: function(logits, targets_BL).nats.sum()))(logits_BLV)

    assert_close(value_and_gradient(in_shares), value_and_gradient(cross_entropy), 1e-5)
    assert in_shares(logits_BLV, targets_BL).tokens == (targets_BL != IGNORED).sum() < targets_BL.size


DROPPING = {"model__dropout": 0.2, "model__heads": 6, "model__width": 48, "model__kv_heads": 2}


@cache
def curve_with_dropout(*mesh, **changes):
    """Losses of five steps."""
    model, mesh = model_on(*mesh, **DROPPING, **changes)
    optimizer = make_optimizer(model.config.optim)
    state = init_state(model, optimizer, mesh, model.config.seed)
    train_step, losses = make_train_step(model, optimizer, mesh), []
    for step in range(5):
        state, metrics = train_step(state, batch_on(mesh, model.config, seed=step))
        losses.append(float(metrics["loss"]))
    return losses


@pytest.mark.parametrize(
    ("mesh", "changes"),
    [
        pytest.param((1, 8), {"attention__head_groups": 2}, marks=pytest.mark.grid),
        pytest.param((2, 4), {"attention__strategy": "ring", "model__remat": "block"}, marks=pytest.mark.grid),
        ((2, 2, 2), {"model__remat": "block", "model__vocab_parallel": True}),
        pytest.param((1, 1), {}, marks=pytest.mark.grid),
        pytest.param((8, 1), {"optim__accumulate": 1}, marks=pytest.mark.grid),
        pytest.param((2, 4), {"attention__layout": "contiguous", "optim__accumulate": 4}, marks=pytest.mark.grid),
        pytest.param((1, 3), {"attention__strategy": "ulysses"}, marks=pytest.mark.grid),
        pytest.param((1, 3, 2), {"attention__strategy": "ulysses"}, marks=pytest.mark.grid),
        (
            (1, 3),
            {"mesh__shard": "all", "model__tile": 5, "model__remat": "offload", "attention__head_groups": 2},
        ),
    ],
)
def test_dropout_gives_one_curve_on_every_mesh(mesh, changes):
    reference = curve_with_dropout(1, 1, attention__kernel="dense", attention__layout="contiguous")
    np.testing.assert_allclose(curve_with_dropout(*mesh, **changes), reference, rtol=1e-5)


def test_dropout_is_at_every_place_and_each_has_a_key_of_its_own(monkeypatch):
    at, places = Dropout.at, []

    def noted(self, *coordinates):
        places.append(coordinates[0])
        return at(self, *coordinates)

    monkeypatch.setattr(Dropout, "at", noted)
    model, mesh = model_on(2, 4, **DROPPING)
    jax.eval_shape(make_loss_and_gradient(model, mesh), model.shapes, batch_on(mesh, model.config), 0)
    assert set(places) == {EMBEDDING, LAYER, ATTENTION_WEIGHTS, AFTER_ATTENTION, AFTER_MLP}


def test_dropout_depends_on_seed_and_step_and_spares_evaluation():
    model, mesh = model_on(2, 4, **DROPPING)
    params, batch = perturbed_params(model), batch_on(mesh, model.config)
    loss_and_gradient = jax.jit(make_loss_and_gradient(model, mesh))
    of_step = [float(loss_and_gradient(params, batch, step)[0]) for step in (0, 0, 1)]
    other, _ = model_on(2, 4, seed=1, **DROPPING)
    of_seed = float(jax.jit(make_loss_and_gradient(other, mesh))(params, batch, 0)[0])
    assert of_step[0] == of_step[1]
    assert len({*of_step, of_seed}) == 3
    expected, _ = oracle.loss_and_gradient(params, windows_of(model.config), model.config)
    assert relative_error(make_eval_step(model, mesh)(params, batch).mean(), expected) < 1e-5


def test_every_mesh_starts_from_the_same_parameters():
    states = []
    for sizes in [(1, 1), (2, 4), (2, 2, 2)]:
        model, mesh = model_on(*sizes, model__vocab_parallel=len(sizes) == 3)
        states.append(init_state(model, make_optimizer(model.config.optim), mesh, seed=3))
    for state in states[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), states[0], state)
