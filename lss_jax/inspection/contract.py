"""The contract with the compiler: which collectives a training step should take, how many, how large, over which axes.

Each part of a step has its formula here, but for a layer's attention, which each strategy predicts beside its own
collectives. `python -m lss_jax.audit` and the tests compare with what a compiled program has.
"""

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
from lss_jax.models import Model
from lss_jax.parallel.layout import layout_on
from lss_jax.parallel.mesh import MODEL, SEQ, cut_axes, named_axes
from lss_jax.parallel.scopes import ATTENTION, ELSEWHERE, GRADIENTS, LOSS, MASK, OPTIMIZER, POSITIONS, REGIONS
from lss_jax.training.state import kept_specs, moment_specs

SCALARS = 64  # norms of parameters are no more; compilers combine them as they see fit, and forget where they belong


LARGE, VECTORS = 2**26, 3  # elements; of gradients, which `double_sum` leaves to the compiler to put into one sum


class Line(NamedTuple):
    """What the collectives of a program have in common that are told together."""

    place: str
    kind: str
    axes: tuple[str, ...]


class Total(NamedTuple):
    """Of all the collectives of a line in one step: their number, and the sizes of their results on one device."""

    times: int
    elements: int
    bytes: int
    asynchronous: int  # how many of them other work may run beside

    def __add__(self, other: tuple) -> "Total":
        return Total(*(a + b for a, b in zip(self, other, strict=True)))


Contract = dict[Line, Total]


def found(collectives: Iterable[Collective], mesh: Mesh | AbstractMesh) -> Contract:
    """Of a compiled program."""
    total: Contract = defaultdict(lambda: Total(0, 0, 0, 0))
    for one in collectives:
        norms = one.kind == "all-reduce" and one.elements < SCALARS and one.place in (OPTIMIZER, ELSEWHERE)
        place, kind = (OPTIMIZER, "scalars") if norms else (one.place, one.kind)
        line = Line(place, kind, one.axes(dict(mesh.shape)))
        times = one.times
        total[line] += (times, times * one.elements, times * one.bytes, times * one.asynchronous)
    return dict(total)


def predicted(model: Model, mesh: Mesh | AbstractMesh) -> Contract:
    """Of the training step of this model on this mesh."""
    parts = (_attention, _regions, _vocabulary, _positions, _masks, _gradients, _norms, _sharded_state)
    total: Contract = defaultdict(lambda: Total(0, 0, 0, 0))
    for part in parts:
        for line, times, elements, itemsize in part(model, mesh):
            total[line] += (times, times * elements, times * elements * itemsize, 0)
    return {line: of_line for line, of_line in total.items() if of_line.times}


def disagreements(compiled: Contract, expected: Contract) -> list[str]:
    """Where a program and its prediction differ, in words.

    Numbers of elements are compared, not of bytes: compilers change the dtype in which they travel (on CPU bfloat16 is
    carried as float32, on TPU sums are handed out as their reader rounds them). Of scalars only the place counts. The
    vectors of gradients that take the same sum may stay apart where they are large: libtpu combines 19 million
    elements, and not 152 million.
    """
    differences = []
    for line in sorted(compiled.keys() | expected.keys()):
        one, other = compiled.get(line), expected.get(line)
        said = f"{line.place}: {line.kind} over {' and '.join(line.axes) or 'nothing'}"
        if one is None or other is None:
            number = (one or other or Total(0, 0, 0, 0)).times
            differences.append(f"{said}: {number} in the {'program' if one else 'prediction'} alone")
        elif not _agree(line, one, other):
            differences.append(
                f"{said}: {one.times} with {one.elements:,} elements in the program, "
                f"{other.times} with {other.elements:,} predicted"
            )
    return differences


def _agree(line: Line, one: Total, other: Total) -> bool:
    """Of a line, what was compiled and what was predicted."""
    apart = line.place == GRADIENTS and one.elements > LARGE and one.times <= VECTORS
    return line.kind == "scalars" or (one.elements == other.elements and (one.times == other.times or apart))


Part = Iterator[tuple[Line, int, int, int]]  # times, elements and itemsize of each


def _attention(model: Model, mesh: Mesh | AbstractMesh) -> Part:
    """Per layer and microbatch what the strategy says."""
    config, axes = model.config, _cut(mesh, SEQ)
    if not axes:
        return
    traffic = STRATEGIES[config.attention.strategy].traffic(sizes_of(config, mesh), setting_on(config, mesh))
    for way, collectives in traffic.items():
        for one in collectives:
            times = one.times * config.model.layers * config.optim.accumulate
            yield Line(f"{ATTENTION} {way}", one.kind, axes), times, one.elements, one.itemsize


def _regions(model: Model, mesh: Mesh | AbstractMesh) -> Part:
    """Per layer and microbatch a gather and a scatter for each of attention and MLP, forward and backward.

    With remat they gather once more on the way back. A vocabulary in shares has its rows scattered and the head's
    input gathered, once per microbatch.
    """
    config, axes = model.config, _cut(mesh, MODEL)
    if not axes:
        return
    sizes, layers = sizes_of(config, mesh), config.model.layers
    segment, part = _segment(config, mesh), _segment(config, mesh) // mesh.shape[MODEL]
    again = 2 * (config.model.remat == "block")
    ends = int(config.model.vocab_parallel)
    for way, kind, times, elements in (
        ("forward", "all-gather", 2 * layers + ends, segment),
        ("forward", "reduce-scatter", 2 * layers + ends, part),
        ("backward", "all-gather", (2 + again) * layers + ends, segment),
        ("backward", "reduce-scatter", 2 * layers + ends, part),
    ):
        yield Line(f"{REGIONS} {way}", kind, axes), times * config.optim.accumulate, elements, sizes.itemsize


