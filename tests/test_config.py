"""The config: what it takes, and one clear error for what it does not."""

import runpy
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from helpers import change, make_loss_and_gradient, small_config

from configs import base
from lss_jax.config.loading import override
from lss_jax.config.rules import mesh_sizes
from lss_jax.config.schema import ConfigError, MeshConfig, from_dict
from lss_jax.data.batch import batch_like
from lss_jax.models import build_model, parameter_count
from lss_jax.parallel.layout import layout_on
from lss_jax.parallel.mesh import abstract_mesh, make_mesh
from lss_jax.training.compatibility import shapes_of, shaping
from lss_jax.training.optimizer import decayed, make_optimizer, make_schedule
from lss_jax.training.setup import validate
from lss_jax.training.state import init_state

CONFIGS = sorted(Path(__file__).parents[1].joinpath("configs").glob("*.py"))


def load(name):
    return from_dict(runpy.run_path(str(Path(__file__).parents[1] / "configs" / f"{name}.py"))["get_config"]())


@pytest.mark.quick
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_well_formed(path):
    config = load(path.stem)
    if config.data.source == "fasta":
        config = change(config, data__path="genomes of a user")
    validate(config, 3456 if path.stem == "paper_50112" else 8)


def test_enwik8_has_the_papers_size():
    config = load("enwik8")
    assert (config.model.layers, config.model.width, config.model.heads) == (6, 512, 8)
    assert 18e6 < parameter_count(build_model(config)) < 22e6


def test_the_papers_largest_run_traces_on_its_mesh():
    """50,112 tokens on 24 x 144 devices: shapes, specs and the gradient law hold, though nothing is allocated."""
    config = load("paper_50112")
    sizes = validate(config, 3456)
    assert sizes == (24, 144, 1)
    mesh = abstract_mesh(sizes)
    model = build_model(config)
    layout = layout_on(config, mesh)
    batch = batch_like(config.data.batch_size, config.data.seq_len, mesh, layout, packed=False)
    loss, gradient = jax.eval_shape(make_loss_and_gradient(model, mesh), model.shapes, batch, 0)
    assert loss.shape == ()
    assert jax.tree.map(lambda g: g.shape, gradient) == jax.tree.map(lambda p: p.shape, model.shapes)
    assert gradient["positions"]["table_LE"].shape == (50_112, 512)


@pytest.mark.parametrize(
    ("mesh", "devices", "sizes"),
    [
        ((-1, 1, 1), 8, (8, 1, 1)),
        ((2, -1, 1), 8, (2, 4, 1)),
        ((2, 3, 1), 6, (2, 3, 1)),
        ((2, 2, -1), 8, (2, 2, 2)),
        ((1, 1, 1), 1, (1, 1, 1)),
    ],
)
def test_minus_one_fills_an_axis(mesh, devices, sizes):
    assert mesh_sizes(MeshConfig(*mesh, "none"), devices) == sizes


def test_neighbouring_devices_share_a_sequence():
    ids = np.vectorize(lambda device: device.id)(make_mesh((2, 4, 1), jax.devices()[:8]).devices)
    np.testing.assert_array_equal(ids[..., 0], np.arange(8).reshape(2, 4))


