"""A program as a graph of operations on arrays; `inlining` makes it of a traced one."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

COLLECTIVES = ("all_gather", "all_to_all", "ppermute", "psum", "psum_invariant", "reduce_scatter")

# Operations that move nothing: their result is their operand under another name or shape.
RESHAPES = {"reshape", "squeeze", "expand_dims"}
VIEWS = RESHAPES | {"pvary", "pcast", "name", "optimization_barrier", "sharding_constraint", "mesh_cast", "reshard"}
# Elements in another order, or another number of them.
MOVES = {"broadcast_in_dim", "concatenate", "dynamic_slice", "gather", "iota", "pad", "rev", "slice", "split"}
MOVES |= {"stack", "tile", "transpose", "unstack"}
REDUCTIONS = {f"reduce_{name}" for name in ("sum", "max", "min", "prod", "and", "or", "xor")} | {"argmax", "argmin"}
POINTWISE = {"abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh", "cbrt", "ceil"}
POINTWISE |= {
    "bitcast_convert_type",
    "clamp",
    "convert_element_type",
    "copy",
    "copy_p",
    "cos",
    "cosh",
    "div",
    "eq",
    "erf",
}
POINTWISE |= {"erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "integer_pow", "is_finite", "le", "log"}
POINTWISE |= {"log1p", "logistic", "lt", "max", "min", "mul", "ne", "neg", "nextafter", "not", "or", "population_count"}
POINTWISE |= {"pow", "reduce_precision", "rem", "round", "rsqrt", "select_n", "shift_left", "shift_right_arithmetic"}
POINTWISE |= {
    "shift_right_logical",
    "sign",
    "sin",
    "sinh",
    "sqrt",
    "square",
    "stop_gradient",
    "sub",
    "tan",
    "tanh",
    "xor",
}


@dataclasses.dataclass(eq=False)
class Value:
    """An array of the program. `shards` is the number of devices that it is spread over, where its shape is global."""

    shape: tuple[int, ...]
    dtype: Any
    on_host: bool
    node: "Node | None" = None
    shards: int = 1
    constant: float | None = None  # that all elements are equal to
    uniform: bool = False  # all elements are equal

    @property
    def elements(self) -> int:
        """On one device."""
        return math.prod(self.shape) // self.shards

    @property
    def bytes(self) -> int:
        """On one device, if it is stored as what it is."""
        return self.elements * getattr(self.dtype, "itemsize", 8)


@dataclasses.dataclass(eq=False)
class Node:
    """An operation; `bodies` are the graphs of a loop (one) or of a `cond`'s branches, which read outer values."""

    operation: str
    params: dict[str, Any]
    inputs: list[Value]
    scope: str
    outputs: list[Value] = dataclasses.field(default_factory=list)
    bodies: list["Graph"] = dataclasses.field(default_factory=list)
    carried: list[Value] = dataclasses.field(default_factory=list)  # initial values of what a loop carries
    for_product: bool = False  # makes a matrix of a product's factor

    def drop_stacks(self, needed: set[Value]) -> None:
        """Lets a loop stack only what is needed."""
        (body,), first = self.bodies, len(self.carried)
        kept = [at for at, value in enumerate(self.outputs) if at < first or value in needed]
        self.outputs, body.outputs = [self.outputs[at] for at in kept], [body.outputs[at] for at in kept]
        self.inputs = [*self.carried, *body.pruned().captured()]

    @property
    def fusible(self) -> bool:
        """Whether it may be computed inside of another operation's kernel, element by element."""
        return self.operation in POINTWISE or self.operation in MOVES or self.operation in VIEWS


def value_of(aval: Any) -> Value:
    """A value of no node: an argument, or what a loop carries."""
    on_host = "host" in str(getattr(aval, "memory_space", "")).lower()
    return Value(tuple(getattr(aval, "shape", ())), getattr(aval, "dtype", None), on_host)


@dataclasses.dataclass(eq=False)
class Graph:
    """A program, or the body of a loop: then `carried` are what each turn finds, the first `outputs` what it leaves."""

    local: bool  # whether shapes are those of one device
    nodes: list[Node] = dataclasses.field(default_factory=list)
    outputs: list[Value] = dataclasses.field(default_factory=list)
    carried: list[Value] = dataclasses.field(default_factory=list)
    known: dict[Any, Node] = dataclasses.field(default_factory=dict)  # equal operations are computed once

    def add(
        self,
        operation: str,
        inputs: list[Value],
        outputs: list[Value],
        scope: str,
        *,
        key: str | None = "",
        params: dict[str, Any] | None = None,
    ) -> list[Value]:
        """The results of an operation: of an equal one (same `key`) that the graph has, or of a new node."""
        shapes = tuple((value.shape, str(value.dtype)) for value in outputs)
        known = (operation, tuple(x if x.constant is None else x.constant for x in inputs), key, shapes)
        if key is not None and known in self.known:
            return self.known[known].outputs
        node = Node(operation, params or {}, inputs, scope, outputs)
        constants = [x.constant for x in inputs]
        for value in outputs:
            elementwise = node.fusible and operation not in ("iota", "gather") and bool(inputs)
            value.uniform = not value.shape or (elementwise and all(x.uniform for x in inputs))
            if value.uniform and None not in constants and operation in FOLDED:
                value.constant = FOLDED[operation](*constants)
        if key is not None:
            self.known[known] = node
        return self.append(node)

    def append(self, node: Node) -> list[Value]:
        """Adds a node as it is."""
        self.nodes.append(node)
        for value in node.outputs:
            value.node = node
        return node.outputs

    def pruned(self) -> "Graph":
        """This graph, without operations and stacked results of loops that nobody needs."""
        needed, kept = set(self.outputs), []
        for node in reversed(self.nodes):
            if needed.intersection(node.outputs):
                if node.carried:
                    node.drop_stacks(needed)
                kept.append(node)
                needed.update(node.inputs)
        self.nodes = kept[::-1]
        return self

    def put_in_one_memory(self) -> None:
        """Makes of moves between the memories of device and host what they are where there is but one: nothing."""
        for node in self.nodes:
            node.operation = "reshard" if node.operation == "device_put" else node.operation
            for body in node.bodies:
                body.put_in_one_memory()
        for value in [*self.carried, *(value for node in self.nodes for value in node.outputs)]:
            value.on_host = False

    def captured(self) -> list[Value]:
        """The values of outside that a body reads."""
        inside = {value for node in self.nodes for value in node.outputs} | set(self.carried)
        read = [value for node in self.nodes for value in node.inputs] + self.outputs
        return [value for value in dict.fromkeys(read) if value not in inside]


# How constants that are the same everywhere go through operations, as far as it helps to find zeros and ones.
FOLDED: dict[str, Callable[..., float]] = {
    **dict.fromkeys((*VIEWS, "broadcast_in_dim", "convert_element_type", "copy", "transpose"), lambda x: x),
    "add": lambda x, y: x + y,
    "add_any": lambda x, y: x + y,
    "mul": lambda x, y: x * y,
    "square": lambda x: x * x,
}
