"""What makes room for large models and long sequences, each alone and all together, against the oracle.

The Llama-class block, weights sharded at rest, tiles of tokens, blocks recomputed from inputs that wait in host memory
(on CPU: that wait), and heads in groups. Sizes are such that nothing divides evenly unless it must.
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import (
    LLAMA,
    assert_close,
    batch_on,
    check_against_oracle,
    make_loss_and_gradient,
    mesh_of,
    model_on,
    perturbed_params,
    sampled,
    windows_of,
    with_shapes,
)
from jax.sharding import PartitionSpec as P

import lss_jax.models.recompute
import lss_jax.models.tiles
import lss_jax.parallel.host_memory
from lss_jax import load_config
from lss_jax.config.schema import ConfigError
from lss_jax.models import FAMILIES, build_model, parameter_count
from lss_jax.models.tiles import tile_size
from lss_jax.parallel.mesh import DATA, SEQ
from lss_jax.parallel.weights import Share, whole_weight
from lss_jax.training.optimizer import make_optimizer
from lss_jax.training.state import init_state
from lss_jax.training.step import make_train_step

OPTIONS = {
    "block": {},
    "weights": {"mesh__shard": "all"},
    "weights, remat": {"mesh__shard": "all", "model__remat": "block"},
    "tiles": {"model__tile": 5},
    "tiles and a rest": {"model__tile": 5, "data__seq_len": 88},
    "offload": {"model__remat": "offload"},
    "input": {"model__remat": "input"},
    "input, unrolled": {"model__remat": "input", "model__scan_layers": False},
    "input of every other": {"model__remat": "input", "model__remat_every": 2, "model__layers": 4},
    "offload of every other": {"model__remat": "offload", "model__remat_every": 2, "model__layers": 4},
    "groups": {"attention__head_groups": 2},
    "groups, gathered again": {"attention__head_groups": 2, "attention__regather": True},
}
ALL = {
    "mesh__shard": "all",
    "model__tile": 5,
    "model__remat": "offload",
    "attention__head_groups": 2,
    "attention__regather": True,
}
OPTIONS["all"] = ALL
STATE_ON_HOST = {"mesh__shard": "all", "optim__offload": True}
OPTIONS["all, vocabulary with padding"] = {**ALL, "model__vocab": 257}
OPTIONS["state on the host, in microbatches"] = {**STATE_ON_HOST, "optim__accumulate": 2}
OPTIONS["state on the host, recomputed"] = {**STATE_ON_HOST, "model__remat": "block"}
OPTIONS["all and state on the host"] = {**ALL, **STATE_ON_HOST}
OPTIONS["all of every other and state on the host"] = {
    **ALL,
    **STATE_ON_HOST,
    "model__remat_every": 2,
    "model__layers": 4,
}
OPTIONS["all in microbatches"] = {**ALL, "optim__accumulate": 2}
OPTIONS["all with biases and a tied head"] = {
    **ALL,
    "model__bias": True,
    "model__tied_head": True,
    "model__norm": "layer",
}
OPTIONS["all with a table of positions"] = {**ALL, "model__positions": "learned", "data__seq_len": 45}
OPTIONS["all with documents"] = {**ALL, "data__separator": "a"}
UPDATES = {
    "adamw": {},
    "adamw in bfloat16": {"optim__moments_dtype": "bfloat16"},
    "lion in bfloat16": {"optim__name": "lion", "optim__moments_dtype": "bfloat16"},
}
MESHES = [(1, 8, 1), (2, 4, 1), (2, 2, 2), (1, 2, 4), (1, 3, 1)]  # data x seq x model
SAMPLE = {
    ((2, 4, 1), "block"),
    ((2, 2, 2), "tiles and a rest"),
    ((1, 3, 1), "weights"),
    ((2, 2, 2), "offload of every other"),
    ((1, 8, 1), "all"),
    ((2, 2, 2), "state on the host, in microbatches"),
    ((1, 3, 1), "all and state on the host"),
    ((1, 1, 1), "state on the host, recomputed"),
    ((2, 2, 2), "all in microbatches"),
    ((1, 3, 1), "all with a table of positions"),
}
CASES = [(mesh, option) for mesh in MESHES for option in OPTIONS]
CASES += [((1, 1, 1), option) for option in OPTIONS if "host" in option]


@pytest.mark.parametrize("case", sampled(CASES, SAMPLE, quick=[((1, 8, 1), "all")]), ids=str)
def test_gradient_equals_the_oracle(case):
    mesh, option = case
    check_against_oracle(*mesh, model__vocab_parallel=mesh[2] > 1, **{**LLAMA, **OPTIONS[option]})


@pytest.mark.parametrize("strategy", sampled(["ring", "ulysses"], ["ulysses"]))
@pytest.mark.parametrize("mesh", sampled([(2, 4, 1), (2, 2, 2)], [(2, 2, 2)]), ids=str)
def test_all_together_for_every_strategy(mesh, strategy):
    changes = {**LLAMA, **ALL, "attention__regather": strategy != "ring", "attention__strategy": strategy}
    check_against_oracle(*mesh, **changes)


@cache
def oracle_curve():
    """Losses of 20 steps of the oracle."""
    model, _ = model_on(1, 1, **LLAMA)
    config = model.config
    params = jax.tree.map(np.asarray, model.init(jax.random.key(config.seed)))
    moments, losses = (jax.tree.map(np.zeros_like, params),) * 2, []
    for step in range(20):
        loss, gradient = oracle.loss_and_gradient(jax.tree.map(np.float32, params), windows_of(config, step), config)
        params, moments = oracle.adamw(params, gradient, moments, step, config.optim)
        losses.append(float(loss))
    return losses


def curve(*mesh, **changes):
    return trained(20, *mesh, **changes)[0]


def trained(steps, *mesh, **changes):
    """The losses of some steps, and the state after them."""
    model, mesh = model_on(*mesh, **LLAMA, **changes)
    optimizer = make_optimizer(model.config.optim)
    state, losses = init_state(model, optimizer, mesh, model.config.seed), []
    train_step = make_train_step(model, optimizer, mesh)
    for step in range(steps):
        state, metrics = train_step(state, batch_on(mesh, model.config, seed=step))
        losses.append(float(metrics["loss"]))
    return losses, state


@pytest.mark.parametrize("mesh", sampled(MESHES, [(1, 3, 1)]), ids=str)
def test_twenty_steps_with_all_of_it_follow_the_oracle(mesh):
    np.testing.assert_allclose(curve(*mesh, **ALL, optim__offload=mesh == (1, 3, 1)), oracle_curve(), rtol=1e-4)


@pytest.mark.parametrize("changes", sampled(UPDATES, ["lion in bfloat16"]))
def test_an_update_in_slices_is_the_update(changes, monkeypatch):
    """Weights and moments are in host memory, and never more than a few rows of them on the device."""
    monkeypatch.setattr(lss_jax.parallel.host_memory, "SLICE", 600)
    (_, found), (_, expected) = (
        trained(3, 2, 2, 2, **{**STATE_ON_HOST, **UPDATES[changes], "optim__offload": offload})
        for offload in (True, False)
    )
    rounded = "bfloat16" in changes  # to the other neighbour, if gradients differ by next to nothing
    assert_close(found.params, expected.params, 1e-3 if rounded else 1e-5)
    assert_close(found.opt_state, expected.opt_state, 1e-2 if rounded else 1e-4)
    kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves((found.params["stack"], found.opt_state))}
    assert kinds == {"device", "pinned_host"}
    assert found.params["stack"]["blocks"]["mlp"]["up"]["kernel"].sharding.memory_kind == "pinned_host"


@pytest.mark.parametrize("changes", [{"model__remat": "input"}, {"model__remat": "offload", "model__remat_every": 2}])
def test_what_is_dropped_is_dropped_when_recomputed(changes):
    """A layer is known by its number, also within a group of layers."""
    gradients = []
    for change in ({}, changes):
        model, mesh = model_on(1, 2, **LLAMA, **change, model__layers=4, model__dropout=0.2)
        gradients.append(
            jax.jit(make_loss_and_gradient(model, mesh))(
                perturbed_params(model), batch_on(mesh, model.config), jnp.uint32(3)
            )
        )
    assert_close(*gradients, 1e-5)


def test_only_what_all_devices_shard_rests_on_the_host():
    """The gradient of a table that `model` replicates is not finished where it is used."""
    for vocab_parallel in (True, False):
        model, _ = model_on(2, 2, 2, **LLAMA, **STATE_ON_HOST, model__vocab_parallel=vocab_parallel)
        assert model.on_host["tokens"]["table_VE"] == model.on_host["head"]["kernel_EV"] == vocab_parallel
        assert model.on_host["stack"]["blocks"]["mlp"]["up"]["kernel"]
        assert not model.on_host["final_norm"]["scale"]


@pytest.mark.parametrize("name", sampled(["adamw", "lion"], ["lion"]))
def test_moments_in_bfloat16_stay_near_those_in_float32(name):
    changes = {"optim__name": name, "optim__learning_rate": 3e-3 if name == "adamw" else 2e-3}
    narrow, wide = (curve(2, 4, optim__moments_dtype=dtype, **changes) for dtype in ("bfloat16", "float32"))
    assert narrow != wide
    np.testing.assert_allclose(narrow, wide, rtol=1e-2)
    assert narrow[-1] < 0.98 * narrow[0], "it learns"


def test_inputs_in_several_host_buffers_are_put_together_again(monkeypatch):
    """No buffer in host memory may be too large; here none may have more than a few bytes."""
    monkeypatch.setattr(lss_jax.models.recompute, "LARGEST_HOST_BUFFER", 1000)
    check_against_oracle(2, 4, model__remat="offload", data__seq_len=88)


def test_a_family_that_does_not_gather_weights_is_refused(monkeypatch):
    monkeypatch.setitem(FAMILIES, "other", FAMILIES["decoder"]._replace(gathers_weights=False))
    with pytest.raises(ConfigError, match=r"family='other' does not gather weights, which mesh.shard=\"all\" needs"):
        model_on(2, 4, model__family="other", mesh__shard="all")


def test_every_matrix_is_in_shares_and_each_device_has_its_share_alone():
    """Also of an odd group that divides none of the sizes."""
    for sizes in ((1, 3, 1), (2, 4, 1)):
        model, mesh = model_on(*sizes, **LLAMA, mesh__shard="all")
        state = init_state(model, make_optimizer(model.config.optim), mesh, 0)
        here = sum(leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(state.params))
        count = parameter_count(model)
        assert count / mesh.size <= here < 1.1 * count / mesh.size
        natural = with_shapes(state.params, model.natural_shapes)
        plain, _ = model_on(*sizes, **LLAMA)
        assert_close(natural, plain.init(jax.random.key(0)), 1e-6)


def test_llama_8b_has_8_billion_parameters():
    assert parameter_count(build_model(load_config("configs/llama_8b.py"))) == 8_030_261_248
    assert parameter_count(build_model(load_config("configs/llama_1b.py"))) == 1_235_814_400


# The tests can fail


def share_of_own(x, axis_name, *, scatter_dimension, tiled):
    """In place of a reduce-scatter: a device's own term."""
    count = jax.lax.axis_size(axis_name)
    size = x.shape[scatter_dimension] // count
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axis_name) * size, size, scatter_dimension)


