"""What many tests need: small configs, meshes on some of the devices, batches, and errors by parameter name."""

import dataclasses

import jax
import numpy as np
import oracle
import pytest

from configs import base
from lss_jax.config.schema import Config, from_dict
from lss_jax.data.batch import Batch
from lss_jax.data.loader import next_tokens, read_batch
from lss_jax.data.packing import separated
from lss_jax.data.windows import windows_at
from lss_jax.models import Model, build_model, resized
from lss_jax.parallel.host_memory import to_device, to_host
from lss_jax.parallel.layout import layout_on
from lss_jax.parallel.mesh import make_mesh
from lss_jax.training.setup import validate
from lss_jax.training.step import make_means_and_gradient
from lss_jax.training.trainer import Trainer

MESHES = [(1, 1), (8, 1), (1, 8), (2, 4), (4, 2), (2, 3)]  # data x seq
SMALL = {
    "model.layers": 2,
    "model.width": 32,
    "model.heads": 4,
    "data.seq_len": 48,  # 2, 3, 4 and 8 divide it
    "data.batch_size": 8,
    "optim.learning_rate": 3e-3,
    "optim.warmup_steps": 2,
    "optim.steps": 20,
    "mesh.data": -1,
}
LLAMA = {
    "model__norm": "rms",
    "model__mlp": "swiglu",
    "model__bias": False,
    "model__tied_head": False,
    "model__positions": "rope",
    "model__heads": 16,
    "model__kv_heads": 8,
    "model__mlp_width": 88,
}
TEXT = bytes(np.random.default_rng(0).choice(list(b"abcdefgh     \n"), 6000))


def small_config(**changes) -> Config:
    """A config of a model that trains in milliseconds; `model__layers=3` changes `model.layers`."""
    values = base.get_config()
    values.update_from_flattened_dict(SMALL)
    values.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return from_dict(values)


def change(config: Config, **changes) -> Config:
    """`change(config, optim__steps=5)`"""
    for key, value in changes.items():
        section, _, name = key.rpartition("__")
        inner = dataclasses.replace(getattr(config, section), **{name: value}) if section else value
        config = dataclasses.replace(config, **{section or name: inner})
    return config


def mesh_of(data: int, seq: int, model: int = 1) -> jax.sharding.Mesh:
    return make_mesh((data, seq, model), jax.devices()[: data * seq * model])


def model_on(data: int, seq: int, model: int = 1, **changes) -> tuple[Model, jax.sharding.Mesh]:
    config = small_config(mesh__data=data, mesh__seq=seq, mesh__model=model, **changes)
    validate(config, data * seq * model)
    mesh = mesh_of(data, seq, model)
    return build_model(config, mesh), mesh


def with_shapes(params, shapes):
    """Parameters with or without the padding by which a mesh shards them."""
    return jax.tree.map(lambda param, like: resized(param, like.shape), params, shapes)


def make_loss_and_gradient(model: Model, mesh: jax.sharding.Mesh):
    """`make_means_and_gradient` of a task with no means but the loss."""
    means_and_gradient = make_means_and_gradient(model, mesh)

    def loss_and_gradient(params, batch, step):
        stored = with_shapes(params, model.shapes)
        stored = jax.tree.map(lambda p, on_host: to_host(p) if on_host else p, stored, model.on_host)
        means, gradient = means_and_gradient(stored, batch, step)
        natural_shapes = model.only_trained(model.natural_shapes)
        return means["loss"], with_shapes(jax.tree.map(to_device, gradient), natural_shapes)

    return loss_and_gradient


def sampled(values, sample, rest=pytest.mark.grid, quick=()):
    """Parameters of a test; those outside the sample have the marker `grid`, or another, and some inside it `quick`."""
    assert all(value in sample for value in quick)
    return [
        pytest.param(value, marks=[pytest.mark.quick] * (value in quick) if value in sample else rest)
        for value in values
    ]


def run(config, workdir, stop_after=None, devices=None):
    """Trains, and stops after some step as a Ctrl-C would make it; returns the final state."""
    trainer = Trainer(config, workdir, devices)
    for record in trainer.fit():
        if stop_after is not None and record["step"] >= stop_after:
            break
    trainer.save()
    trainer.close()
    return jax.tree.map(np.asarray, trainer.state)


