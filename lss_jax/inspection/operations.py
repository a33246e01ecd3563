"""Floating-point operations of a training step on one device: those of matrix products, which is nearly all.

Outside of blockwise attention they are counted in the traced program, every loop as often as it runs. How many blocks
attention computes depends on the mask, so there the blocks that the kernel would touch are counted.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.sharding import AbstractMesh, Mesh

from lss_jax.attention.kernels.blocks import cut_queries, visits
from lss_jax.attention.kernels.interface import Queries
from lss_jax.attention.kernels.targets import TARGETS
from lss_jax.attention.kernels.tiles import facts, plan_of
from lss_jax.attention.mask import Intervals
from lss_jax.attention.placement import setting_on
from lss_jax.attention.setting import Setting
from lss_jax.attention.strategies import STRATEGIES
from lss_jax.attention.strategy import Strategy
from lss_jax.attention.traffic import Sizes, sizes_of
from lss_jax.models import Model
from lss_jax.models.objective import mask_of
from lss_jax.parallel.mesh import MODEL
from lss_jax.parallel.scopes import ATTENTION

PRODUCTS = {"dense": 2 + 5, "blockwise": 2 + 5, "triton": 2 + 3 + 4, "mosaic": 2 + 3 + 4}  # per score, forward and back


def traced(jaxpr: ClosedJaxpr) -> int:
    """Of a program's matrix products outside of attention."""
    return sum(_products(jaxpr.jaxpr))


def outside_attention(model: Model, mesh: Mesh | AbstractMesh) -> int:
    """Of projections, MLPs and the head: each product forward and two on the way back; remat repeats what it dropped.

    What it repeats is all but the last product of a block, whose result nobody asks for again; and but for the
    attention's output projection where a model group keeps the sum.
    """
    config, sizes, parts = model.config, sizes_of(model.config, mesh), mesh.shape[MODEL]
    E, F, V = config.model.width, config.model.mlp_width // parts, config.model.vocab // parts
    heads, out, mlp = E * sizes.K * (sizes.H + 2 * sizes.G), E * sizes.K * sizes.H, E * F
    layer = 3 * (heads + out + 2 * mlp)
    if config.model.remat == "block":
        layer += heads + mlp + (out if parts == 1 else 0)
    tokens = config.optim.accumulate * sizes.B * sizes.l
    return 2 * tokens * (config.model.layers * layer + 3 * E * V)


def attention(model: Model, mesh: Mesh) -> int:
    """Of all layers' attention, on the busiest device. Packed documents, which are not known here, count as one."""
    config, strategy = model.config, STRATEGIES[model.config.attention.strategy]
    sizes, setting = strategy.in_kernel(sizes_of(config, mesh), setting_on(config, mesh))
    of_devices = setting.layout.positions(sizes.l * setting.layout.devices).reshape(-1, sizes.l)
    scores = max(
        _scores(mask_of(config, jnp.asarray(positions_l), None), sizes, setting, strategy) for positions_l in of_devices
    )
    return config.model.layers * config.optim.accumulate * scores * 2 * sizes.K * PRODUCTS[setting.kernel]


def _scores(mask: Intervals, sizes: Sizes, setting: Setting, strategy: Strategy) -> int:
    """How many one device computes in a layer."""
    B, l, H, G, K, itemsize = (getattr(sizes, name) for name in ("B", "l", "H", "G", "K", "itemsize"))
    layout = setting.layout
    if setting.kernel == "dense":
        return B * H * l * l * layout.devices
    if setting.kernel in TARGETS:
        dtype = jnp.bfloat16 if itemsize == 2 else jnp.float32
        q_BlHK: Any = jax.ShapeDtypeStruct((B, l, H, K), dtype)
        kv_N2BGlK = jax.ShapeDtypeStruct((layout.devices, 2, B, G, l, K), dtype)
        queries = Queries(q_BlHK, mask, None)  # of which the shape and the dtype are enough
        plan = plan_of(queries, kv_N2BGlK, setting, TARGETS[setting.kernel])
        tables, _ = facts(plan, queries)
        return int((tables.stop_Bj - tables.first_Bj).sum()) * H * plan.queries.size * plan.key_size
    keys = strategy.key_blocks(l, setting)
    cut = cut_queries((B, l, H, G), layout, (setting.block_queries, setting.block_keys), keys.size)
    return visits(keys, cut, mask.start, mask.end) * cut.block_heads * (H // G) * cut.size * keys.size


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
