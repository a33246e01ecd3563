"""What the strategies share: the static side of attention, and names for what they leave to the backward pass."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from lss_jax.config import AttentionConfig, Config, ConfigError
from lss_jax.layout import Layout
from lss_jax.mesh import DATA, MODEL, SEQ, if_cut, make_mesh
from lss_jax.rules import validate

COMMUNICATED = "attention_communicated"  # keys and values from other devices: kept, or moved again on the way back
FUSED = {"triton": "NVIDIA GPUs of compute capability 8.0 or more", "mosaic": "TPUs"}  # kernels for some devices alone
ATTENDED = "attention_rows"  # rows and their log-sum-exp: with these kept, no score is computed again but in blocks


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is known of attention at compile time.

    `axis` is the mesh axis that cuts the sequence, None if nothing does.
    """

    axis: str | None
    layout: Layout
    kernel: str
    block_queries: int
    block_keys: int
    gather_groups: int
    regather: bool
    interpret: bool  # fused kernels step by step, as on CPUs

    @property
    def uncut(self) -> "Setting":
        """The same for whole sequences in natural order, as a device has them after an exchange of heads."""
        return dataclasses.replace(self, axis=None, layout=Layout("contiguous", 1))


def mesh_of(config: Config, devices: Sequence[jax.Device]) -> Mesh:
    """The mesh that a config asks for, made of these devices.

    Raises:
      ConfigError: the config does not fit them, or names a kernel for others.
    """
    mesh = make_mesh(validate(config, len(devices)), devices)
    kernel_on(config.attention, mesh)
    return mesh


def layout_on(config: Config, mesh: Mesh | AbstractMesh) -> Layout:
    """The token order of a config on this mesh."""
    return Layout(config.attention.layout, mesh.shape[SEQ], mesh.shape[MODEL])


def setting_on(config: Config, mesh: Mesh | AbstractMesh) -> Setting:
    """The static side of a config's attention on this mesh."""
    return setting_of(config.attention, layout_on(config, mesh), if_cut(SEQ, mesh), mesh)


def setting_of(attention: AttentionConfig, layout: Layout, axis: str | None, mesh: Mesh | AbstractMesh) -> Setting:
    """The same, where `axis` (None if it has one device) cuts the sequence into the segments of `layout`."""
    return Setting(
        axis=axis,
        layout=layout,
        kernel=kernel_on(attention, mesh),
        block_queries=attention.block_queries,
        block_keys=attention.block_keys,
        gather_groups=attention.gather_groups,
        regather=attention.regather,
        interpret=False,
    )


def kernel_on(attention: AttentionConfig, mesh: Mesh | AbstractMesh) -> str:
    """The kernel on this mesh; for "auto" the fused one, where the devices and the strategy can use it.

    Raises:
      ConfigError: the config names a kernel for other devices.
    """
    asked, fused = attention.kernel, fused_on(mesh)
    if asked == "auto":
        return fused if fused and attention.strategy != "ring" else "blockwise"
    if asked in FUSED and asked != fused:
        raise ConfigError(
            f"attention.kernel={asked!r} is for {FUSED[asked]}, and these devices are "
            f"{'abstract' if isinstance(mesh, AbstractMesh) else mesh.devices.flat[0].device_kind}; "
            f'use attention.kernel="auto"'
        )
    return asked


def fused_on(mesh: Mesh | AbstractMesh) -> str | None:
    """The fused kernel that is compiled for the devices of this mesh."""
    device = None if isinstance(mesh, AbstractMesh) else mesh.devices.flat[0]
    if device is None or device.platform not in ("gpu", "tpu"):
        return None
    if device.platform == "tpu":
        return "mosaic"
    capability = getattr(device, "compute_capability", "0")  # NVIDIA's alone have one that is a number
    return "triton" if capability.replace(".", "").isdigit() and float(capability) >= 8.0 else None


def stacked(k_BlGK: jax.Array, v_BlGK: jax.Array) -> jax.Array:
    """The pair as one array for one collective, in the kernels' order: `kv_2BGlK`."""
    return jnp.stack((k_BlGK, v_BlGK)).swapaxes(2, 3)


def after(done: jax.Array, x: jax.Array) -> jax.Array:
    """`x`, but not before `done` has been computed.

    No number is greater than infinity, but XLA does not know it. (On CPU it forgets `optimization_barrier` before it
    decides on an order.)
    """
    never = done[(0,) * done.ndim] > jnp.inf
    return jnp.where(never, 0, x)


class Traffic(NamedTuple):
    """A collective that a strategy asks for, per layer and microbatch, as the compiled program should show it."""

    kind: str  # as XLA calls it
    times: int
    elements: int  # of its result on one device
    itemsize: int

    @property
    def bytes(self) -> int:
        """Of its result on one device."""
        return self.elements * self.itemsize


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of one call of attention on one device: `l` is the (padded) segment, `itemsize` that of the compute dtype."""

    B: int
    l: int
    H: int
    G: int
    K: int
    itemsize: int

    @property
    def pair(self) -> int:
        """Numbers in this segment's keys and values."""
        return 2 * self.B * self.l * self.G * self.K


def sizes_of(config: Config, mesh: Mesh | AbstractMesh) -> Sizes:
    """Of one call of attention on one device."""
    layout = layout_on(config, mesh)
    return Sizes(
        B=config.data.batch_size // mesh.shape[DATA] // config.optim.accumulate,
        l=layout.padded(config.data.seq_len) // layout.devices,
        H=config.model.heads // layout.parts,
        G=config.model.kv_heads // layout.parts,
        K=config.model.width // config.model.heads,
        itemsize=2 if config.model.dtype == "bfloat16" else 4,
    )
