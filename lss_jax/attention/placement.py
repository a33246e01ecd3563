"""Where attention runs: the kernel for a mesh, and the setting that this and a config give."""

import dataclasses

from jax.sharding import AbstractMesh, Mesh

from lss_jax.attention.mask import MaskKind
from lss_jax.attention.setting import SELF, Approximation, Between, Reach, Setting, reach_of
from lss_jax.attention.strategies import STRATEGIES
from lss_jax.config.schema import AttentionConfig, Config, ConfigError
from lss_jax.parallel.layout import Layout, layout_on
from lss_jax.parallel.mesh import SEQ, axis_if_sharded

FUSED = {"triton": "NVIDIA GPUs of compute capability 8.0 or more", "mosaic": "TPUs"}  # kernels for some devices alone


def setting_on(
    config: Config, mesh: Mesh | AbstractMesh, between: Between = SELF, seen: MaskKind | None = None
) -> Setting:
    """The static side of a config's attention on this mesh.

    `seen` is the kind of the task's mask, which strategies that are not exact have to know; to others it tells how far
    a query sees.
    """
    attention, (layout, key_layout) = config.attention, (layout_on(config, mesh, sequence) for sequence in between)
    setting = setting_of(attention, layout, axis_if_sharded(SEQ, mesh), mesh)
    told = Approximation(seen, attention.window, attention.global_tokens, attention.features, config.seed)
    if not STRATEGIES[attention.strategy].exact:
        return dataclasses.replace(setting, key_layout=key_layout, approximation=told)
    reach = _reach(seen) if between == SELF else None
    return dataclasses.replace(setting, key_layout=key_layout, reach=reach)


def _reach(seen: MaskKind | None) -> Reach | None:
    """How far a task's masks show keys, if they have a window; tokens of a prefix see one another at any distance."""
    return reach_of(seen.window, causal=seen.causal) if seen and seen.window and not seen.prefix else None


def setting_of(attention: AttentionConfig, layout: Layout, axis: str | None, mesh: Mesh | AbstractMesh) -> Setting:
    """That of self-attention, where `axis` (None if it has one device) shards the sequence into `layout`'s segments."""
    return Setting(
        axis=axis,
        layout=layout,
        key_layout=layout,
        kernel=kernel_on(attention, mesh),
        block_queries=attention.block_queries,
        block_keys=attention.block_keys,
        regather=attention.regather,
        interpret=False,
        approximation=None,
    )


def kernel_on(attention: AttentionConfig, mesh: Mesh | AbstractMesh) -> str:
    """The kernel on this mesh; for "auto" the fused one, where the devices and the strategy can use it.

    Raises:
      ConfigError: the config names a kernel for other devices.
    """
    asked, fused = attention.kernel, fused_on(mesh)
    if asked == "auto":
        return fused if fused in STRATEGIES[attention.strategy].kernels else "blockwise"
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
