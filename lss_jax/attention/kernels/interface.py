"""What goes into a kernel and what comes out of it: the types that kernels share with the strategies above them."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from lss_jax.attention.mask import Intervals
from lss_jax.attention.pairs import Pairs
from lss_jax.parallel.dropout import PairDropout


class Queries(NamedTuple):
    """The queries that a device computes attention for."""

    q_BlHK: jax.Array
    mask: Intervals  # the keys that each query sees
    dropout: PairDropout | None  # of their attention weights
    pairs: Pairs | None  # what a mask array shows of the keys besides, and a bias

    def gradient(self, dq_BlHK: jax.Array, dbias_BHlL: jax.Array | None = None) -> "Queries":
        """Their cotangents, in the dtypes of what these are of: nothing but queries and bias has any."""
        pairs = None
        if self.pairs is not None and self.pairs.bias_BHlL is not None and dbias_BHlL is not None:
            pairs = Pairs(None, dbias_BHlL.astype(self.pairs.bias_BHlL.dtype))
        return Queries._make((dq_BlHK.astype(self.q_BlHK.dtype), None, None, pairs))


class Output(NamedTuple):
    """Attention of each query, in the dtype of the queries; a query that sees nothing has zeros."""

    o_BlHK: jax.Array
    lse: jax.Array  # the log-sum-exp of each query's scores, float32, blocked as the kernel has it
    lse_BlH: jax.Array | None  # the same unblocked, if it is asked for: minus infinity for a query that sees nothing

    @property
    def given(self) -> "jax.Array | Attended":
        """What attention gives: `o_BlHK`, with its log-sum-exp if that is asked for."""
        return self.o_BlHK if self.lse_BlH is None else Attended(self.o_BlHK, self.lse_BlH)


class Attended(NamedTuple):
    """The attention of queries to some keys; where a query sees none, zero and minus infinity."""

    o_BlHK: jax.Array
    lse_BlH: jax.Array  # float32


def cotangent_of_output(cotangent: "jax.Array | Attended") -> jax.Array:
    """That of `o_BlHK` from that of `Output.given`: as in JAX, nothing is differentiated by its log-sum-exp."""
    return cotangent.o_BlHK if isinstance(cotangent, Attended) else cotangent


class Residuals(NamedTuple):
    """What the backward pass needs: scores are recomputed from it."""

    queries: Queries
    kv_N2BGlK: jax.Array  # keys and values of all segments, whose `l` is their own, and not that of the queries
    output: Output


# Products per score: in a forward pass, and by kernel in both.
FORWARD = 2
PRODUCTS = {"dense": 2 + 5, "blockwise": 2 + 5, "triton": 2 + 3 + 4, "mosaic": 2 + 3 + 4}


class Kernel(NamedTuple):
    """Attention of local queries over keys that are all there, and its gradient.

    `forward(queries, kv_N2BGlK, setting)` gives the `Output`. `backward(residuals, do_BlHK, setting)` gives
    `Queries.gradient` and, in float32 and with keys last, `dkv_N2BGKl`: what these queries contribute to the gradient
    of every key and value.
    """

    forward: Callable[..., Output]
    backward: Callable[..., tuple[Queries, jax.Array]]
