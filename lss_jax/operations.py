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

from lss_jax.attention.blocks import chunks_of_all, cut_queries, key_blocks, visits
from lss_jax.attention.blockwise import blocks_of_keys
from lss_jax.attention.mask import Intervals
from lss_jax.attention.setting import Setting, Sizes, setting_on, sizes_of
from lss_jax.attention.targets import TARGETS
from lss_jax.attention.tiles import facts, plan_of
from lss_jax.hlo import ATTENTION
from lss_jax.mesh import MODEL
from lss_jax.models import Model
from lss_jax.step import mask_of

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
    return 2 * tokens * (config.model.layers * layer + 3 * E * V) + _orthogonalizing(model)


def _orthogonalizing(model: Model) -> int:
    """Of Muon's update: five iterations of three products for every matrix of layers and heads, on every device."""
    config = model.config.model
    if model.config.optim.name != "muon":
        return 0
    E, F, K = config.width, config.mlp_width, config.width // config.heads
    counts = {(E, K): 2 * (config.heads + config.kv_heads), (E, F): 2}
    iteration = sum(n * 2 * min(shape) ** 2 * (2 * max(shape) + min(shape)) for shape, n in counts.items())
    return config.layers * 5 * iteration


def attention(model: Model, mesh: Mesh) -> int:
    """Of all layers' attention, on the busiest device. Packed documents, which are not known here, count as one."""
    config, sizes, setting = model.config, sizes_of(model.config, mesh), setting_on(model.config, mesh)
    if config.attention.strategy == "ulysses":
        N = setting.layout.devices
        sizes = Sizes(sizes.B, sizes.l * N, sizes.H // N, max(sizes.G // N, 1), sizes.K, sizes.itemsize)
        setting = setting.uncut
    of_devices = setting.layout.positions(sizes.l * setting.layout.devices).reshape(-1, sizes.l)
    scores = max(
        _scores(mask_of(config, jnp.asarray(positions_l), None), sizes, setting, config.attention.strategy == "ring")
        for positions_l in of_devices
    )
    return config.model.layers * config.optim.accumulate * scores * 2 * sizes.K * PRODUCTS[setting.kernel]


def _scores(mask: Intervals, sizes: Sizes, setting: Setting, rings: bool) -> int:
    """How many one device computes in a layer."""
    B, l, H, G, K, itemsize = (getattr(sizes, name) for name in ("B", "l", "H", "G", "K", "itemsize"))
    layout = setting.layout
    if setting.kernel == "dense":
        return B * H * l * l * layout.devices
    if setting.kernel in TARGETS:
        dtype = jnp.bfloat16 if itemsize == 2 else jnp.float32
        q_BlHK = jax.ShapeDtypeStruct((B, l, H, K), dtype)
        kv_N2BGlK = jax.ShapeDtypeStruct((layout.devices, 2, B, G, l, K), dtype)
        plan = plan_of(q_BlHK, kv_N2BGlK, None, setting, TARGETS[setting.kernel])
        tables, _ = facts(plan, mask, None)
        return int((tables.stop_Bj - tables.first_Bj).sum()) * H * plan.queries.size * plan.key_size
    keys = key_blocks(chunks_of_all(layout, l), setting.block_keys) if rings else blocks_of_keys(l, setting)
    cut = cut_queries((B, l, H, K), G, setting.layout, setting.block_queries, setting.block_keys, keys.size)
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
