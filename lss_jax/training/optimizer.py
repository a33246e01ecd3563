"""AdamW with warm-up, cosine decay and global-norm clipping, on global arrays, outside `shard_map`."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from lss_jax.config.schema import OptimConfig

FINAL_FRACTION = 0.1  # of the peak learning rate, where the cosine ends (Hoffmann et al. 2022, arXiv 2203.15556)
NOT_DECAYED = ("bias", "scale")  # norms and biases


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
    """Clip by global norm, then AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) with decay on matrices alone.

    `update` takes the gradient's global `norm` as a keyword, if it is known already.
    """
    return optax.chain(
        clip_by_norm(config.clip_norm),
        optax.adamw(
            make_schedule(config),
            b1=config.beta1,
            b2=config.beta2,
            weight_decay=config.weight_decay,
            mask=decayed,
        ),
    )


def clip_by_norm(largest: float) -> optax.GradientTransformationExtraArgs:
    """Like `optax.clip_by_global_norm`, but takes a known `norm`, whose sums over devices are then not repeated."""

    def update(gradient: Any, state: Any, params: Any = None, *, norm: Any = None, **_: Any) -> tuple[Any, Any]:
        norm = optax.tree.norm(gradient) if norm is None else norm
        return jax.tree.map(lambda leaf: jnp.where(norm < largest, leaf, leaf / norm * largest), gradient), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def decayed(params: Any) -> Any:
    """A mask of the parameters that decay: all but norms and biases, by name, since stacked biases have two axes."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in NOT_DECAYED, params)
