"""AdamW, Lion or Muon with warm-up, cosine decay and global-norm clipping, on global arrays, outside `shard_map`."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers as Axes

from lss_jax.config.schema import OptimConfig

FINAL_FRACTION = 0.1  # of the peak learning rate, where the cosine ends (Hoffmann et al. 2022, arXiv 2203.15556)
NOT_DECAYED = ("bias", "scale")  # norms and biases
UPDATE_RMS = 0.2  # of Muon's updates before the learning rate, as AdamW's are (Liu et al. 2025)
BY_HEADS = ("query", "key", "value")  # kernels [layers, E, H, K], whose matrices are E x K; of others the last two axes


def make_schedule(config: OptimConfig) -> optax.Schedule:
    """Learning rate by step: linear from 0 over `warmup_steps`, then a cosine down to a tenth at `steps`."""
    if config.warmup_steps == config.steps:
        return optax.linear_schedule(0.0, config.learning_rate, config.steps)
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=config.steps,
        end_value=config.learning_rate * FINAL_FRACTION,
    )


def make_optimizer(config: OptimConfig) -> optax.GradientTransformationExtraArgs:
    """Clips by global norm, then the config's optimizer; `update` takes the gradient's `norm`, if known."""
    optimizer = OPTIMIZERS[config.name](config)
    if config.moments_dtype != "float32":
        optimizer = with_moments_in(config.moments_dtype, optimizer)
    return optax.chain(clip_by_norm(config.clip_norm), optimizer)


def _adamw(config: OptimConfig) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) with decay on matrices alone."""
    return optax.adamw(
        make_schedule(config),
        b1=config.beta1,
        b2=config.beta2,
        weight_decay=config.weight_decay,
        mask=decayed,
    )


def _muon(config: OptimConfig) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) with decay for the kernels of layers, Adam without decay for everything else.

    The updates have the size of AdamW's (Liu et al. 2025, arXiv 2502.16982, Sec. 2.2): one learning rate serves both.
    """
    return optax.contrib.muon(
        make_schedule(config),
        beta=config.beta1,
        weight_decay=config.weight_decay,
        adam_b1=config.beta1,
        adam_b2=config.beta2,
        muon_weight_dimension_numbers=matrices,
        consistent_rms=UPDATE_RMS,
    )


def _lion(config: OptimConfig) -> optax.GradientTransformation:
    """Lion (Chen et al. 2023, arXiv 2302.06675) with decay on matrices alone; it has one moment."""
    return optax.lion(
        make_schedule(config), b1=config.beta1, b2=config.beta2, weight_decay=config.weight_decay, mask=decayed
    )


OPTIMIZERS = {"adamw": _adamw, "lion": _lion, "muon": _muon}


def with_moments_in(dtype: str, optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer with its moments kept in `dtype`; it computes in float32."""

    def cast(state: Any, dtype: str) -> Any:
        def of_leaf(leaf: jax.Array) -> jax.Array:
            return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

        return jax.tree.map(of_leaf, state)

    def init(params: Any) -> Any:
        return cast(optimizer.init(params), dtype)

    def update(gradient: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = optimizer.update(gradient, cast(state, "float32"), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(init, update)


def clip_by_norm(largest: float) -> optax.GradientTransformationExtraArgs:
    """Like `optax.clip_by_global_norm`, but takes a known `norm`, whose sums over devices are then not repeated."""

    def update(gradient: Any, state: Any, params: Any = None, *, norm: Any = None, **_: Any) -> tuple[Any, Any]:
        norm = optax.tree.norm(gradient) if norm is None else norm
        return jax.tree.map(lambda leaf: jnp.where(norm < largest, leaf, leaf / norm * largest), gradient), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def decayed(params: Any) -> Any:
    """A mask of the parameters that decay: all but norms and biases, by name, since stacked biases have two axes."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in NOT_DECAYED, params)


def matrices(params: Any) -> Any:
    """The axes of the matrices in each parameter that Muon updates, the kernels of layers; None where Adam does."""

    def axes(path: tuple, _leaf: Any) -> Axes | None:
        if path[-1].key != "kernel":
            return None
        return Axes(-3 if path[-2].key in BY_HEADS else -2, -1)

    return jax.tree_util.tree_map_with_path(axes, params)
