"""What blocks are made of: linear maps and norms over local activations; each parameter's spec stands beside it.

A spec (metadata `spec`) names the mesh axes over which a parameter is sharded. Kernels are sharded over `model` by
heads and columns, so that inside `shard_map` `H`, `G` and `F` count those of this device. `P()` means replicated.
`heads` is the dimension of a parameter that counts heads, by which attention splits it into groups.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from lss_jax.attention.strategies import Attend
from lss_jax.config.schema import ModelConfig
from lss_jax.models.embeddings import INIT_STDDEV
from lss_jax.parallel.dropout import Dropout
from lss_jax.parallel.residuals import GATHERED
from lss_jax.parallel.weights import fetched, whole_weight

REPLICATED = {"spec": P()}
ADAPTER = ("lora_a", "lora_b")  # the parameters of an adapter

# (q_BlHK, k_BlGK, v_BlGK, dropout, past) -> (o_BlHK, own): `past` is the layer's part of the cache, None in training;
# `own` is what the layer adds to the cache, None if nothing.
AttendWithPast = Callable[..., tuple[jax.Array, Any]]


class Segment(NamedTuple):
    """The context of a device's segment that layers need: positions, attention, dropout and the model axis."""

    positions_l: jax.Array  # natural, of the segment
    positions_p: jax.Array  # natural, of this device's part of the segment
    embedded_l: jax.Array  # those that are embedded or rotated by: natural, or `[B, l]` if documents restart them
    is_token_p: jax.Array  # of the part, `[p]` or `[B, p]`: false for padding, which attends to nothing
    attend: AttendWithPast
    head_groups: int  # for which `attend` is called one after the other
    dropout: Dropout | None  # for the part's activations; None if nothing is dropped
    model_axis: str | None  # the mesh axis over which parts, heads and columns are sharded; None if they are not
    sequence_axes: tuple[str, ...]  # those of `seq` and `model` over which the sequence is sharded


def without_past(attend: Attend) -> AttendWithPast:
    """Adapts a strategy to training and evaluation, where there is no cache to read or to fill."""

    def attend_without_past(q_BlHK, k_BlGK, v_BlGK, dropout, past):
        assert past is None
        return attend(q_BlHK, k_BlGK, v_BlGK, dropout), None

    return attend_without_past


def norm(config: ModelConfig, rngs: nnx.Rngs) -> nnx.LayerNorm | nnx.RMSNorm:
    """LayerNorm, or RMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467), over `E`; statistics in float32."""
    if config.norm == "rms":
        return rms_norm(config, config.width, rngs)
    return nnx.LayerNorm(
        config.width,
        epsilon=config.norm_epsilon,
        dtype=config.dtype,
        use_bias=config.bias,
        scale_metadata=REPLICATED,
        bias_metadata=REPLICATED,
        rngs=rngs,
    )


