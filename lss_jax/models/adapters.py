"""Low-rank adapters (LoRA; Hu et al. 2021, arXiv 2106.09685): which linear maps have one."""

from fnmatch import fnmatchcase

from flax import nnx

from lss_jax.config.schema import ConfigError, LoraConfig
from lss_jax.models.layers import Linear


def add_adapters(module: nnx.Module, config: LoraConfig, rngs: nnx.Rngs) -> None:
    """Adds an adapter to each linear map that `config.targets` names.

    Raises:
      ConfigError: a pattern matches no linear map, or there is none; one line per problem.
    """
    linears = {path: node for path, node in nnx.iter_graph(module) if isinstance(node, Linear)}
    patterns = patterns_of(config.targets)
    names = ", ".join(dict.fromkeys(map(_shown, sorted(linears)))) or "none"
    problems = [
        f"lora.targets={pattern!r} matches no linear map; there are {names}"
        for pattern in patterns or [""]
        if not any(_matches(path, pattern) for path in linears)
    ]
    if problems:
        raise ConfigError("\n".join(problems))
    for path, linear in linears.items():
        if any(_matches(path, pattern) for pattern in patterns):
            linear.adapt(config.rank, config.alpha / config.rank, rngs)


def patterns_of(text: str) -> list[str]:
    """The patterns of a list with commas between them."""
    return [pattern for pattern in map(str.strip, text.split(",")) if pattern]


def _shown(path: tuple) -> str:
    """The name of a linear map as patterns know it: `attention/query`."""
    return "/".join(map(str, path[-2:]))


def _matches(path: tuple, pattern: str) -> bool:
    """Whether a pattern matches a linear map's name, `attention/query`, or its last part."""
    return fnmatchcase(_shown(path), pattern) or fnmatchcase(str(path[-1]), pattern)
