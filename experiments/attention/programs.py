"""Attention layers as compiled programs: their seconds, their memory per device and their collectives."""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.attention.variants import B, H, K
from lss_jax.inspection.hlo import collectives
from lss_jax.parallel.mesh import SEQ


class Program:
    """Forward and backward pass of one layer, compiled: from `q, k, v, do` to `o, dq, dk, dv`."""

    def __init__(self, attention: Callable[..., jax.Array], length: int, mesh: Mesh):
        def forward_and_backward(q_BLHK, k_BLHK, v_BLHK, do_BLHK):
            o_BLHK, vjp = jax.vjp(attention, q_BLHK, k_BLHK, v_BLHK)
            return o_BLHK, *vjp(do_BLHK)

        self.inputs = inputs(length, mesh)
        sharding = self.inputs[0].sharding
        self.compiled = jax.jit(forward_and_backward, out_shardings=sharding).lower(*self.inputs).compile()
        memory = self.compiled.memory_analysis()
        assert memory is not None
        self.temporary = memory.temp_size_in_bytes
        self.total = self.temporary + memory.argument_size_in_bytes + memory.output_size_in_bytes

    def seconds(self) -> float:
        """Seconds of one run."""
        started = time.perf_counter()
        jax.block_until_ready(self.compiled(*self.inputs))
        return time.perf_counter() - started

    def traffic(self) -> Counter:
        """Collectives, as in `traffic_of`."""
        return traffic_of(self.compiled)


class Halves:
    """Forward and backward pass of one layer as two programs, as a scan over the layers of a model has them."""

    def __init__(self, attention: Callable[..., jax.Array], length: int, mesh: Mesh):
        *self.qkv, self.do_BLHK = inputs(length, mesh)
        forward = jax.jit(lambda q_BLHK, k_BLHK, v_BLHK: jax.vjp(attention, q_BLHK, k_BLHK, v_BLHK))
        self.forward = forward.lower(*self.qkv).compile()
        _, self.saved = self.forward(*self.qkv)  # the transposed function, with its residuals
        self.backward = jax.jit(lambda saved, do_BLHK: saved(do_BLHK)).lower(self.saved, self.do_BLHK).compile()

    def seconds(self) -> float:
        """Seconds of one run of both."""
        started = time.perf_counter()
        o_BLHK, saved = self.forward(*self.qkv)
        jax.block_until_ready((o_BLHK, self.backward(saved, self.do_BLHK)))
        return time.perf_counter() - started

    def traffic(self) -> Counter:
        """Collectives of both, as in `traffic_of`."""
        return traffic_of(self.forward) + traffic_of(self.backward)

    def saved_bytes(self) -> int:
        """Bytes per device of the residuals, with `q, k, v` where the backward pass reads them."""
        return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(self.saved))


def inputs(length: int, mesh: Mesh) -> list[jax.Array]:
    """Random global `q, k, v, do`, `[B, L, H, K]`, sharded over `seq`."""
    sharding = NamedSharding(mesh, P(None, SEQ))
    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.device_put(jax.random.normal(key, (B, length, H, K)), sharding) for key in keys]


def traffic_of(compiled: jax.stages.Compiled) -> Counter:
    """Executions of collectives, by kind and bytes of the result on one device."""
    found: Counter = Counter()
    for one in collectives(compiled.as_text() or ""):
        found[one.kind, one.bytes] += one.times
    return found


def take_turns(programs: Mapping[Any, Any], rounds: int) -> dict[Any, list[float]]:
    """Seconds of each program in each round, after a warm-up round."""
    seconds: dict[Any, list[float]] = {name: [] for name in programs}
    for turn in range(rounds + 1):
        for name, program in programs.items():
            took = program.seconds()
            if turn:
                seconds[name].append(took)
    return seconds


def ratio(seconds: list[float], base: list[float]) -> float:
    """The median over the rounds of the ratio within a round."""
    return statistics.median(one / other for one, other in zip(seconds, base, strict=True))
