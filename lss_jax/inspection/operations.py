"""Floating-point operations of a training step, per device: those of matrix products, which are nearly all.

Outside attention they are counted in the traced program, every loop as often as it runs. How many blocks attention
computes depends on the mask, so for attention the blocks that the kernel would visit are counted.
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.interpreters.partial_eval import dce_jaxpr
from jax.sharding import AbstractMesh, Mesh
from optax.contrib import MuonDimensionNumbers

from lss_jax.attention.kernels.blocks import scores
from lss_jax.attention.kernels.interface import FORWARD, PRODUCTS, Queries
from lss_jax.attention.kernels.targets import TARGETS
from lss_jax.attention.kernels.tiles import facts, tiling_of
from lss_jax.attention.mask import Intervals
from lss_jax.attention.placement import setting_on
from lss_jax.attention.setting import Setting
from lss_jax.attention.strategies import STRATEGIES
from lss_jax.attention.strategy import Strategy
from lss_jax.attention.traffic import Sizes, sizes_of
from lss_jax.models import Model, costs_of
from lss_jax.models.family import AttentionLayers
from lss_jax.models.stack import repeats
from lss_jax.parallel.scopes import ATTENTION
from lss_jax.tasks import make_task
from lss_jax.training.optimizer import matrices


def traced(jaxpr: ClosedJaxpr) -> int:
    """Counts the operations of a program's matrix products outside attention, per device.

    Results that nobody uses are left out, as the compiler leaves them out.
    """
    used, _ = dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars))
    return sum(_products(used))


def outside_attention(model: Model, mesh: Mesh | AbstractMesh) -> int:
    """Predicts the operations of the family's products and of the optimizer, per device."""
    return costs_of(model).products(model.config, mesh, model.trained) + _orthogonalizing(model)


def _orthogonalizing(model: Model) -> int:
    """Operations of Muon's update: five iterations of three products per matrix, on every device."""
    if model.config.optim.name != "muon":
        return 0
    trained, total = model.only_trained(model.natural_shapes), 0
    for leaf, axes in zip(jax.tree.leaves(trained), _axes_of_matrices(trained), strict=True):
        if axes:
            short, long = sorted((leaf.shape[axes.reduction_axis], leaf.shape[axes.output_axis]))
            total += leaf.size // (short * long) * 2 * short**2 * (2 * long + short)
    return 5 * total


def _axes_of_matrices(params: Any) -> list[Any]:
    return jax.tree.leaves(
        matrices(params), is_leaf=lambda axes: axes is None or isinstance(axes, MuonDimensionNumbers)
    )


def attention(model: Model, mesh: Mesh) -> int:
    """Predicts the operations of all layers' attention on the busiest device; packed documents count as one."""
    kinds = costs_of(model).attentions(model.config, mesh, model.trained)
    return int(np.max(sum(map(_of_devices, kinds))))


def _of_devices(kind: AttentionLayers) -> np.ndarray:
    """The operations of all layers of one kind of attention: of each device, or one number for all of them."""
    config, mesh, between, _, reached = kind
    task, strategy = make_task(config), STRATEGIES[config.attention.strategy]
    sizes, setting = sizes_of(config, mesh, between), setting_on(config, mesh, between, task.mask_kind)
    layers = config.model.layers * config.optim.accumulate
    if strategy.operations:
        forward, training = strategy.operations(task.mask, sizes, setting)
        return layers * np.array([training + forward * repeats(config.model) if reached else forward])
    assert strategy.in_kernel, "a strategy declares its kernel's sizes or its operations"
    sizes, setting, masks = strategy.in_kernel(partial(task.mask_between, between), sizes, setting)
    scores_N = np.array([_scores(mask, sizes, setting, strategy) for mask in masks])
    products = PRODUCTS[setting.kernel] + FORWARD * repeats(config.model) if reached else FORWARD
    return layers * scores_N * 2 * sizes.K * products


def _scores(mask: Intervals, sizes: Sizes, setting: Setting, strategy: Strategy) -> int:
    """The number of scores that one device computes per layer."""
    B, l, s, H, G, K, itemsize = (getattr(sizes, name) for name in ("B", "l", "s", "H", "G", "K", "itemsize"))
    if setting.kernel == "dense":
        return B * H * l * s * setting.key_layout.devices
    if setting.kernel in TARGETS:
        dtype = jnp.bfloat16 if itemsize == 2 else jnp.float32
        q_BlHK: Any = jax.ShapeDtypeStruct((B, l, H, K), dtype)
        kv_N2BGlK = jax.ShapeDtypeStruct((setting.key_layout.devices, 2, B, G, s, K), dtype)
        queries = Queries(q_BlHK, mask, None, None)  # of which the shape and the dtype are enough
        tiling = tiling_of(queries, kv_N2BGlK, setting, TARGETS[setting.kernel])
        tables, _, _ = facts(tiling, queries)
        return int((tables.stop_B - tables.first_B).sum()) * H * tiling.queries.size * tiling.key_size
    assert strategy.key_blocks
    keys = strategy.key_blocks(s, setting)
    return scores(keys, (B, l, H, G), setting, mask)


def _products(jaxpr: Jaxpr) -> Iterator[int]:
    for equation in jaxpr.eqns:
        if ATTENTION in str(equation.source_info.name_stack):
            continue
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            operand: Any = equation.invars[0].aval
            result: Any = equation.outvars[0].aval
            yield 2 * math.prod(operand.shape[axis] for axis in contracted) * math.prod(result.shape)
        else:
            times = equation.params["length"] if equation.primitive.name == "scan" else 1
            yield from (times * sum(_products(inner)) for inner in _inner(equation.params))


def _inner(params: dict[str, Any]) -> Iterator[Jaxpr]:
    for value in params.values():
        for leaf in value if isinstance(value, list | tuple) else (value,):
            if isinstance(leaf, ClosedJaxpr):
                yield leaf.jaxpr
            elif isinstance(leaf, Jaxpr):
                yield leaf