def rms_norm(config: ModelConfig, width: int, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """RMSNorm over the last axis, of this width."""
    return nnx.RMSNorm(width, epsilon=config.norm_epsilon, dtype=config.dtype, scale_metadata=REPLICATED, rngs=rngs)


class Linear(nnx.Module):
    """A linear map of the last axes of its input, `inputs`, to `outputs`, in the compute dtype; the bias is optional.

    A kernel sharded over its outputs gives this device's outputs. One sharded over its inputs gives a partial sum: call
    `product`, sum over the devices, then add the bias (`biased`).

    It may have an adapter (`adapt`): two factors of a low rank whose product is added to the kernel.
    """

    def __init__(
        self,
        config: ModelConfig,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        rngs: nnx.Rngs,
        *,
        kernel_spec: P,
        bias_spec: P | None = None,
        stddev: float = INIT_STDDEV,
        heads: int | None = None,
    ):
        self.dtype, self.contracted = config.dtype, len(inputs)
        kernel = nnx.initializers.normal(stddev)(rngs.params(), (*inputs, *outputs), jnp.float32)
        self.kernel = nnx.Param(kernel, spec=kernel_spec, heads=heads)
        if bias_spec is not None:
            bias = nnx.initializers.zeros(rngs.params(), outputs, jnp.float32)
            of_output = None if heads is None or heads < len(inputs) else heads - len(inputs)
            self.bias = nnx.Param(bias, spec=bias_spec, heads=of_output)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.biased(self.product(x))

    def adapt(self, rank: int, scale: float, rngs: nnx.Rngs) -> None:
        """Adds an adapter (Hu et al. 2021, arXiv 2106.09685, Sec. 4.1); a fresh one changes nothing.

        Its factors are sharded as the kernel is, each in the dimensions that it shares with it. So the product with a
        kernel sharded over its inputs stays a partial sum, and takes no collective of its own.
        """
        known = self.kernel.get_metadata()
        first = int("stacked" in known)  # layers
        last, shape, heads = first + self.contracted, self.kernel.shape, known["heads"]
        parts = [*known["spec"], *[None] * (len(shape) - len(known["spec"]))]
        of_input = heads is not None and heads < self.contracted
        of_output = heads is not None and not of_input
        stacked = {"stacked": True} if first else {}

        limit = math.prod(shape[first:last]) ** -0.5  # as the paper's code: He et al.'s, with a slope of sqrt(5)
        a = jax.random.uniform(rngs.params(), (*shape[:last], rank), jnp.float32, -limit, limit)
        b = jnp.zeros((*shape[:first], rank, *shape[last:]), jnp.float32)
        self.lora_a = nnx.Param(a, spec=P(*parts[:last]), heads=heads if of_input else None, **stacked)
        self.lora_b = nnx.Param(
            b,
            spec=P(*parts[:first], None, *parts[last:]),
            heads=heads - self.contracted + 1 if of_output else None,
            **stacked,
        )
        self.lora_scale = scale

    def product(self, x: jax.Array) -> jax.Array:
        """The product with the kernel, and with its adapter, without the bias."""
        x = x.astype(self.dtype)
        product = jnp.tensordot(x, self.kernel[...].astype(self.dtype), self.contracted)
        if not hasattr(self, "lora_a"):
            return product
        a, b = (factor[...].astype(self.dtype) for factor in (self.lora_a, self.lora_b))
        return product + self.lora_scale * jnp.tensordot(jnp.tensordot(x, a, self.contracted), b, 1)

    def biased(self, x: jax.Array) -> jax.Array:
        """Adds the bias, if there is one, to a finished product."""
        return x + self.bias[...].astype(self.dtype) if hasattr(self, "bias") else x


def merged(kernel: np.ndarray, lora_a: np.ndarray, lora_b: np.ndarray, scale: float) -> np.ndarray:
    """The kernel of one layer with its adapter in it, in its own shape; `scale` is `lora.alpha / lora.rank`."""
    return kernel + np.float32(scale) * np.tensordot(lora_a, lora_b, 1)


def is_frozen(parameter: nnx.Variable) -> bool:
    """Whether a parameter is not trained, which `freezing` decides."""
    return "frozen" in parameter.get_metadata()


def is_trained(_path: Any, parameter: nnx.Variable) -> bool:
    """The opposite, as a filter for `nnx.split`."""
    return not is_frozen(parameter)


Module = TypeVar("Module")


def whole(module: Module, dtype: str) -> Module:
    """The module, or a tuple, with each weight fetched that is sharded or on the host, in the compute dtype."""

    def gathered(variable: nnx.Variable) -> nnx.Variable:
        share = variable.get_metadata().get("share")
        if share is None:
            return variable
        fetch = fetched if is_frozen(variable) else whole_weight
        return variable.replace(checkpoint_name(fetch(variable[...], share, dtype), GATHERED), share=None)

    graphdef, state = nnx.split(module)
    return nnx.merge(graphdef, jax.tree.map(gathered, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)))


def drop(x_BpE: jax.Array, dropout: Dropout | None, site: int) -> jax.Array:
    """Applies dropout at one site of the model; the identity if `dropout` is None."""
    return x_BpE if dropout is None else dropout.at(site)(x_BpE)