BAD = {
    "attention.strategy='star'": r"'star' is not known; choose one of 'lss', 'ring', 'ulysses'",
    "task='star' model.family='x'": r"model.family='x' is not known; choose .*\ntask='star' is not known; choose one",
    "mesh.seq=-2": r"mesh.data=-1, mesh.seq=-2, mesh.model=1: each size must be at least 1, and at most one may be -1",
    "mesh.seq=-1": r"mesh.data=-1, mesh.seq=-1, mesh.model=1: each size must",
    "mesh.seq=3": r"needs a multiple of 3 devices, but 8 are found; .*JAX_NUM_CPU_DEVICES=3",
    "mesh.seq=5 mesh.data=1": r"mesh.data=1, mesh.seq=5, mesh.model=1 needs 5 devices, but 8 are found",
    "mesh.model=8": r"model.heads=4 is not divisible by mesh.model=8, which shards it; "
    r"use model.heads=8 or a mesh.model",
    "mesh.model=4 model.kv_heads=2": r"model.kv_heads=2 is not divisible by mesh.model=4, .*; use model.kv_heads=4",
    "mesh.model=4 model.mlp_width=30": r"model.mlp_width=30 is not divisible by mesh.model=4, .*model.mlp_width=32",
    "mesh.model=2 mesh.seq=4 attention.strategy='ulysses'": r"=4 .* mesh.seq=4 times mesh.model=2, .*use model.heads=8",
    "mesh.model=4 attention.head_groups=2": r"kv_heads=4 .* times mesh.model=4; use attention.head_groups=1",
    "data.batch_size=12": r"data.batch_size=12 is not divisible by mesh.data=8 times optim.accumulate=1; .*=16",
    "optim.accumulate=3": r"is not divisible by mesh.data=8 times optim.accumulate=3; use data.batch_size=24",
    "model.width=30": r"model.width=30 is not divisible by model.heads=4; use model.width=32",
    "model.kv_heads=3": r"model.heads=4 is not divisible by model.kv_heads=3; .* use model.kv_heads=4 or a divisor",
    "model.positions='rope' model.width=12": r"head width model.head_width=3 is odd, but rope rotates pairs",
    "model.vocab=100": r"model.vocab=100 is less than 256, which data of bytes needs; use model.vocab=256",
    "model.dropout=1.0": r"model.dropout=1.0 must be at least 0 and less than 1",
    "model.positions='sinus'": r"model.positions='sinus' is not known; choose one of 'learned', 'sinusoidal', 'rope', ",
    "model.rope_factor=2.0": r'model.rope_factor=2.0 has no use with model.rope_scaling="none"; use "linear", "ntk",',
    "model.positions='rope' model.rope_scaling='yarn'": r"model.rope_scaling='yarn' needs model.rope_original, the tok",
    "model.positions='rope' model.rope_scaling='llama3' model.rope_original=8 model.rope_low=40.0": r"model.rope_high="
    r"32.0 must be finite and greater than model.rope_low=40.0",
    "model.norm_epsilon=0.0": r"model.norm_epsilon=0.0 must be greater than 0 and finite",
    "model.head_width=-4": r"model.head_width=-4 must be at least 0",
    "model.positions='rope' model.head_width=5": r"head width model.head_width=5 is odd",
    "model.rope_scaling='ntk'": r"model.rope_scaling='ntk' has no use with model.positions='learned'; use model.pos",
    "model.rope_columns=8": r"model.rope_columns=8 has no use with model.positions='learned'; use model.pos",
    "model.rope_columns=-8": r"model.rope_columns=-8 must be at least 0",
    "model.rope_columns=8 model.positions='rope' model.rope_scaling='ntk'": r"model.rope_scaling='ntk' is for position"
    r"s of one dimension, but model.rope_columns=8 gives two; use model.rope_scaling=\"none\"",
    "model.rope_columns=8 model.positions='rope' model.head_width=6": r"model.head_width=6 is not divisible by 4, but "
    r"model.rope_columns=8 rotates half of the pairs by row and half by column; use a multiple of 4",
    "model.dropout=0.999": r"model.dropout=0.999 leaves next to nothing; use at most 0.99",
    "attention.window=2**31": r"attention.window=2147483648 must be less than 2\*\*31; use 0 for all",
    "model.rope_base=0.0": r"model.rope_base=0.0 must be greater than 0 and finite",
    "attention.strategy='lsa'": r"attention.strategy='lsa' is not known; choose one of 'lss', 'ring', 'ulysses'",
    "attention.strategy='ring' attention.kernel='dense'": r"kernel='dense' cannot take keys as they come by, .*block",
    "attention.strategy='ulysses' mesh.seq=8": r"heads=4 is not divisible by mesh.seq=8, .*use model.heads=8 or .*lss",
    "attention.strategy='ulysses' mesh.seq=4 attention.head_groups=2": r"mesh.seq=4 times attention.head_groups=2, ",
    "attention.regather=True attention.strategy='ring'": r"regather=True has no use with attention.strategy='ring'",
    "attention.head_groups=3": r"kv_heads=4 is not divisible by attention.head_groups=3; use .*head_groups=4",
    "attention.head_groups=0": r"attention.head_groups=0 must be at least 1",
    "attention.block_keys=0": r"attention.block_keys=0 must be at least 1",
    "attention.window=-1": r"attention.window=-1 must be at least 0",
    "attention.prefix=48": r"attention.prefix=48 leaves nothing to predict of data.seq_len=48; use a shorter prefix",
    "model.layers=0": r"model.layers=0 must be at least 1",
    "log_every=0": r"log_every=0 must be at least 1",
    "seed=-1": r"seed=-1 must be at least 0",
    "optim.learning_rate=0.0": r"optim.learning_rate=0.0 must be greater than 0",
    "optim.learning_rate=float('nan')": r"optim.learning_rate=nan must be greater than 0 and finite",
    "optim.beta2=1.0": r"optim.beta2=1.0 must be at least 0 and less than 1",
    "optim.warmup_steps=21": r"optim.warmup_steps=21 is more than optim.steps=20; warm up for at most 20 steps",
    "optim.name='sgd'": r"optim.name='sgd' is not known; choose one of 'adamw', 'lion', 'muon'",
    "optim.name='muon' mesh.shard='optimizer'": r"a shard of a matrix, and optim.name=\"muon\" needs all of it; use",
    "optim.name='muon' mesh.shard='all'": r"mesh.shard='all' leaves each device a shard of a matrix",
    "optim.name='muon' optim.moments_dtype='bfloat16'": r"moments_dtype='bfloat16' is not for optim.name=\"muon\"",
    "optim.beta2=0.999 optim.moments_dtype='bfloat16'": r"beta2=0.999 changes a moment by less .*use optim.beta2=0.99",
    "optim.name='muon' optim.offload=True": r"updates a part of a matrix .*use optim.offload=False or optim",
    "optim.offload=True mesh.seq=2": r"with mesh.shard='none' would keep a copy of .*use mesh.shard=\"all\"",
    "mesh.shard='some'": r"mesh.shard='some' is not known; choose one of 'none', 'optimizer', 'all'",
    "model.remat_every=2": r"remat_every=2 has no use with model.remat='none', .*use model.remat=\"input\", \"off",
    "model.remat='offload' model.remat_every=3": r"model.layers=2 is not divisible by model.remat_every=3; use a",
    "model.remat='offload' model.remat_every=0": r"model.remat_every=0 must be at least 1",
    "model.tile=-1": r"model.tile=-1 must be at least 0",
    "optim.name='muon' mesh.model=2": r"mesh.model=2 shards the matrices .*needs all of each; use mesh.model=1, or",
    "data.source='text'": r'data.source="text" needs a file; give data.path',
    "data.path='x'": r"data.path='x' has no use with data.source=\"stdlib\"; use data.source=\"text\"",
}


