"""The hierarchy of decoders against a dense one on one device, written here once more; and what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import (
    assert_close,
    batch_on,
    make_loss_and_gradient,
    model_on,
    perturbed_params,
    sampled,
    small_config,
    windows_of,
)

from lss_jax.config.schema import ConfigError
from lss_jax.generation.request import task_and_text
from lss_jax.inspection import contract, hlo, operations
from lss_jax.inspection.planner import Room, evaluate
from lss_jax.training.setup import validate
from lss_jax.training.step import trace_train_step

HIERARCHY = {
    "model__family": "hierarchical",
    "model__patch": 3,
    "model__width": 48,
    "model__local_layers": 2,
    "model__local_width": 16,
}
PATCHES_OF_2 = {**HIERARCHY, "model__patch": 2}


def expected(params, windows, config):
    """Loss and gradient: a loop over layers and plain indexing, and the oracle's blocks."""
    tokens_BL, targets_BL, *_ = oracle.plain_inputs(windows, config)
    model, patch = config.model, config.model.patch
    local = dataclasses.replace(model, layers=model.local_layers, width=model.local_width)
    B, L = tokens_BL.shape
    K = -(-L // patch)
    padded_BL = np.pad(tokens_BL, ((0, 0), (0, K * patch - L)))

    def stack(params, x, model):
        seen, position = np.tri(x.shape[1], dtype=bool)[None], np.arange(x.shape[1])[None]
        for p in oracle.layers(params["blocks"]):
            x = oracle.mlp(p, x + oracle.attention(p, x, seen, model, position), model)
        return x

    def loss(params):
        before = np.concatenate((np.full((B, patch), model.vocab), padded_BL[:, :-patch]), 1)
        x = params["tokens"]["table_VE"][before].reshape(B, K, model.width)
        if model.positions == "learned":
            x = x + params["positions"]["table_LE"]
        x = oracle.norm(params["global_norm"], stack(params["stack"], x, model), model)
        x = oracle._linear(params["to_local"], x.reshape(B, K, patch, -1))
        x = x + params["local_tokens"]["table_VE"][padded_BL].reshape(x.shape)
        if model.positions == "learned":
            x = x + params["local_positions"]["table_LE"]
        x = stack(params["local_stack"], x.reshape(B * K, patch, -1), local)
        x = oracle.norm(params["final_norm"], x, model).reshape(B, K * patch, -1)[:, :L]
        head = params["local_tokens"]["table_VE"].T if model.tied_head else params["head"]["kernel_EV"]
        logp = jnp.take_along_axis(jax.nn.log_softmax(x @ head), np.maximum(targets_BL, 0)[..., None], 2)[..., 0]
        return -(logp * (targets_BL >= 0)).sum() / (targets_BL >= 0).sum()

    return jax.jit(jax.value_and_grad(loss))(params)


def check(data: int, seq: int, **changes) -> None:
    family, mesh = model_on(data, seq, **changes)
    config, params = family.config, perturbed_params(family)
    windows = windows_of(config)
    batch = batch_on(mesh, config, data=windows.data, starts_B=windows.starts_B)
    loss, gradient = jax.jit(make_loss_and_gradient(family, mesh))(params, batch, 0)
    right_loss, right = expected(params, windows, config)
    assert_close({"loss": loss, "gradient": gradient}, {"loss": right_loss, "gradient": right}, 2e-5)


LARGE = {"mesh__shard": "all", "model__remat": "block", "model__tile": 4, "attention__head_groups": 2}
CASES = {
    "1x8": (1, 8, {**HIERARCHY, "attention__layout": "contiguous"}),
    "2x4 zigzag": (2, 4, HIERARCHY),
    "1x3 padded": (1, 3, {**HIERARCHY, "data__seq_len": 52, "attention__layout": "contiguous"}),
    "1x3 zigzag, padded": (1, 3, {**PATCHES_OF_2, "data__seq_len": 47, "model__positions": "rope"}),
    "ring, untied": (2, 2, {**PATCHES_OF_2, "attention__strategy": "ring", "model__tied_head": False}),
    "what makes room": (2, 4, {**PATCHES_OF_2, **LARGE}),
}
PROGRAMS = {
    "what makes room": CASES["what makes room"],
    "ulysses, microbatches": (2, 4, {**PATCHES_OF_2, "attention__strategy": "ulysses", "optim__accumulate": 2}),
    "from the input": (1, 8, {**HIERARCHY, "attention__layout": "contiguous", "model__remat": "input"}),
}


@pytest.mark.parametrize("case", sampled(CASES, ["2x4 zigzag"]))
def test_equals_the_oracle(case):
    data, seq, changes = CASES[case]
    check(data, seq, **changes)


@pytest.mark.grid
def test_a_patch_that_stays_is_seen(monkeypatch):
    monkeypatch.setattr(jax.lax, "ppermute", lambda x, axis, moves: x)
    with pytest.raises(AssertionError, match="relative error"):
        check(1, 4, **PATCHES_OF_2, attention__strategy="ulysses", model__positions="none")


@pytest.mark.grid
@pytest.mark.parametrize("case", PROGRAMS)
def test_collectives_and_operations_are_as_predicted(case):
    data, seq, changes = PROGRAMS[case]
    model, mesh = model_on(data, seq, **changes)
    traced = trace_train_step(model, mesh)
    found = contract.found(hlo.collectives(traced.lower().compile().as_text()), mesh)
    assert not contract.disagreements(found, contract.predicted(model, mesh))
    assert operations.traced(traced.jaxpr) == operations.outside_attention(model, mesh)


@pytest.mark.grid
def test_no_logit_depends_on_a_later_token():
    family, mesh = model_on(1, 1, **HIERARCHY)
    config, params = family.config, perturbed_params(family)
    data = np.random.default_rng(0).integers(0, 256, 2000).astype(np.uint8)
    step = jax.jit(make_loss_and_gradient(family, mesh))
    for token in (4, 5, 6):
        other = data.copy()
        other[token] += 1  # an input there, and the target of the position before it
        rows = [batch_on(mesh, config, data=x, starts_B=np.zeros(8, int)) for x in (data, other)]
        upto = [row._replace(targets=jnp.where(jnp.arange(48) < token - 1, row.targets, -1)) for row in rows]
        losses = [float(step(params, batch, 0)[0]) for batch in upto]
        assert losses[0] == losses[1]
        upto = [row._replace(targets=jnp.where(jnp.arange(48) == token, row.targets, -1)) for row in rows]
        losses = [float(step(params, batch, 0)[0]) for batch in upto]
        assert losses[0] != losses[1]


BAD = {
    "model.patch=0 must be at least 1 for model.family='hierarchical'": {"model__patch": 0},
    "model.width=48 is not divisible by model.patch=5, each": {"model__patch": 5, "data__seq_len": 80},
    "model.local_width=18 is not divisible by model.heads=4; use model.local_width=20": {"model__local_width": 18},
    "makes heads of odd width 3, but rope rotates pairs": {"model__local_width": 12, "model__positions": "rope"},
    "mesh.model=2 shards what model.family='hierarchical' keeps whole; use mesh.model=1": {"mesh__model": 2},
    "attention.window=4 has no use with model.family='hierarchical', whose decoders see": {"attention__window": 4},
    "attention.prefix=4 has no use with model.family='hierarchical'": {"attention__prefix": 4},
    "model.dropout=0.1 has no use with model.family='hierarchical', whose decoders drop nothing": {
        "model__dropout": 0.1
    },
    'model.remat="offload" has no use with model.family=': {"model__remat": "offload"},
    "lora.rank=2 has no use with model.family='hierarchical'": {"lora__rank": 2},
    "makes windows of several documents, and with model.family='hierarchical' a patch of two would see both": {
        "data__separator": "a"
    },
    "data.seq_len=48 in 8 chunks (mesh.seq=4, attention.layout='zigzag') is 6 tokens each, which are not whole "
    "patches of model.patch=4; use data.seq_len=64": {"model__patch": 4, "mesh__seq": 4},
    "task='masked_language_model' predicts tokens from both sides, which model.family='hierarchical' does not do": {
        "task": "masked_language_model"
    },
}


@pytest.mark.parametrize("message", BAD)
def test_what_it_cannot_do_is_one_line(message):
    with pytest.raises(ConfigError) as error:
        validate(small_config(**{**HIERARCHY, **BAD[message]}), 8)
    assert message in str(error.value)


def test_other_families_have_no_patches():
    with pytest.raises(ConfigError, match=r"model.patch=4 has no use with model.family='decoder'.*; use model.patch=0"):
        validate(small_config(model__patch=4), 8)


def test_it_generates_nothing():
    with pytest.raises(ConfigError, match=r"model.family='hierarchical' cannot generate; give a run of .*'decoder'"):
        task_and_text(small_config(**HIERARCHY))


@pytest.mark.grid
def test_it_is_planned_for_lengths_of_whole_patches():
    candidate = evaluate(small_config(**HIERARCHY, data__batch_size=1), (1, 2, 1), "lss", Room(2**25, None))
    assert candidate.longest.seq_len > 48 and candidate.longest.seq_len % (3 * 4) == 0
