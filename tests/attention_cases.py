"""Attention strategies as functions of whole arrays in natural order, and a dense oracle that shares no code with them.

Masks are data: one compiled program takes any intervals, so a test may run many masks through it.
"""

import dataclasses
from functools import cache, lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from helpers import assert_close, mesh_of
from jax.sharding import PartitionSpec as P

from lss_jax.attention.head_groups import in_head_groups
from lss_jax.attention.kernels.targets import TARGETS
from lss_jax.attention.mask import Intervals, bidirectional, causal, documents, prefix_causal, window
from lss_jax.attention.setting import Reach, Setting
from lss_jax.attention.strategies import make_attend
from lss_jax.parallel.dropout import Dropout
from lss_jax.parallel.layout import Layout
from lss_jax.parallel.mesh import DATA, SEQ, without_unsharded

B, H, K = 2, 24, 8  # 2, 3, 4 and 8 devices divide the heads, for Ulysses
TOKENS = 93  # which 3 devices divide; 2, 4 and 8, and all in zigzag, need padding
QUICK = {"xla_backend_optimization_level": 0}  # of what LLVM does to a kernel: most of a test's time is compilation
BOUNDS = {"float32": 1e-5, "bfloat16": 2e-2}  # relative to the largest entry; over the grid: 1.1e-6 and 1.0e-2


@dataclasses.dataclass(frozen=True)
class Case:
    """One program of attention; its string is the name of its tests."""

    strategy: str
    layout: str = "contiguous"
    data: int = 1
    seq: int = 1
    kv_heads: int = H
    dtype: str = "float32"
    kernel: str = "blockwise"
    blocks: tuple[int, int] = (8, 8)  # of queries, of keys
    head_groups: int = 1
    regather: bool = False
    by_row: bool = False  # whether each row of the batch has a mask of its own
    reach: Reach | None = None  # how far the masks show keys

    def __str__(self) -> str:
        parts = [self.layout, f"{self.data}x{self.seq}", f"{self.kv_heads}of{H}", self.dtype, self.kernel]
        parts += [f"{self.blocks[0]}by{self.blocks[1]}", "masks_by_row" if self.by_row else "shared_masks"]
        parts += [f"{self.head_groups}groups"] * (self.head_groups > 1)
        parts += [f"{self.reach.before}_before_{self.reach.behind}_behind"] if self.reach else []
        return "-".join(parts)

    @property
    def order(self) -> Layout:
        return Layout(self.layout, self.seq)

    @property
    def length(self) -> int:
        """Tokens and padding."""
        return self.order.padded(TOKENS)


class Results(NamedTuple):
    """Attention and its gradients, whole and in natural order."""

    o: np.ndarray
    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray


@lru_cache(maxsize=2)  # a program on 8 devices takes 150 of the 65,530 memory maps that Linux gives to a process
def program(case: Case):
    """The strategy inside `shard_map`: global arrays in layout order, intervals and dropout (or None) to `Results`."""
    mesh = mesh_of(case.data, case.seq)
    x_spec, rows_spec, sequence_spec = (without_unsharded(spec, mesh) for spec in (P(DATA, SEQ), P(DATA), P(SEQ)))
    axis = SEQ if case.seq > 1 else None
    setting = Setting(
        axis,
        case.order,
        case.order,
        case.kernel,
        *case.blocks,
        case.regather,
        interpret=True,
        approximation=None,
        reach=case.reach,
    )

    def on_device(q_BlHK, k_BlGK, v_BlGK, do_BlHK, mask, dropout):
        attend = partial(in_head_groups(make_attend(case.strategy, mask, setting), case.head_groups), dropout=dropout)
        o_BlHK, transpose = jax.vjp(attend, q_BlHK, k_BlGK, v_BlGK)
        return Results(o_BlHK, *transpose(do_BlHK))

    @partial(jax.jit, compiler_options=QUICK)
    def on_mesh(q, k, v, do, mask, dropout):
        mask_spec = sequence_spec if mask.start.ndim == 1 else x_spec
        dropout_spec = dropout and Dropout(P(), P(), rows_spec, sequence_spec, P())
        in_specs = (*[x_spec] * 4, Intervals(mask_spec, mask_spec), dropout_spec)
        checked = (
            case.kernel not in TARGETS
        )  # JAX's interpreter of Pallas mixes the varying axes of what it takes apart
        segments = jax.shard_map(on_device, mesh=mesh, in_specs=in_specs, out_specs=x_spec, check_vma=checked)
        return segments(q, k, v, do, mask, dropout)

    return on_mesh


def attended(case: Case, arrays, mask: Intervals, dropout: Dropout | None = None) -> Results:
    """What the strategy makes of whole `q, k, v, do` in natural order."""
    position_l = case.order.positions(case.length)
    in_layout = [np.asarray(x)[:, position_l] for x in arrays]
    mask = Intervals(*(np.asarray(x)[..., position_l] for x in mask))
    results = program(case)(*in_layout, mask, dropout and dropout._replace(position_l=position_l))
    place_L = np.argsort(position_l)
    return Results(*(np.asarray(x)[:, place_L] for x in results))


@cache
def arrays_of(length: int, kv_heads: int, dtype: str = "float32") -> list[np.ndarray]:
    """Random `q, k, v, do`."""
    random = np.random.default_rng(0)
    shapes = [(B, length, heads, K) for heads in (H, kv_heads, kv_heads, H)]
    return [random.standard_normal(shape, np.float32).astype(jnp.dtype(dtype)) for shape in shapes]