@pytest.mark.quick
@pytest.mark.parametrize("changes", BAD)
def test_bad_values_are_told_with_rule_and_remedy(changes):
    pairs = dict(change.split("=", 1) for change in changes.split(" "))
    with pytest.raises(ConfigError, match=BAD[changes]):
        validate(small_config(**{key: eval(value) for key, value in pairs.items()}), 8)


@pytest.mark.quick
def test_all_problems_are_told_at_once():
    with pytest.raises(ConfigError) as error:
        validate(small_config(**{"log_every": 0, "model.width": 30, "data.batch_size": 3, "mesh.seq": 4}), 8)
    assert len(str(error.value).split("\n")) == 3


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.model.widht=4", "unknown config key 'model.widht'; did you mean 'model.width'?"),
        ("--config.modle.heads=4", "unknown config key 'modle.heads'; did you mean 'model.heads'?"),
        ("--config.heads=4", "unknown config key 'heads'; did you mean 'model.heads'?"),
        ("--config.qqq=4", "unknown config key 'qqq'; known: attention.block_keys, "),
        ("--config.mesh.seq=four", "invalid literal for int.*give a value of the same type as the default"),
        ("--conf.seed=1", "unknown argument '--conf.seed=1'; see --help"),
        ("--config.model=4", "config key 'model' is a group of keys; set model.NAME instead"),
        ("--config.seed", "unknown argument '--config.seed'; see --help"),
        ("stray", "unknown argument 'stray'; see --help"),
    ],
)
def test_bad_overrides_are_told(argument, message):
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        override(base.get_config(), [argument])


