"""The contract with the compiler: which collectives a training step should have, how many, how large, over which axes.

Here are the formulas of what every step has; strategy, family and task predict their own collectives.
`python -m lss_jax.audit` and the tests compare these predictions with compiled programs.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from lss_jax.attention.placement import setting_on
from lss_jax.attention.strategies import STRATEGIES
from lss_jax.attention.traffic import sizes_of
from lss_jax.config.schema import Config
from lss_jax.inspection.hlo import Collective
from lss_jax.models import Model, costs_of
from lss_jax.models.stack import repeats
from lss_jax.parallel.layout import layout_on
from lss_jax.parallel.mesh import DATA, MODEL, SEQ, has_host_memory, named_axes, sharded_axes
from lss_jax.parallel.scopes import ATTENTION, ELSEWHERE, GRADIENTS, LOSS, MASK, OPTIMIZER, POOLING, POSITIONS, WEIGHTS
from lss_jax.tasks import make_task
from lss_jax.training.state import moment_specs, param_specs

SCALARS = 64  # elements: sums of norms have fewer; compilers combine them freely, and lose their place

# `double_sum` leaves it to the compiler to combine a gradient's vectors into one sum. Above LARGE elements it may leave
# up to VECTORS sums: libtpu combines 19 million elements, and not 152 million.
LARGE, VECTORS = 2**26, 3


class Line(NamedTuple):
    """The key by which collectives are added up: a part of the step, a kind, and mesh axes."""

    place: str  # one of `parallel.scopes`, of attention and regions with the pass: `attention backward`
    kind: str
    axes: tuple[str, ...]


class Total(NamedTuple):
    """The collectives of a line in one step, added up: their number, and the sizes of their results per device."""

    times: int
    elements: int
    bytes: int
    asynchronous: int  # how many of them may overlap with other work

    def __add__(self, other: tuple) -> "Total":
        return Total(*(a + b for a, b in zip(self, other, strict=True)))


Contract = dict[Line, Total]


def found(collectives: Iterable[Collective], mesh: Mesh | AbstractMesh) -> Contract:
    """Adds up the collectives of a compiled program by line."""
    total: Contract = defaultdict(lambda: Total(0, 0, 0, 0))
    for one in collectives:
        norms = one.kind == "all-reduce" and one.elements < SCALARS and one.place in (OPTIMIZER, ELSEWHERE)
        place, kind = (OPTIMIZER, "scalars") if norms else (one.place, one.kind)
        line = Line(place, kind, one.axes(dict(mesh.shape)))
        times = one.times
        total[line] += (times, times * one.elements, times * one.bytes, times * one.asynchronous)
    return _scalars_together(total, mesh)


def predicted(model: Model, mesh: Mesh | AbstractMesh) -> Contract:
    """Predicts the collectives of this model's training step on this mesh, by line."""
    parts = (
        _attention,
        _exchanges,
        _weights,
        _regions,
        _pooling,
        _positions,
        _masks,
        _gradients,
        _norms,
        _sharded_state,
    )
    total: Contract = defaultdict(lambda: Total(0, 0, 0, 0))
    for part in parts:
        for line, times, elements, itemsize in part(model, mesh):
            total[line] += (times, times * elements, times * elements * itemsize, 0)
    return _scalars_together({line: one for line, one in total.items() if one.times}, mesh)


def _scalars_together(contract: Contract, mesh: Mesh | AbstractMesh) -> Contract:
    """The contract with one line for all scalars: compilers choose in which steps each is summed."""
    scalars = {line: one for line, one in contract.items() if line.kind == "scalars"}
    if not scalars:
        return dict(contract)
    axes = _sharding_axes(mesh, *{axis for line in scalars for axis in line.axes})
    together = Total(*map(sum, zip(*scalars.values(), strict=True)))
    others = {line: one for line, one in contract.items() if line not in scalars}
    return {**others, Line(OPTIMIZER, "scalars", axes): together}


