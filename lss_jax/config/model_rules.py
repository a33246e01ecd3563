"""The rules for positions that rotate, and for layers that are recomputed."""

from collections.abc import Iterator

from lss_jax.config.schema import ModelConfig


def rope_problems(model: ModelConfig) -> Iterator[str]:
    scaling = model.rope_scaling
    if scaling == "none" and model.rope_factor != 1.0:
        yield (
            f'model.rope_factor={model.rope_factor} has no use with model.rope_scaling="none"; '
            f'use "linear", "ntk", "yarn" or "llama3", or model.rope_factor=1.0'
        )
    if scaling != "none" and model.positions != "rope":
        yield (
            f"model.rope_scaling={scaling!r} has no use with model.positions={model.positions!r}; "
            f'use model.positions="rope" or model.rope_scaling="none"'
        )
    if scaling in ("yarn", "llama3") and model.rope_original == 0:
        yield (
            f"model.rope_scaling={scaling!r} needs model.rope_original, the tokens of the context that is extended "
            f"model.rope_factor={model.rope_factor} times; set that"
        )
    if scaling == "yarn" and 0 < model.rope_base <= 1:
        yield f'model.rope_base={model.rope_base} must be greater than 1 for model.rope_scaling="yarn"'
    if scaling in ("yarn", "llama3") and not model.rope_low < model.rope_high < float("inf"):
        yield (
            f"model.rope_high={model.rope_high} must be finite and greater than model.rope_low={model.rope_low}; "
            f"usual are 1 and 32 for yarn, 1 and 4 for llama3"
        )


def remat_problems(model: ModelConfig) -> Iterator[str]:
    every = model.remat_every
    if every > 1 and model.remat in ("none", "block"):
        yield (
            f"model.remat_every={every} has no use with model.remat={model.remat!r}, which saves something of every "
            f'layer; use model.remat="input", "offload" or model.remat_every=1'
        )
    else:
        yield from indivisible_layers("model.layers", model.layers, every)


def indivisible_layers(key: str, layers: int, every: int) -> Iterator[str]:
    """Whether layers are no whole groups of `model.remat_every`."""
    if every > 0 and layers > 0 and layers % every:
        yield f"{key}={layers} is not divisible by model.remat_every={every}; use a divisor of {layers}"