def oracle(q_BLHK, k_BLGK, v_BLGK, do_BLHK, seen_BLL, factor_BHLL=1.0) -> Results:
    """Dense float32 attention as the textbook has it; `factor_BHLL` is what dropout multiplies the weights by."""
    repeats = q_BLHK.shape[2] // k_BLGK.shape[2]
    k_BLHK, v_BLHK = (np.repeat(x, repeats, axis=2) for x in (k_BLGK, v_BLGK))
    wide = [np.asarray(x, np.float32) for x in (q_BLHK, k_BLHK, v_BLHK, do_BLHK)]
    o_BLHK, dq_BLHK, dk_BLHK, dv_BLHK = map(np.asarray, _oracle(*wide, seen_BLL, factor_BHLL))
    return Results(o_BLHK, dq_BLHK, *(dx.reshape(*k_BLGK.shape[:3], repeats, -1).sum(3) for dx in (dk_BLHK, dv_BLHK)))


@jax.jit
def _oracle(q_BLHK, k_BLHK, v_BLHK, do_BLHK, seen_BLL, factor_BHLL):
    def attention(q_BLHK, k_BLHK, v_BLHK):
        s_BHLL = jnp.einsum("bqhk,bshk->bhqs", q_BLHK, k_BLHK) / jnp.sqrt(q_BLHK.shape[3])
        p_BHLL = jax.nn.softmax(jnp.where(seen_BLL[:, None], s_BHLL, -1e30)) * seen_BLL[:, None]
        return jnp.einsum("bhqs,bshk->bqhk", p_BHLL * factor_BHLL, v_BLHK)

    o_BLHK, transpose = jax.vjp(attention, q_BLHK, k_BLHK, v_BLHK)
    return o_BLHK, *transpose(do_BLHK)


def shared_masks(length: int) -> dict[str, Intervals]:
    """Masks for all rows of a batch, `[L]`: `TOKENS` tokens, then padding."""
    position = np.arange(length)
    tokens = bidirectional(position, TOKENS)
    masks = {
        "causal": causal(position),
        "bidirectional": tokens,
        "window": causal(position) & window(position, 5),
        "window and later tokens": window(position, 70),
        "prefix": prefix_causal(position, 37),
        "causal, no padding": causal(position) & tokens,
        "prefix, window, no padding": prefix_causal(position, 37) & window(position, 20) & tokens,
        "some see nothing": Intervals(position % 7 * 3, position % 5 * 20),
        "some see one": Intervals(position // 2, position // 2 + 1 + position % 2 * 9),
        "none sees anything": Intervals(position, position),
    }
    return {name: Intervals(*(np.asarray(x, np.int32) for x in mask)) for name, mask in masks.items()}


def masks_by_row(length: int) -> dict[str, Intervals]:
    """Masks that differ between the rows of a batch, `[B, L]`."""
    position = np.arange(length)
    random = np.random.default_rng(1)
    cuts = [np.sort(random.choice(np.arange(1, TOKENS), 4, replace=False)) for _ in range(B)]
    edges_BD = np.stack([np.concatenate(([0], cut, [TOKENS], [length])) for cut in cuts])
    document_BL = np.stack([np.searchsorted(edges[1:-1], position, side="right") for edges in edges_BD])
    packed = documents(np.stack([np.take_along_axis(edges_BD, document_BL + side, 1) for side in (0, 1)]))
    ends_B1 = np.array([[TOKENS - 31], [TOKENS - 2]])
    anything_2BL = random.integers(0, length + 1, (2, B, length))
    masks = {
        "documents": packed,
        "documents, causal": packed & causal(position),
        "documents, causal, window": packed & causal(position) & window(position, 4),
        "documents, prefix": packed & prefix_causal(position, 40),
        "padding by row": Intervals(np.zeros((B, length)), np.where(position < ends_B1, ends_B1, 0)),
        "causal, padding by row": Intervals(np.zeros((B, length)), np.minimum(position + 1, ends_B1)),
        "anything": Intervals(*anything_2BL),
    }
    return {name: Intervals(*(np.asarray(x, np.int32) for x in mask)) for name, mask in masks.items()}


def seen_by(mask: Intervals, length: int | None = None) -> np.ndarray:
    """`[B, l, L]`: which of `length` keys each query sees; by default there are as many as queries."""
    start, end = (np.broadcast_to(x, (B, x.shape[-1]))[..., None] for x in mask)
    key_L = np.arange(length or start.shape[1])
    return (start <= key_L) & (key_L < end)


@cache
def expected(length: int, kv_heads: int, dtype: str, by_row: bool) -> dict[str, dict[str, np.ndarray]]:
    """The oracle's results by the name of the mask."""
    masks = masks_by_row(length) if by_row else shared_masks(length)
    arrays = arrays_of(length, kv_heads, dtype)
    return {name: oracle(*arrays, seen_by(mask))._asdict() for name, mask in masks.items()}


def check(case: Case) -> None:
    """Raises an `AssertionError` with the names of the masks and of the results that are wrong."""
    masks = masks_by_row(case.length) if case.by_row else shared_masks(case.length)
    arrays = arrays_of(case.length, case.kv_heads, case.dtype)
    found = {name: attended(case, arrays, mask)._asdict() for name, mask in masks.items()}
    assert all(x.dtype == jnp.dtype(case.dtype) for x in jax.tree.leaves(found))
    assert_close(found, expected(case.length, case.kv_heads, case.dtype, case.by_row), BOUNDS[case.dtype])
