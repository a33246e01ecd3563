"""Training steps with strategies that are not exact: the same on every mesh, and sent and computed as predicted."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from alternative_cases import LINEAR, LONGFORMER, PERFORMER
from helpers import assert_close, batch_on, make_loss_and_gradient, model_on, perturbed_params, windows_of
from jax.sharding import PartitionSpec as P

from lss_jax.inspection import contract, hlo, operations
from lss_jax.parallel.mesh import DATA, SEQ
from lss_jax.training.step import trace_train_step

ENCODER = {"task": "masked_language_model", "model__family": "encoder", "model__vocab": 257}
TRAINING = {
    "linear": (
        {**LINEAR, "model__tied_head": False},
        {"mesh__shard": "all", "model__remat": "block", "model__tile": 6},
    ),
    "performer": (PERFORMER, {"model__remat": "input", "attention__head_groups": 2}),
    "longformer": (
        {**LONGFORMER, **ENCODER, "attention__global_tokens": 3},
        {"model__remat": "block", "attention__head_groups": 2, "model__tile": 6},
    ),
}


@pytest.mark.grid
@pytest.mark.parametrize("strategy", ["linear", "longformer"])
def test_a_step_is_the_same_on_every_mesh_with_all_that_makes_room(strategy):
    changes, room = TRAINING[strategy]
    found = {}
    for mesh, options in (((1, 1), {}), ((2, 4), room)):
        family, on = model_on(*mesh, **changes, **options)
        batch = batch_on(on, family.config)
        if family.config.task != "language_model":
            whole = jnp.broadcast_to(jnp.array([0, 48]).reshape(2, 1, 1), (2, 8, 48))
            batch = batch._replace(
                documents=jax.device_put(whole, batch.tokens.sharding.update(spec=P(None, DATA, SEQ)))
            )
        loss, gradient = jax.jit(make_loss_and_gradient(family, on))(perturbed_params(family), batch, 0)
        found[mesh] = {"loss": loss, "gradient": gradient}
    assert_close(found[2, 4], found[1, 1], 2e-5)


@pytest.mark.grid
@pytest.mark.parametrize("strategy", TRAINING)
def test_collectives_and_operations_of_a_step(strategy):
    changes, room = TRAINING[strategy]
    model, mesh = model_on(2, 2, 2, **changes, **room)
    traced = trace_train_step(model, mesh)
    found = contract.found(hlo.collectives(traced.lower().compile().as_text()), mesh)
    assert not contract.disagreements(found, contract.predicted(model, mesh))
    assert operations.traced(traced.jaxpr) == operations.outside_attention(model, mesh)
    assert operations.attention(model, mesh) > 0


@pytest.mark.grid
def test_a_decoder_with_global_tokens_equals_the_oracle_with_that_mask():
    """The task leaves the window to the strategy: in a mask of its own it would hide the global tokens."""
    family, mesh = model_on(1, 4, **LONGFORMER, attention__global_tokens=3)
    config, params = family.config, perturbed_params(family)
    windows = windows_of(config)
    batch = batch_on(mesh, config, data=windows.data, starts_B=windows.starts_B)
    loss, gradient = jax.jit(make_loss_and_gradient(family, mesh))(params, batch, 0)
    tokens_BL, targets_BL, _, position_BL = oracle.plain_inputs(windows, config)
    i, j = np.ogrid[:48, :48]
    seen_1LL = ((j <= i) & ((i - j < 8) | (j < 3)))[None]
    expected = jax.jit(jax.value_and_grad(oracle.loss), static_argnums=5)(
        params, tokens_BL, targets_BL, seen_1LL, position_BL, config.model
    )
    assert_close({"loss": loss, "gradient": gradient}, dict(zip(("loss", "gradient"), expected, strict=True)), 1e-5)
