"""A traced program as a graph on one device's arrays: calls inlined, local shapes, and what XLA folds is folded.

What remains of a jaxpr is what XLA would make kernels of: dead code is gone, equal operations are one, additions of
zero and factors of one have vanished, and a loop of one turn is no loop.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jax.extend import core
from jax.interpreters import partial_eval

from lss_jax.inspection.dataflow import POINTWISE, Graph, Node, Value, value_of


def graph_of(closed: core.ClosedJaxpr) -> Graph:
    """The graph of a traced program; the values of its arguments have no node."""
    jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars), instantiate=True)
    graph = Graph(local=False)
    graph.outputs = _inline(jaxpr, [value_of(var.aval) for var in jaxpr.invars], graph, "")
    return graph.pruned()


def _inline(jaxpr: Any, arguments: Sequence[Value], graph: Graph, scope: str) -> list[Value]:
    """Adds the operations of a jaxpr to a graph, and returns its results."""
    jaxpr = _open(jaxpr)
    values = dict(zip(jaxpr.invars, arguments, strict=True)) | {var: value_of(var.aval) for var in jaxpr.constvars}

    def read(atom: Any) -> Value:
        return _literal(atom) if isinstance(atom, core.Literal) else values[atom]

    for eqn in jaxpr.eqns:
        within = "/".join(part for part in (scope, str(eqn.source_info.name_stack)) if part)
        add = BUILDERS.get(eqn.primitive.name, _call if _called(eqn) is not None else _operation)
        outputs = add(eqn, [read(atom) for atom in eqn.invars], graph, within)
        values.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _literal(literal: core.Literal) -> Value:
    value = value_of(literal.aval)
    value.uniform = not value.shape
    value.constant = float(literal.val) if value.uniform else None
    return value


def _called(eqn: core.JaxprEqn) -> Any:
    """The jaxpr that an equation calls, once and with its own operands; None if it does anything else."""
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        jaxpr = eqn.params.get(name)
        if hasattr(jaxpr, "eqns") and eqn.primitive.name != "pallas_call":
            inner = _open(jaxpr)
            if eqn.primitive.name == "shard_map" or _shapes(inner.invars) == _shapes(eqn.invars):
                return inner
    return None


def _shapes(atoms: Sequence[Any]) -> list[Any]:
    return [getattr(atom.aval, "shape", None) for atom in atoms]


def _call(eqn: core.JaxprEqn, inputs: list[Value], graph: Graph, scope: str) -> list[Value]:
    return _inline(_called(eqn), inputs, graph, scope)


def _shard_map(eqn: core.JaxprEqn, inputs: list[Value], graph: Graph, scope: str) -> list[Value]:
    """Inside shapes are local; outside a result is spread over as many devices as it is larger than inside."""
    jaxpr = _called(eqn)
    assert jaxpr is not None
    arguments = zip(inputs, jaxpr.invars, strict=True)
    inside = [graph.add("reshard", [x], [value_of(var.aval)], scope)[0] for x, var in arguments]
    was_local, graph.local = graph.local, True
    results = _inline(jaxpr, inside, graph, scope)
    graph.local = was_local
    outside = [value_of(var.aval) for var in eqn.outvars]
    for value, result in zip(outside, results, strict=True):
        value.shards = max(1, value.elements // max(1, result.elements))
    return [graph.add("reshard", [x], [value], scope)[0] for x, value in zip(results, outside, strict=True)]


def _scan(eqn: core.JaxprEqn, inputs: list[Value], graph: Graph, scope: str) -> list[Value]:
    """A loop; a turn slices its inputs from stacks, which are read where they lie."""
    if eqn.params["unroll"] >= eqn.params["length"]:
        return _unrolled(eqn, inputs, graph, scope)
    consts, first = _constants_and_carries(eqn)
    variables = _open(eqn.params["jaxpr"]).invars
    body = Graph(local=True, carried=[value_of(var.aval) for var in variables[consts:first]])
    stacks = zip(inputs[first:], variables[first:], strict=True)
    slices = [body.add("dynamic_slice", [stack], [value_of(var.aval)], scope)[0] for stack, var in stacks]
    body.outputs = _inline(eqn.params["jaxpr"], [*inputs[:consts], *body.carried, *slices], body, scope)
    return _loop(eqn, inputs[consts:first], body, graph, scope)


def _unrolled(eqn: core.JaxprEqn, inputs: list[Value], graph: Graph, scope: str) -> list[Value]:
    """The turns of a loop one after the other: also of one with a single turn."""
    (consts, first), length = _constants_and_carries(eqn), eqn.params["length"]
    variables, carried, results = _open(eqn.params["jaxpr"]).invars[first:], inputs[consts:first], []
    cut, stack = ("squeeze", "reshape") if length == 1 else ("slice", "stack")
    for turn in range(length)[:: -1 if eqn.params["reverse"] else 1]:
        stacks, key = zip(inputs[first:], variables, strict=True), f"turn {turn}"
        slices = [graph.add(cut, [x], [value_of(var.aval)], scope, key=key)[0] for x, var in stacks]
        outputs = _inline(eqn.params["jaxpr"], [*inputs[:consts], *carried, *slices], graph, scope)
        carried = outputs[: len(carried)]
        results.append(outputs[len(carried) :])
    outvars = enumerate(eqn.outvars[len(carried) :])  # a loop without turns stacks nothing
    turns = [([result[position] for result in results], value_of(var.aval)) for position, var in outvars]
    stacked = [graph.add(stack, parts, [whole], scope, key=None)[0] for parts, whole in turns]
    return [*carried, *stacked]


def _constants_and_carries(eqn: core.JaxprEqn) -> tuple[int, int]:
    """Where the carries of a scan begin among its inputs, and where they end: what is stacked has a dimension more."""
    inner = _open(eqn.params["jaxpr"])

    def stacked(outside: Any, inside: Any) -> int:
        return sum(a.aval.ndim > b.aval.ndim for a, b in zip(outside, inside, strict=True))

    first = len(eqn.invars) - stacked(eqn.invars, inner.invars)
    return first - (len(eqn.outvars) - stacked(eqn.outvars, inner.outvars)), first


def _open(jaxpr: Any) -> core.Jaxpr:
    """The equations of a jaxpr, which some versions of JAX close over constants."""
    return jaxpr.jaxpr if hasattr(jaxpr, "consts") else jaxpr


def _while(eqn: core.JaxprEqn, inputs: list[Value], graph: Graph, scope: str) -> list[Value]:
    first = eqn.params["cond_nconsts"]
    consts, initial = inputs[first:][: eqn.params["body_nconsts"]], inputs[first:][eqn.params["body_nconsts"] :]
    body = Graph(local=True, carried=[value_of(var.aval) for var in eqn.outvars])
    body.outputs = _inline(eqn.params["body_jaxpr"], [*consts, *body.carried], body, scope)
    return _loop(eqn, initial, body, graph, scope)


def _loop(eqn: core.JaxprEqn, initial: list[Value], body: Graph, graph: Graph, scope: str) -> list[Value]:
    inputs, outputs = [*initial, *body.pruned().captured()], [value_of(var.aval) for var in eqn.outvars]
    return graph.append(Node("loop", {}, inputs, scope, outputs, [body], initial))


def _cond(eqn: core.JaxprEqn, inputs: list[Value], graph: Graph, scope: str) -> list[Value]:
    node = Node("cond", {}, inputs[:1], scope, [value_of(var.aval) for var in eqn.outvars])
    for branch in eqn.params["branches"]:
        body = Graph(local=graph.local)
        body.outputs = _inline(branch, inputs[1:], body, scope)
        node.bodies.append(body)
        node.inputs += body.pruned().captured()
    for position, value in enumerate(node.outputs):
        value.shards = max(body.outputs[position].shards for body in node.bodies)
    return graph.append(node)


def _dot(eqn: core.JaxprEqn, inputs: list[Value], graph: Graph, scope: str) -> list[Value]:
    """A product, which XLA takes of matrices. The left factor is copied if its contracted dimensions are not last."""
    (contracted, _), (batch, _) = eqn.params["dimension_numbers"]
    left, right = inputs
    if right.node and right.node.operation == "transpose":  # folded into the product
        right = right.node.inputs[0]
    dimensions = list(zip(*eqn.params["dimension_numbers"], strict=True))  # contracted and batch, of each factor
    free = [axis for axis in range(len(left.shape)) if axis not in contracted and axis not in batch]
    if free and contracted and min(contracted) < max(free):
        left = _matrix(left, "transpose", dimensions[0], graph, scope)
    factors = [
        _matrix(x, "reshape", numbers, graph, scope) for x, numbers in zip((left, right), dimensions, strict=True)
    ]
    return _operation(eqn, factors, graph, scope)


def _matrix(x: Value, operation: str, dimensions: tuple[Any, Any], graph: Graph, scope: str) -> Value:
    """A factor of a product as (a batch of) matrices, which it may be already."""
    contracted, batch = dimensions
    is_matrix = len(contracted) == 1 and len(x.shape) - len(batch) == 2
    if operation == "reshape" and (is_matrix or (x.node and x.node.for_product)):
        return x
    (result,) = graph.add(operation, [x], [dataclasses.replace(x, node=None)], scope, key="product")
    assert result.node is not None
    result.node.for_product = not is_matrix
    return result


BUILDERS = {"shard_map": _shard_map, "scan": _scan, "while": _while, "cond": _cond, "dot_general": _dot}


def _operation(eqn: core.JaxprEqn, inputs: list[Value], graph: Graph, scope: str) -> list[Value]:
    """Any other equation, unless XLA knows its result."""
    operation, outputs = eqn.primitive.name, [value_of(var.aval) for var in eqn.outvars]
    if operation in POINTWISE:
        known = _simplified(operation, inputs, outputs[0], graph)
        if known is not None:
            return [known]
        inputs = [_broadcast(x, outputs[0], graph, scope) for x in inputs]
    if not graph.local:
        for value in outputs:
            value.shards = max((x.shards for x in inputs), default=1)
    has_jaxpr = any(hasattr(param, "eqns") or hasattr(param, "jaxpr") for param in eqn.params.values())
    key = None if has_jaxpr else repr(eqn.params)
    return graph.add(operation, inputs, outputs, scope, key=key, params=eqn.params)


def _broadcast(x: Value, like: Value, graph: Graph, scope: str) -> Value:
    """An operand whose dimensions of size 1 an operation expands, expanded."""
    if not x.shape or x.shape == like.shape:
        return x
    value, axes = Value(like.shape, x.dtype, x.on_host), {"broadcast_dimensions": tuple(range(len(like.shape)))}
    return graph.add("broadcast_in_dim", [x], [value], scope, key="expanded", params=axes)[0]


def _simplified(operation: str, inputs: list[Value], output: Value, graph: Graph) -> Value | None:
    """What a pointwise operation's result is already: an operand, or a scatter that adds to it in place."""
    unit = {"add": 0, "add_any": 0, "sub": 0, "mul": 1}.get(operation)
    if operation == "convert_element_type" and inputs[0].dtype == output.dtype:
        return inputs[0]
    if unit is None:
        return None
    for x, other in (inputs, inputs[::-1]) if operation != "sub" else (inputs,):
        if other.constant == unit and (x.shape, x.dtype) == (output.shape, output.dtype):
            return x
        scatter = other.node
        to_zeros = scatter and scatter.operation == "scatter-add" and scatter.inputs[0].constant == unit == 0
        if scatter and to_zeros and operation != "sub" and x.shape == output.shape:
            graph.nodes.remove(scatter)
            graph.nodes.append(scatter)
            scatter.inputs[0] = x
            return scatter.outputs[0]
    return None