def own_share_everywhere(x, axis_name, *, axis, tiled):
    """In place of a gather: weights of which every part is this device's."""
    return jnp.concatenate([x] * jax.lax.axis_size(axis_name), axis)


WRONG = {
    "a dropped scatter over seq": ("psum_scatter", SEQ, share_of_own),
    "a dropped scatter over data": ("psum_scatter", DATA, share_of_own),
    "a stale weight": ("all_gather", DATA, own_share_everywhere),
}


@pytest.mark.parametrize("name", sampled(WRONG, ["a dropped scatter over data", "a stale weight"]))
def test_a_mistake_in_the_weights_is_seen(name, monkeypatch):
    collective, axis, wrong = WRONG[name]
    real = getattr(jax.lax, collective)

    def replaced(x, axis_name, **options):
        of_weights = "tiled" in options and axis_name == axis
        return (wrong if of_weights else real)(x, axis_name, **options)

    monkeypatch.setattr(jax.lax, collective, replaced)
    with pytest.raises(AssertionError, match="relative error"):
        check_against_oracle(2, 4, mesh__shard="all")


def test_a_forgotten_tile_is_seen(monkeypatch):
    def all_but_the_rest(body, p, size, carry):
        assert p % size
        return jax.lax.fori_loop(0, p // size, lambda tile, carry: body(tile * size, size, carry), carry)

    monkeypatch.setattr(lss_jax.models.tiles, "_over_tiles", all_but_the_rest)
    with pytest.raises(AssertionError, match="relative error"):
        check_against_oracle(2, 4, model__tile=5, data__seq_len=88)


# The pieces


def test_a_weight_is_gathered_over_data_then_seq_and_its_gradient_is_summed_over_seq_then_data():
    """On 2 x 3 devices, with padding: the whole weight everywhere, and each share the sum of all devices' terms."""
    mesh, weight = mesh_of(2, 3), np.arange(40, dtype=np.float32).reshape(10, 4)
    share = Share((SEQ, DATA), dimension=0, size=10)
    padded = np.pad(weight, ((0, 2), (0, 0)))
    spec = P((SEQ, DATA))

    def used(share_w):
        whole, transpose = jax.vjp(lambda w: whole_weight(w, share, "float32"), share_w)
        rank = (3 * jax.lax.axis_index(DATA) + jax.lax.axis_index(SEQ)).astype(jnp.float32)
        return whole[None], transpose(whole * 0 + 10.0**rank)[0]

    out_specs = (P((DATA, SEQ)), spec)
    whole, gradient = jax.jit(jax.shard_map(used, mesh=mesh, in_specs=spec, out_specs=out_specs))(padded)
    np.testing.assert_array_equal(whole, np.broadcast_to(weight, (6, 10, 4)))
    np.testing.assert_array_equal(gradient[:10], np.full((10, 4), 111_111.0))
    np.testing.assert_array_equal(gradient[10:], 0)


def test_a_gathered_weight_travels_in_the_compute_dtype_and_its_gradient_in_float32():
    mesh, share = mesh_of(1, 8), Share((SEQ,), dimension=0, size=16)

    def loss(w):
        return jax.lax.psum(jnp.sum(whole_weight(w, share, "bfloat16").astype(jnp.float32) ** 2), SEQ)

    sharded = jax.shard_map(jax.grad(loss), mesh=mesh, in_specs=P(SEQ), out_specs=P(SEQ))
    text = jax.jit(sharded).lower(jax.ShapeDtypeStruct((16, 4), jnp.float32)).as_text()
    moved = {line.split("stablehlo.")[1].split('"')[0]: line for line in text.splitlines() if "all_gather" in line}
    assert "tensor<2x4xbf16>) -> tensor<16x4xbf16>" in moved["all_gather"]
    assert "reduce_scatter" in text and "tensor<16x4xf32>) -> tensor<2x4xf32>" in text


@pytest.mark.parametrize(
    ("tokens", "size", "expected"), [(48, 16, 16), (48, 17, 16), (45, 8, 5), (47, 8, 8), (6, 5, 3)]
)
def test_tiles_divide_the_tokens_if_they_can(tokens, size, expected):
    assert tile_size(tokens, size) == expected


def test_nothing_of_the_size_of_all_logits_exists_in_the_program():
    """With tiles the largest array with a vocabulary in it has a tile's rows, in either pass."""
    sizes = {"model__vocab": 1024, "data__seq_len": 1024, "data__batch_size": 1}
    model, mesh = model_on(1, 1, **LLAMA, **sizes, model__tile=32)
    plain, _ = model_on(1, 1, **LLAMA, **sizes)
    for one, largest in ((model, 32), (plain, 1024)):
        batch = batch_on(mesh, one.config)
        params = perturbed_params(one)
        optimizer = make_optimizer(one.config.optim)
        state = init_state(one, optimizer, mesh, 0)._replace(params=params)
        text = make_train_step(one, optimizer, mesh).lower(state, batch).as_text()
        assert (f"tensor<1x{largest}x1024xf32>" in text) and (largest == 1024 or "1024x1024xf32" not in text)
