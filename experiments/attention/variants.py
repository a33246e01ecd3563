"""What the attention benchmark compares: each strategy with its layout and kernel, and XLA's partitioner."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from lss_jax.attention.head_groups import in_head_groups
from lss_jax.attention.mask import Intervals, causal
from lss_jax.attention.setting import Setting
from lss_jax.attention.strategies import STRATEGIES, make_attend
from lss_jax.attention.traffic import Sizes
from lss_jax.parallel.layout import Layout
from lss_jax.parallel.mesh import SEQ

DEVICES = 8
B, H, K = 1, 8, 64
ITEMSIZE = 4  # float32
LENGTHS = (2048, 4096, 8192, 16384, 32768)
BLOCK_QUERIES, BLOCK_KEYS = 512, 256
# Programs with `l x L` scores do not run on longer sequences: at 8k the partitioner's takes 1.4 GB on each of 8
# devices, at 16k it would take 5.4 GB on each, and the machine has 24 GiB.
LONGEST_DENSE = 8192


class Variant(NamedTuple):
    """One way to compute attention; `strategy` is a key of `STRATEGIES`, or "partitioner"."""

    strategy: str
    layout: str = "contiguous"
    kernel: str = "blockwise"
    groups: int = 1
    regather: bool = False

    @property
    def name(self) -> str:
        """The name in tables and in `results.json`."""
        if self == PARTITIONER:
            return self.strategy
        groups = f", {self.groups} groups" if self.groups > 1 else ""
        return f"{self.strategy}, {self.kernel}, {self.layout}{groups}"

    @property
    def longest(self) -> int:
        """The longest sequence that is run; longer ones are only compiled."""
        return LONGEST_DENSE if self.kernel == "dense" else max(LENGTHS)


PARTITIONER = Variant("partitioner", kernel="dense")
LSS_ZIGZAG = Variant("lss", "zigzag")
VARIANTS = (
    PARTITIONER,
    Variant("lss", kernel="dense"),
    Variant("lss"),
    LSS_ZIGZAG,
    Variant("lss", "zigzag", groups=2),
    Variant("ring"),
    Variant("ring", "zigzag"),
    Variant("ulysses"),
    Variant("ulysses", "zigzag"),
)


def attention_of(
    variant: Variant,
    length: int,
    mesh: Mesh,
    mask: Callable[[jax.Array], Intervals] = causal,
    blocks: tuple[int, int] = (BLOCK_QUERIES, BLOCK_KEYS),
) -> Callable[..., jax.Array]:
    """Attention from global `q, k, v` to `o`, `[B, L, H, K]` in layout order, sharded over `seq`."""
    if variant == PARTITIONER:
        return partial(jax.nn.dot_product_attention, is_causal=True)
    position_L = Layout(variant.layout, DEVICES).positions(length)

    @partial(jax.shard_map, mesh=mesh, in_specs=(P(None, SEQ),) * 3 + (P(SEQ),), out_specs=P(None, SEQ))
    def attention(q_BlHK, k_BlHK, v_BlHK, position_l):
        attend = make_attend(variant.strategy, mask(position_l), setting_of(variant, blocks))
        return in_head_groups(attend, variant.groups)(q_BlHK, k_BlHK, v_BlHK)

    return lambda q_BLHK, k_BLHK, v_BLHK: attention(q_BLHK, k_BLHK, v_BLHK, position_L)


def setting_of(variant: Variant, blocks: tuple[int, int]) -> Setting:
    """The setting of a variant, with blocks of so many queries and keys."""
    layout = Layout(variant.layout, DEVICES)
    return Setting(SEQ, layout, layout, variant.kernel, *blocks, variant.regather, interpret=True, approximation=None)


def predicted(variant: Variant, length: int) -> Counter:
    """The collectives of one layer that the strategy predicts: executions by kind and bytes of the result."""
    heads = H // variant.groups
    sizes = Sizes(B=B, l=length // DEVICES, s=length // DEVICES, H=heads, G=heads, K=K, itemsize=ITEMSIZE)
    setting = setting_of(variant, (BLOCK_QUERIES, BLOCK_KEYS))
    layer = STRATEGIES[variant.strategy].traffic(sizes, setting)
    expected: Counter = Counter()
    for one in layer["forward"] + layer["backward"]:
        expected[one.kind, one.bytes] += one.times * variant.groups
    if STRATEGIES[variant.strategy].whole_mask:
        expected["all-gather", 2 * length * 4] += 1  # the intervals of all queries, int32, once per step
    return expected


def must_exist(variant: Variant, length: int) -> int:
    """Bytes per device of `q, k, v, o` and their gradients, and of the gathered pair and its gradient."""
    segments = 8 * length // DEVICES
    gathered = 4 * length if variant.strategy == "lss" else 0
    return (segments + gathered) * B * H * K * ITEMSIZE
