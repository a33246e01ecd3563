"""Which values of a program XLA keeps in memory, and which kernel reads which: its rules of fusion, in short.

A kernel is an operation with all that is computed inside of it: pointwise operations and moves of elements are fused
into whatever reads them. A value is in memory if something must find it there, or if it is dear and several kernels
would compute it. These are the rules of XLA's compiler for CPUs (`instruction_fusion.cc`, `cpu_instruction_fusion.cc`,
and YNNPACK's kernels for products and reductions); GPUs and TPUs fuse more.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator

from lss_jax.inspection.dataflow import POINTWISE, REDUCTIONS, RESHAPES, VIEWS, Graph, Node, Value

# Pointwise (or nearly so) and dear: computed once for all kernels that need it.
DEAR = {"atan2", "cbrt", "div", "erf", "erf_inv", "exp", "exp2", "expm1", "gather", "log", "log1p"}
DEAR |= {"logistic", "pow", "rem", "rsqrt", "sqrt", "tanh"}
IN_PLACE = {"dynamic_update_slice", "scatter", "scatter-add", "scatter_add"}  # into their first operand


class Kernels:
    """The kernels of one graph: `nodes`, in the order of the program, and what each `reads` from memory.

    The last nodes are pseudo-kernels `result`, one for each output of the graph.
    """

    def __init__(self, graph: Graph):
        self.graph = graph
        self.own = {value for node in graph.nodes for value in node.outputs}
        self.users: dict[Value, list[Node]] = defaultdict(list)
        for node in graph.nodes:
            for value in node.inputs:
                self.users[value].append(node)
        self.in_memory: set[Value] = set()
        self.operands: set[Value] = set()  # of reductions, which everything reads from memory
        self._leaves: dict[Node, list[Value]] = {}
        self._sources: dict[tuple[Value, bool], list[Value]] = {}
        self._materialize()
        self.nodes = [node for node in graph.nodes if self._is_kernel(node)]
        self.reads = {node: list(self._reads(node)) for node in self.nodes}
        self._drop_unread_views()
        for value in graph.outputs:
            self.add(Node("result", {}, [value], ""), self.sources(value, fused=True))

    def add(self, node: Node, reads: list[Value]) -> None:
        """Adds a kernel."""
        self.nodes.append(node)
        self.reads[node] = reads

    def base(self, value: Value) -> Value:
        """The value that this one is a view of; itself, if it is none."""
        while value in self.own and value.node and value.node.operation in VIEWS and value.node.inputs:
            value = value.node.inputs[0]
        return value

    def sources(self, value: Value, fused: bool) -> list[Value]:
        """The values that a kernel reads for this operand: itself if in memory, or what it is computed from.

        Where the reader may compute it (`fused`), it does so also with a value in memory that is no larger than what it
        is computed from.
        """
        if (value, fused) not in self._sources:
            self._sources[value, fused] = list(dict.fromkeys(self._read_for(value, fused)))
        return self._sources[value, fused]

    def _read_for(self, value: Value, fused: bool) -> Iterator[Value]:
        node = value.node
        if value not in self.own or not node:
            yield value
        elif node.operation in VIEWS:
            if not fused and self._is_kernel(node):
                yield value
            else:
                yield from (source for x in node.inputs for source in self.sources(x, fused))
        elif value in self.in_memory and not (fused and self._recomputed(value)):
            yield value
        else:
            yield from (source for x in node.inputs for source in self.sources(x, fused=True))

    def _reads(self, node: Node) -> Iterable[Value]:
        operands, fused = node.inputs, node.fusible and node.operation not in VIEWS
        if node in self._leaves:
            operands = self._leaves[node]
        return dict.fromkeys(source for x in operands for source in self.sources(x, fused))

    def _is_kernel(self, node: Node) -> bool:
        """Whether a node is a kernel. A reshaped array that is read otherwise too is one, if only in the schedule."""
        if node.operation not in VIEWS:
            return any(value in self.in_memory for value in node.outputs)
        if node.operation not in RESHAPES or not node.inputs:
            return False
        base = self.base(node.inputs[0])
        of_product = base.node is not None and base.node.operation == "dot_general"
        return base in self.own and base in self.in_memory and not of_product and len(self.users[base]) > 1

    def _drop_unread_views(self) -> None:
        read: set[Value] = set()
        for node in reversed(self.nodes):
            if node.operation not in VIEWS or read.intersection(node.outputs):
                read.update(self.reads[node])
        self.nodes = [node for node in self.nodes if node.operation not in VIEWS or read.intersection(node.outputs)]

    def _materialize(self) -> None:
        """Finds what is in memory, from the results to the arguments."""
        computed_in: dict[Node, set[object]] = {}  # the kernels that compute a fused node
        results: dict[Value, set[object]] = defaultdict(set)
        for position, value in enumerate(self.graph.outputs):
            results[value].add(position)
        for node in reversed(self.graph.nodes):
            if node.operation in REDUCTIONS:
                self.in_memory.update(node.outputs)
                self._leaves[node] = list(self._leaves_of(node))
                computed_in[node] = {node}
            elif not node.fusible:
                transfer = node.operation == "device_put"  # to the host: into a loop's stack; from there: out of it
                self.in_memory.update(x for x in node.outputs if self.users[x] or not (transfer and x.on_host))
                self.in_memory.update(self.base(x) for x in node.inputs if not (transfer and x.on_host))
                computed_in[node] = set()
            else:
                readers = (computed_in[user] for value in node.outputs for user in self.users[value])
                kernels = set().union(*(results[value] for value in node.outputs), *readers)
                computed_in[node] = self._computed_in(node, kernels)

    def _computed_in(self, node: Node, kernels: set[object]) -> set[object]:
        (value, *_), dear = node.outputs, node.operation in DEAR
        if node.operation in VIEWS:
            return kernels
        expanded = any(user.operation == "broadcast_in_dim" for user in self.users[value][:1])
        if value not in self.in_memory and dear and (len(kernels) > 1 or expanded):
            self.in_memory.add(value)
            return {node}
        if not self.in_memory.intersection(node.outputs):
            return kernels
        return {node} | (kernels if self._recomputed(value) else set())

    def _recomputed(self, value: Value) -> bool:
        """Whether a fused reader computes a value that is in memory once more: from one array, or from smaller ones."""
        node = value.node
        if not node or not node.fusible or node.operation in DEAR or value in self.operands:
            return False
        inputs = list(dict.fromkeys(node.inputs))
        if sum(x.elements for x in inputs) <= value.elements:
            return True
        return sum(len(x.shape) >= len(value.shape) and not _expands(x) for x in inputs) <= 1

    def _leaves_of(self, reduction: Node) -> Iterator[Value]:
        """The operands of a reduction's kernel: what its pointwise chain starts from, and all expanded arrays.

        An array that is expanded along the reduced dimensions alone is not; nor is what is the same everywhere.
        """
        reduced, chain = set(reduction.params.get("axes", ())), {reduction}
        stack, seen = list(reduction.inputs), set()
        while stack:
            value = self.base(stack.pop())
            if value in seen or value.uniform:
                continue
            seen.add(value)
            node = value.node if value in self.own else None
            if node and node.operation == "broadcast_in_dim" and _expanded(node) <= reduced:
                yield self._operand(self.base(node.inputs[0]))
            elif not node or node.operation not in POINTWISE or self._expansion(value):
                yield self._operand(value)
            elif set(self.users[value]) <= chain:
                chain.add(node)
                stack.extend(node.inputs)
            else:
                yield self._operand(value)
                for x in node.inputs:
                    if self._expansion(x) and not (x.node and _expanded(x.node) and _expanded(x.node) <= reduced):
                        self._operand(x)

    def _operand(self, value: Value) -> Value:
        self.in_memory.add(value)
        self.operands.add(value)
        return value

    def _expansion(self, value: Value) -> bool:
        """Whether a value is computed from smaller arrays alone: expanded ones, and what is the same everywhere."""
        node = value.node
        if node is None or value not in self.own or value.uniform:
            return False
        if node.operation == "broadcast_in_dim":
            return True
        varied = [x for x in node.inputs if not x.uniform]
        return node.operation in POINTWISE and bool(varied) and all(map(self._expansion, varied))

    def overwritable(self, node: Node) -> Iterator[Value]:
        """Operands that a pointwise kernel may write its result over, if nobody reads them afterwards.

        They have its shape, and are read element by element. Where a product reshapes either, XLA does not see that.
        """
        stack, seen = list(node.inputs) if not self._in_product(node.outputs[0]) else [], set()
        while stack and node.operation in POINTWISE:
            value = stack.pop()
            if value in seen or value.shape != node.outputs[0].shape:
                continue
            seen.add(value)
            if value in self.in_memory:
                if not self._in_product(value) and not _from_reshaping_product(value):
                    yield value
            elif value in self.own and value.node and value.node.operation in POINTWISE | VIEWS:
                stack.extend(value.node.inputs)

    def _in_product(self, value: Value) -> bool:
        """Whether a product reads this value as a matrix of another shape."""
        users = self.users[value]
        views = (user for user in users if user.operation in VIEWS and user.operation not in RESHAPES)
        return any(user.for_product for user in users) or any(self._in_product(view.outputs[0]) for view in views)


def _from_reshaping_product(value: Value) -> bool:
    """Whether a value is the product of factors that are no matrices."""
    if value.node is None or value.node.operation != "dot_general":
        return False
    contracted, batch = value.node.params["dimension_numbers"]
    factors = zip(value.node.inputs, contracted, batch, strict=True)
    return any(len(x.shape) - len(c) - len(b) != 1 for x, c, b in factors)


def _expands(value: Value) -> bool:
    return value.node is not None and value.node.operation in ("broadcast_in_dim", "iota")


def _expanded(node: Node) -> set[int]:
    """The dimensions along which an operation repeats its operand."""
    if node.operation != "broadcast_in_dim" or not node.inputs:
        return set()
    operand, result, kept = node.inputs[0].shape, node.outputs[0].shape, node.params["broadcast_dimensions"]
    return {axis for axis, size in enumerate(result) if axis not in kept or operand[kept.index(axis)] != size}