def _vocabulary(model: Model, mesh: Mesh | AbstractMesh) -> Part:
    """Where each device has a share of it: two numbers and a maximum per token, and the gradient of the two."""
    config, axes, sizes = model.config, _cut(mesh, MODEL), sizes_of(model.config, mesh)
    if axes and config.model.vocab_parallel:
        tokens, times = sizes.B * sizes.l, config.optim.accumulate
        yield Line(LOSS, "all-reduce", axes), times, tokens, 4
        yield Line(LOSS, "reduce-scatter", axes), times, 2 * tokens // mesh.shape[MODEL], 4
        yield Line(LOSS, "all-gather", axes), times, 2 * tokens, 4


def _positions(model: Model, mesh: Mesh | AbstractMesh) -> Part:
    """Under zigzag the rows of a learned table go to where their tokens are, and their gradient back.

    A table of a length that the mesh does not divide is whole between steps, and so its gradient is gathered.
    """
    config, axes, sizes = model.config, _cut(mesh, SEQ, MODEL), sizes_of(model.config, mesh)
    if config.model.positions != "learned" or not axes:
        return
    rows = sizes.l * config.model.width
    sends = 2 * layout_on(config, mesh).sends  # there and back
    yield Line(POSITIONS, "collective-permute", axes), sends, rows // mesh.shape[MODEL] // 2, 4
    if _padded(config, mesh):
        yield Line(POSITIONS, "all-gather", axes), 1, rows * mesh.shape[SEQ], 4


def _masks(model: Model, mesh: Mesh | AbstractMesh) -> Part:
    """Some strategies gather the intervals of all queries: once, or for packed documents in every microbatch."""
    config, axes, sizes = model.config, _cut(mesh, SEQ), sizes_of(model.config, mesh)
    if STRATEGIES[config.attention.strategy].whole_mask and axes:
        rows, times = (sizes.B, config.optim.accumulate) if config.data.separator else (1, 1)
        yield Line(MASK, "all-gather", axes), times, mesh.shape[SEQ] * 2 * rows * sizes.l, 4


def _gradients(model: Model, mesh: Mesh | AbstractMesh) -> Part:
    """The gradient law: over each axis one sum, of everything that the axis does not cut; the loss rides along."""
    for axis in cut_axes(mesh):
        elements = 2  # the loss, and how many tokens count
        for leaf, spec in zip(jax.tree.leaves(model.shapes), jax.tree.leaves(model.specs), strict=True):
            if axis not in named_axes(spec):
                rows = layout_on(model.config, mesh).padded(leaf.shape[0]) if SEQ in named_axes(spec) else leaf.shape[0]
                elements += rows * math.prod(leaf.shape[1:]) // _shares(spec, mesh)
        yield Line(GRADIENTS, "all-reduce", (axis,)), 1, elements, 4


def _norms(model: Model, mesh: Mesh | AbstractMesh) -> Part:
    """For the gradient's global norm the squares of what is cut are added up over the axes that cut it."""
    for axes in {_cut(mesh, *named_axes(spec)) for spec in jax.tree.leaves(kept_specs(model, mesh))} - {()}:
        yield Line(OPTIMIZER, "scalars", axes), 1, 1, 4


def _sharded_state(model: Model, mesh: Mesh | AbstractMesh) -> Part:
    """Each parameter that other devices update a part of: this device's whole of it."""
    kept, moments = (jax.tree.leaves(specs(model, mesh)) for specs in (kept_specs, moment_specs))
    for leaf, before, after in zip(jax.tree.leaves(model.shapes), kept, moments, strict=True):
        axes = _cut(mesh, *(named_axes(after) - named_axes(before)))
        if axes:
            yield Line(OPTIMIZER, "all-gather", axes), 1, leaf.size // _shares(before, mesh), 4


def _shares(spec: PartitionSpec, mesh: Mesh | AbstractMesh) -> int:
    """Into how many parts a spec cuts an array."""
    return math.prod(mesh.shape[axis] for axis in named_axes(spec))


def _segment(config: Config, mesh: Mesh | AbstractMesh) -> int:
    """Numbers in a segment's activations."""
    sizes = sizes_of(config, mesh)
    return sizes.B * sizes.l * config.model.width


def _padded(config: Config, mesh: Mesh | AbstractMesh) -> bool:
    return layout_on(config, mesh).padded(config.data.seq_len) != config.data.seq_len


def _cut(mesh: Mesh | AbstractMesh, *axes: str) -> tuple[str, ...]:
    """Those of the axes that have more than one device, in the order of the mesh."""
    return tuple(axis for axis in cut_axes(mesh) if axis in axes)


# What a device sends in ring algorithms, over the bytes of the result, in a group of n (Thakur et al. 2005, Sec. 4).
SENT = {
    "all-gather": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,
    "collective-permute": lambda n: 1,
    "scalars": lambda n: 2 * (n - 1) / n,
}


def sent(collectives: Contract, mesh: Mesh | AbstractMesh) -> float:
    """Bytes that a device sends for these collectives, by ring algorithms."""
    return sum(
        SENT[line.kind](math.prod(mesh.shape[axis] for axis in line.axes)) * total.bytes
        for line, total in collectives.items()
    )
