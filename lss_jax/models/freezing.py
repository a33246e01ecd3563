"""Which parameters are trained: all but those whose names match a pattern of `optim.frozen`.

A frozen parameter has no gradient and no moments. With adapters and no pattern all but the adapters are frozen, as in
LoRA; with a pattern, what it matches.
"""

from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Any

from flax import nnx

from lss_jax.config.schema import Config, ConfigError
from lss_jax.models.adapters import patterns_of
from lss_jax.models.layers import ADAPTER


def freeze(module: nnx.Module, config: Config) -> None:
    """Marks the parameters of an abstract module that are not trained.

    Raises:
      ConfigError: a pattern matches no parameter, or all together match every one; one line per problem.
    """
    parameters = {name_of(path): leaf for path, leaf in nnx.iter_graph(module) if isinstance(leaf, nnx.Param)}
    frozen = _frozen(config, list(parameters))
    problems = list(_problems(config.optim.frozen, list(parameters), frozen))
    if problems:
        raise ConfigError("\n".join(problems))
    for name in frozen:
        parameters[name].set_metadata(frozen=True)


def name_of(path: Iterable[Any]) -> str:
    """The name of the parameter at a path, such as `stack/blocks/mlp/up/kernel`."""
    return "/".join(map(str, path))


def _frozen(config: Config, names: list[str]) -> set[str]:
    patterns = patterns_of(config.optim.frozen)
    if config.lora.rank and not patterns:
        return {name for name in names if name.rpartition("/")[2] not in ADAPTER}
    return {name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)}


def _problems(patterns: str, names: list[str], frozen: set[str]) -> Iterator[str]:
    for pattern in patterns_of(patterns):
        if not any(fnmatchcase(name, pattern) for name in names):
            yield f"optim.frozen={pattern!r} matches no parameter; the names are {', '.join(sorted(names))}"
    if len(frozen) == len(names):
        yield f"optim.frozen={patterns!r} leaves no parameter to train; leave out a pattern"