def random_bytes(count: int = 20_000, seed: int = 0) -> np.ndarray:
    """Bytes with something to learn in them: each is near the one before."""
    steps = np.random.default_rng(seed).integers(-3, 4, count)
    return (np.cumsum(steps) % 256).astype(np.uint8)


class Watched:
    """An array of bytes that notes which ranges are read."""

    def __init__(self, data):
        self.data, self.reads = data, []

    def __len__(self):
        return len(self.data)

    def __getitem__(self, part):
        self.reads.append((part.start, part.stop))
        return self.data[part]


def windows_of(
    config: Config, seed: int = 0, data: np.ndarray | None = None, starts_B: np.ndarray | None = None
) -> oracle.Windows:
    """Windows of `data` at `starts_B`, or at random places."""
    data = random_bytes() if data is None else data
    if starts_B is None:
        starts_B = np.random.default_rng(seed).integers(0, len(data) - config.data.seq_len - 1, config.data.batch_size)
    return oracle.Windows(data, starts_B)


def batch_on(
    mesh: jax.sharding.Mesh,
    config: Config,
    seed: int = 0,
    data: np.ndarray | None = None,
    starts_B: np.ndarray | None = None,
) -> Batch:
    """The same windows as the loader reads them."""
    data, starts_B = windows_of(config, seed, data, starts_B)
    windows = windows_at(data, starts_B, config.data.seq_len, separated(data, config.data.separator))
    return read_batch(windows, config.data.seq_len, mesh, layout_on(config, mesh), read=next_tokens)


def placed(mesh: jax.sharding.Mesh, config: Config, like, **natural):
    """A batch like `like` of arrays in natural order and without padding, by their names; padding is -1, or 0."""
    layout = layout_on(config, mesh)
    L = config.data.seq_len
    position_L = layout.positions(layout.padded(L))

    def of(name, shape):
        values = {"positions": position_L, "rows": np.arange(config.data.batch_size, dtype=np.int32)} | natural
        array = np.asarray(values[name], shape.dtype)
        if name != "positions" and array.shape != shape.shape:
            fill = -1 if name == "targets" else 0
            array = np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, len(position_L) - L)], constant_values=fill)
        ordered = array[..., position_L] if name != "positions" and shape.shape[-1:] == position_L.shape else array
        return jax.device_put(ordered, shape.sharding)

    return type(like)(*(shape and of(name, shape) for name, shape in like._asdict().items()))


def relative_error(found, expected) -> float:
    """The largest difference over the largest expected value."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape, (found.shape, expected.shape)
    scale = np.abs(expected).max()
    return float(np.abs(found - expected).max() / scale) if scale else float(np.abs(found).max())


def errors_by_name(found, expected) -> dict[str, float]:
    """The relative error of every leaf, under its name."""
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(expected)]
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return dict(zip(names, (relative_error(a, b) for a, b in pairs), strict=True))


def assert_close(found, expected, bound: float) -> None:
    too_far = {name: error for name, error in errors_by_name(found, expected).items() if not error < bound}
    assert not too_far, f"relative error not under {bound}: {too_far}"


def perturbed_params(model: Model, seed: int = 1):
    """Initial parameters, with every zero and one of them moved, so that no gradient is zero by symmetry."""
    random = np.random.default_rng(seed)
    params = jax.tree.map(np.asarray, model.init(jax.random.key(seed)))
    params = with_shapes(params, model.natural_shapes)
    return jax.tree.map(lambda leaf: leaf + 0.1 * random.standard_normal(leaf.shape, np.float32), params)


def check_against_oracle(
    data: int, seq: int, model: int = 1, bound: float = 1e-5, source=None, learns=lambda name: True, **changes
) -> None:
    """Loss and the gradient of each parameter whose name `learns`; `source` is cut into consecutive windows."""
    family, mesh = model_on(data, seq, model, **changes)
    config, params = family.config, perturbed_params(family)
    starts_B = None if source is None else np.arange(8) * config.data.seq_len
    windows = windows_of(config, data=source, starts_B=starts_B)
    batch = batch_on(mesh, config, data=windows.data, starts_B=windows.starts_B)
    loss, gradient = jax.jit(make_loss_and_gradient(family, mesh))(params, batch, 0)
    expected_loss, expected = oracle.loss_and_gradient(params, windows, config)
    expected = oracle.those(expected, learns)
    assert_close({"loss": loss, "gradient": gradient}, {"loss": expected_loss, "gradient": expected}, bound)
