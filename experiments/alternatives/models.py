"""What is compared: exact attention and its alternatives, as config keys, at equal parameters."""

from collections.abc import Callable
from typing import Any

import jax

from lss_jax import load_config
from lss_jax.config.schema import Config
from lss_jax.inspection import operations
from lss_jax.models import build_model, parameter_count
from lss_jax.parallel.mesh import make_mesh

EXACT, HIERARCHY = "exact", "hierarchy"
HIERARCHICAL = "hierarchical"  # the family
GLOBAL_TOKENS = 16
SEEN = 16  # a window is one so-manieth of the sequence
PATCH = 4
FEATURES = 2  # of Performer, for each number of a query


def keys_of(model: str, file: str, keys: dict[str, Any]) -> dict[str, Any]:
    """The config keys of the model with this name, given those of exact attention.

    Raises:
      KeyError: there is no such model.
    """
    config = load_config(file, keys)
    window = {"attention.window": max(32, config.data.seq_len // SEEN)}
    far = {"attention.strategy": "longformer", "attention.layout": "contiguous"}
    features = {"attention.features": FEATURES * config.model.head_width}
    of_models: dict[str, Callable[[], dict[str, Any]]] = {
        EXACT: lambda: {},
        "window": lambda: window,
        "window, global tokens": lambda: {**far, **window, "attention.global_tokens": GLOBAL_TOKENS},
        "linear": lambda: {"attention.strategy": "linear"},
        "Performer": lambda: {"attention.strategy": "performer", **features},
        HIERARCHY: lambda: _hierarchy(file, keys),
    }
    return {**keys, **of_models[model]()}


MODELS = (EXACT, "window", "window, global tokens", "linear", "Performer", HIERARCHY)


def _hierarchy(file: str, keys: dict[str, Any]) -> dict[str, Any]:
    """Half of the layers over patches, half within them, which are as wide as it takes for as many parameters."""
    model = load_config(file, keys).model
    layers, step = max(model.layers // 2, 1), 2 * model.heads
    halves = {"model.family": HIERARCHICAL, "model.patch": PATCH, "model.layers": layers, "model.local_layers": layers}
    sizes = [{**halves, "model.local_width": width} for width in range(step, 2 * model.width, step)]
    wanted = parameters(load_config(file, keys))
    return min(sizes, key=lambda size: abs(parameters(load_config(file, {**keys, **size})) - wanted))


def parameters(config: Config) -> int:
    """The number of parameters of a config's model."""
    return parameter_count(build_model(config))


def operations_of(config: Config) -> int:
    """The floating-point operations of a training step on one device, counted."""
    mesh = make_mesh((1, 1, 1), jax.devices()[:1])
    model = build_model(config, mesh)
    return operations.outside_attention(model, mesh) + operations.attention(model, mesh)
