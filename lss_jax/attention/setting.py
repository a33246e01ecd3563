"""What attention knows at compile time, and nothing of where it runs: see `placement` for that."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from lss_jax.attention.mask import MaskKind
from lss_jax.parallel.layout import SEQUENCE, SOURCE, Layout


class Between(NamedTuple):
    """Which sequence the queries of an attention are of, and which one its keys and values are of."""

    queries: str
    keys: str


SELF, IN_SOURCE, CROSS = Between(SEQUENCE, SEQUENCE), Between(SOURCE, SOURCE), Between(SEQUENCE, SOURCE)


class Reach(NamedTuple):
    """How many tokens before a query, and how many behind it, its mask shows at most."""

    before: int
    behind: int


def reach_of(window: int, *, causal: bool) -> Reach:
    """That of a sliding window of so many tokens, the query's own among them: up to it, or around it."""
    return Reach(window - 1, 0) if causal else Reach(window // 2, (window - 1) // 2)


class Approximation(NamedTuple):
    """What a strategy that is not exact is told: the mask's kind, and keys of the config that are for such alone."""

    seen: MaskKind | None  # None where only costs outside attention are asked for
    window: int
    global_tokens: int
    features: int
    seed: int  # of random features

    @property
    def causal(self) -> bool:
        """Whether a token sees nothing after itself."""
        assert self.seen is not None
        return self.seen.causal


class Scores(NamedTuple):
    """What a caller may ask about scores: models of ours ask for nothing."""

    scale: float | None  # in float32; None: the inverse root of the heads' width
    residual: bool  # attention gives the log-sum-exp of each query's scores, too
    precision: str | None  # of matrix products, as in `jax.default_matmul_precision`; None: as it is there


USUAL = Scores(scale=None, residual=False, precision=None)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is known of attention at compile time.

    `axis` is the mesh axis that shards the sequences, None if nothing does. In self-attention both layouts are alike.
    """

    axis: str | None
    layout: Layout  # of the queries
    key_layout: Layout  # of the keys and values, whose length is that of their arrays
    kernel: str
    block_queries: int
    block_keys: int
    regather: bool  # what came from other devices is communicated again in the backward pass, not saved
    interpret: bool  # fused kernels step by step, as on CPUs
    approximation: Approximation | None  # None: attention is exact
    scores: Scores = USUAL
    reach: Reach | None = None  # None: a query may see any key

    def scale_of(self, width: int) -> float:
        """What the products of queries and keys of heads of this width are multiplied by."""
        return width**-0.5 if self.scores.scale is None else self.scores.scale

    @property
    def unsharded(self) -> "Setting":
        """The same for whole sequences in natural order, as a device has them after an exchange of heads."""
        whole = Layout("contiguous", 1)
        return dataclasses.replace(self, axis=None, layout=whole, key_layout=whole, reach=None)


def at_precision(one_pass: Callable[..., Any]) -> Callable[..., Any]:
    """A pass with a `Setting` among its arguments, traced at the setting's precision.

    A backward pass is traced when the user's context has long been left.
    """

    @functools.wraps(one_pass)
    def traced(*arguments: Any) -> Any:
        (setting,) = (argument for argument in arguments if isinstance(argument, Setting))
        if setting.scores.precision is None:
            return one_pass(*arguments)
        with jax.default_matmul_precision(setting.scores.precision):
            return one_pass(*arguments)

    return traced