def test_overrides_are_typed_and_derived_defaults_follow():
    arguments = ["--config.model.width=64", "--config.model.tied_head=false", "--config.optim.learning_rate=1"]
    config = from_dict(override(base.get_config(), [*arguments, "--config.model.heads=8"]))
    assert (config.model.width, config.model.mlp_width) == (64, 256)
    assert (config.model.heads, config.model.kv_heads) == (8, 8)
    assert config.model.tied_head is False
    shared = from_dict(override(base.get_config(), ["--config.model.kv_heads=2", "--config.model.mlp_width=100"]))
    assert (shared.model.heads, shared.model.kv_heads) == (4, 2)
    assert (shared.model.width, shared.model.mlp_width) == (128, 100)
    assert config.optim.learning_rate == 1.0


def test_missing_mistyped_and_foreign_keys_are_told():
    values = base.get_config().to_dict()
    del values["model"]["width"]
    values["modell"] = {"width": 3}
    values["seed"] = "0"
    with pytest.raises(ConfigError) as error:
        from_dict(values)
    told = str(error.value)
    assert "unknown config key 'modell'; did you mean 'model'?" in told
    assert "config key 'model.width' is missing" in told
    assert "seed='0' is of type str; give a value of type int" in told


@pytest.mark.parametrize(
    ("saved", "changed", "keys"),
    [
        ({}, {"optim__steps": 30, "mesh__seq": 4, "model__remat": "block", "model__vocab_parallel": True}, []),
        ({}, {"model__vocab": 300, "optim__steps": 30}, ["model.vocab"]),
        ({}, {"model__positions": "rope", "data__seq_len": 24}, ["model.positions", "data.seq_len"]),
        ({"model__positions": "rope"}, {"data__seq_len": 24, "model__rope_base": 500.0}, []),
        ({"model__positions": "rope"}, {"model__positions": "learned", "data__seq_len": 24}, ["model.positions"]),
        ({}, {"model__heads": 5, "model__kv_heads": 4}, ["model.heads", "model.head_width"]),
        ({}, {"model__layers": -1}, ["model.layers"]),
    ],
)
def test_a_key_binds_a_run_if_it_changes_shapes_of_parameters(saved, changed, keys):
    assert list(shaping(small_config(**saved), small_config(**{**saved, **changed}), shapes_of)) == keys


def test_decay_spares_norms_and_biases():
    model = build_model(small_config(model__tied_head=False))
    mask = {jax.tree_util.keystr(path): on for path, on in jax.tree_util.tree_leaves_with_path(decayed(model.shapes))}
    spared = {name for name, on in mask.items() if not on}
    assert spared == {name for name in mask if name.endswith(("['bias']", "['scale']"))}
    assert len(mask) - len(spared) == 9, "six kernels, the head, the tokens and the positions"


def test_the_learning_rate_warms_up_and_decays_to_a_tenth():
    schedule = make_schedule(small_config(optim__learning_rate=1.0, optim__warmup_steps=5, optim__steps=25).optim)
    rates = [float(schedule(step)) for step in range(26)]
    np.testing.assert_allclose(rates[:6], np.arange(6) / 5, atol=1e-6)
    assert all(np.diff(rates[5:]) < 0)
    assert rates[25] == pytest.approx(0.1)


def test_clipping_sees_the_norm_of_the_whole_gradient():
    """The position table is cut over `seq`; its share of the norm counts all the same."""
    config = small_config(optim__clip_norm=0.5)
    model, optimizer = build_model(config), make_optimizer(config.optim)
    mesh = make_mesh((2, 4, 1), jax.devices()[:8])
    state = init_state(model, optimizer, mesh, 0)
    gradient = jax.tree.map(lambda p: 0 * p, state.params)
    gradient["positions"]["table_LE"] += 1.0
    clip = optax.clip_by_global_norm(config.optim.clip_norm)
    clipped, _ = jax.jit(clip.update)(gradient, clip.init(state.params))
    assert float(optax.tree.norm(clipped)) == pytest.approx(0.5, rel=1e-5)