def disagreements(compiled: Contract, expected: Contract) -> list[str]:
    """The differences between a program and its prediction, a sentence per line of the contract.

    Elements are compared, not bytes: compilers change the dtype that is sent (on CPU bfloat16 is sent as float32; on
    TPU a sum has the dtype to which its reader rounds it). Of scalars only place and axes are compared. Large sums of
    gradients may be split (`LARGE`), those of several weights or of the last tiles of the loss combined.
    """
    differences = []
    for line in sorted(_differing(compiled, expected)):
        one, other = compiled.get(line), expected.get(line)
        label = f"{line.place}: {line.kind} over {' and '.join(line.axes) or 'nothing'}"
        if one is None or other is None:
            number = (one or other or Total(0, 0, 0, 0)).times
            differences.append(f"{label}: {number} in the {'program' if one else 'prediction'} alone")
        else:
            differences.append(
                f"{label}: {one.times} with {one.elements:,} elements in the program, "
                f"{other.times} with {other.elements:,} predicted"
            )
    return differences


def _differing(compiled: Contract, expected: Contract) -> set[Line]:
    """The lines that do not agree, but for those of one kind over the same axes that agree together.

    A compiler that combines collectives, or splits a fusion, may lose the place of some, and combine scalars with them.
    """
    found = {line for line in compiled.keys() | expected.keys() if not _agree(line, compiled, expected)}

    def misplaced(line: Line) -> bool:
        alike = [other for other in found if (other.kind, other.axes) == (line.kind, line.axes)]
        one, other = (sum(totals[x].elements for x in alike if x in totals) for totals in (compiled, expected))
        return len(alike) > 1 and abs(one - other) < SCALARS

    return {line for line in found if not misplaced(line)}


def _agree(line: Line, compiled: Contract, expected: Contract) -> bool:
    """Whether the compiled and the predicted total of a line agree."""
    one, other = compiled.get(line), expected.get(line)
    if one is None or other is None:
        return False
    apart = line.place == GRADIENTS and one.elements > LARGE and one.times <= VECTORS
    combined = line.place.startswith((WEIGHTS, LOSS)) and one.times <= other.times
    return line.kind == "scalars" or (
        one.elements == other.elements and (one.times == other.times or apart or combined)
    )


Part = Iterator[tuple[Line, int, int, int]]  # times, elements and itemsize of each


def _attention(model: Model, mesh: Mesh | AbstractMesh) -> Part:
    """Attention's collectives, per layer and microbatch, as its strategy predicts them."""
    for config, over in costs_of(model).attended(model.config, mesh):
        yield from _attention_of(config, over, _reaches_layers(model))


def _attention_of(config: Config, mesh: Mesh | AbstractMesh, reached: bool) -> Part:
    axes = _sharding_axes(mesh, SEQ)
    if not axes:
        return
    groups, sizes = config.attention.head_groups, sizes_of(config, mesh)
    setting = setting_on(config, mesh, seen=make_task(config).mask_kind)
    sizes = dataclasses.replace(sizes, H=sizes.H // groups, G=sizes.G // groups)
    traffic = STRATEGIES[config.attention.strategy].traffic(sizes, setting)
    backward = [*traffic["forward"] * repeats(config.model), *traffic["backward"]] if reached else []
    for direction, collectives in (("forward", traffic["forward"]), ("backward", backward)):
        for one in collectives:
            times = one.times * groups * config.model.layers * config.optim.accumulate
            yield Line(f"{ATTENTION} {direction}", one.kind, axes), times, one.elements, one.itemsize


def _exchanges(model: Model, mesh: Mesh | AbstractMesh) -> Part:
    """What the family says of other collectives over `seq`."""
    axes = _sharding_axes(mesh, SEQ)
    if axes:
        for place, one in costs_of(model).exchanges(model.config, mesh):
            yield Line(place, one.kind, axes), one.times, one.elements, one.itemsize


def _weights(model: Model, mesh: Mesh | AbstractMesh) -> Part:
    """Weights that are sharded at rest: a gather over each axis wherever one is used, and a scatter of its gradient.

    A frozen weight has no gradient.

    Per microbatch, those of a layer are gathered in the forward pass and once or more in the backward pass, those of
    the embedding and the head once; compilers for CPUs take these out of the loop over microbatches.
    """
    config, trees = model.config, (model.shapes, model.specs, model.gathers, model.trained)
    for leaf, spec, gathers, trained in zip(*map(jax.tree.leaves, trees), strict=True):
        axes = [axis for axis in (SEQ, DATA) if gathers.times and axis in _sharding_axes(mesh, *named_axes(spec))]
        times = gathers.times * config.optim.accumulate
        once = times if gathers.of_layers or has_host_memory(mesh) else gathers.times
        again = times * max(1, repeats(config.model)) if gathers.of_layers and _reaches_layers(model) else 0
        whole = leaf.size // (gathers.times if gathers.of_layers else 1)
        whole //= mesh.shape[MODEL] if MODEL in named_axes(spec) else 1
        itemsize = sizes_of(config, mesh).itemsize
        for axis in axes:
            result = whole if axis == SEQ or SEQ not in axes else whole // mesh.shape[SEQ]
            yield Line(f"{WEIGHTS} forward", "all-gather", (axis,)), once, result, itemsize
            yield Line(f"{WEIGHTS} backward", "all-gather", (axis,)), again, result, itemsize
            scatters = times if trained else 0
            yield Line(f"{WEIGHTS} backward", "reduce-scatter", (axis,)), scatters, result // mesh.shape[axis], 4


def _regions(model: Model, mesh: Mesh | AbstractMesh) -> Part:
    """What the family and the task say of the collectives over `model`."""
    axes, costs = _sharding_axes(mesh, MODEL), costs_of(model)
    if axes:
        for place, one in (*costs.traffic(model.config, mesh, model.trained), *make_task(model.config).traffic(mesh)):
            yield Line(place, one.kind, axes), one.times, one.elements, one.itemsize


def _pooling(model: Model, mesh: Mesh | AbstractMesh) -> Part:
    """The mean over a sharded sequence: a sum of features and of their number, and one of the mean's gradient."""
    config, rows = model.config, sizes_of(model.config, mesh).B
    if config.model.pooling == "none":
        return
    for axis in _sharding_axes(mesh, SEQ, MODEL):
        for elements in (rows * (config.model.width + 1), rows * config.model.width):
            yield Line(POOLING, "all-reduce", (axis,)), config.optim.accumulate, elements, 4


def _positions(model: Model, mesh: Mesh | AbstractMesh) -> Part:
    """Tables with a row per position: under zigzag rows are sent to the devices of their tokens, and gradients back.

    A table whose length the mesh does not divide is replicated in the state, so its gradient is gathered.
    """
    config, axes, sizes = model.config, _sharding_axes(mesh, SEQ, MODEL), sizes_of(model.config, mesh)
    trees = (model.shapes, model.row_per_position, model.trained)
    for leaf, is_table, trained in zip(*map(jax.tree.leaves, trees), strict=True):
        if not is_table or not axes:
            continue
        elements = sizes.l * math.prod(leaf.shape[1:])
        sends = (1 + trained) * layout_on(config, mesh).sends  # there and, if there is a gradient, back
        yield Line(POSITIONS, "collective-permute", axes), sends, elements // mesh.shape[MODEL] // 2, 4
        if _padded(config, mesh) and trained:
            yield Line(POSITIONS, "all-gather", axes), 1, elements * mesh.shape[SEQ], 4


def _masks(model: Model, mesh: Mesh | AbstractMesh) -> Part:
    """Some strategies gather the intervals of all queries: per step, or per microbatch where rows have their own."""
    task = make_task(model.config)
    batch = task.batch_like(mesh)
    of_rows = jax.eval_shape(task.mask, batch.positions, batch).start.ndim == 2
    for config, over in costs_of(model).attended(model.config, mesh):
        axes, sizes = _sharding_axes(over, SEQ), sizes_of(config, over)
        if STRATEGIES[config.attention.strategy].whole_mask and axes:
            rows, times = (sizes.B, config.optim.accumulate) if of_rows else (1, 1)
            yield Line(MASK, "all-gather", axes), times, over.shape[SEQ] * 2 * rows * sizes.l, 4


def _gradients(model: Model, mesh: Mesh | AbstractMesh) -> Part:
    """The gradient law: one sum over each axis, of all that is trained and not sharded over it, and of the loss."""
    padded = layout_on(model.config, mesh).padded
    padded_shapes = model.with_tables(
        lambda leaf: jax.ShapeDtypeStruct((padded(leaf.shape[0]), *leaf.shape[1:]), leaf.dtype), model.shapes
    )
    for axis in sharded_axes(mesh):
        elements = make_task(model.config).sums_size  # they ride along
        trees = map(model.only_trained, (padded_shapes, model.specs))
        for leaf, spec in zip(*map(jax.tree.leaves, trees), strict=True):
            if axis not in named_axes(spec):
                elements += leaf.size // _shards(spec, mesh)
        yield Line(GRADIENTS, "all-reduce", (axis,)), 1, elements, 4


def _norms(model: Model, mesh: Mesh | AbstractMesh) -> Part:
    """The gradient's global norm: sums of squares of sharded gradients, over the axes of their sharding."""
    specs = jax.tree.leaves(model.only_trained(param_specs(model, mesh)))
    for axes in {_sharding_axes(mesh, *named_axes(spec)) for spec in specs} - {()}:
        yield Line(OPTIMIZER, "scalars", axes), 1, 1, 4


def _sharded_state(model: Model, mesh: Mesh | AbstractMesh) -> Part:
    """ZeRO-1: a gather of each parameter whose moments are sharded further than the parameter."""
    trees = map(model.only_trained, (model.shapes, param_specs(model, mesh), moment_specs(model, mesh)))
    for leaf, before, after in zip(*map(jax.tree.leaves, trees), strict=True):
        axes = _sharding_axes(mesh, *(named_axes(after) - named_axes(before)))
        if axes:
            yield Line(OPTIMIZER, "all-gather", axes), 1, leaf.size // _shards(before, mesh), 4


def _reaches_layers(model: Model) -> bool:
    """Whether the backward pass goes through the layers."""
    return costs_of(model).reaches_layers(model.trained)


def _shards(spec: PartitionSpec, mesh: Mesh | AbstractMesh) -> int:
    """The number of shards into which a spec divides an array."""
    return math.prod(mesh.shape[axis] for axis in named_axes(spec))


def _padded(config: Config, mesh: Mesh | AbstractMesh) -> bool:
    return layout_on(config, mesh).padded(config.data.seq_len) != config.data.seq_len


def _sharding_axes(mesh: Mesh | AbstractMesh, *axes: str) -> tuple[str, ...]:
    """The given axes without those of size 1, in the mesh's order."""
    return tuple(axis for axis in sharded_axes(mesh) if axis in axes)


# Bytes that a device of a group of n sends per byte of the result, by ring algorithms (Thakur et al. 2005, Sec. 4).
SENT = {
    "all-gather": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,
    "collective-permute": lambda n: 1,
    "scalars": lambda n: 2 * (n - 1) / n,
}


def sent(collectives: Contract, mesh: Mesh | AbstractMesh) -> float:
    """Bytes per device sent for these collectives, by ring algorithms."""
    return sum(
        SENT[line.kind](math.prod(mesh.shape[axis] for axis in line.axes)) * total.bytes
        for line, total in collectives.items()
    )
