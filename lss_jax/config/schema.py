"""The typed config; every default lives in `configs/base.py`, every rule in `rules.py`."""

import dataclasses
import difflib
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal


class ConfigError(ValueError):
    """A user's input that cannot work: one line per problem, each with the values, the rule and the remedy."""


class RunError(RuntimeError):
    """An error that ends a run although its config is right: what happened, what is safe, what to do."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    data: int
    seq: int
    model: int
    shard: Literal["none", "optimizer", "all"]


@dataclasses.dataclass(frozen=True)
class MaskingConfig:
    rate: float
    random: float
    kept: float


@dataclasses.dataclass(frozen=True)
class LabelsConfig:
    names: str
    weights: tuple[float, ...]

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes."""
        return tuple(name.strip() for name in self.names.split(",")) if self.names else ()


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    strategy: str  # one of `attention.strategies.STRATEGIES`
    layout: Literal["contiguous", "zigzag"]
    source_layout: Literal["contiguous", "zigzag"]
    window: int
    prefix: int
    kernel: Literal["auto", "blockwise", "dense", "triton", "mosaic"]
    block_queries: int
    block_keys: int
    head_groups: int
    regather: bool
    global_tokens: int
    features: int


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    family: str
    vocab: int
    layers: int
    encoder_layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int  # never 0 here, unless heads are
    mlp_width: int
    norm: Literal["layer", "rms"]
    norm_epsilon: float
    qk_norm: bool
    mlp: Literal["gelu", "swiglu"]
    bias: bool
    qkv_bias: bool
    positions: Literal["learned", "sinusoidal", "rope", "none"]
    rope_base: float
    rope_scaling: Literal["none", "linear", "ntk", "yarn", "llama3"]
    rope_factor: float
    rope_original: int
    rope_low: float
    rope_high: float
    rope_attention_factor: float
    rope_columns: int
    classes: int
    pooling: Literal["none", "mean"]
    patch: int
    local_layers: int
    local_width: int
    tied_head: bool
    vocab_parallel: bool
    dropout: float
    dtype: Literal["float32", "bfloat16"]
    remat: Literal["none", "block", "input", "offload"]
    remat_every: int
    tile: int
    scan_layers: bool

    def __post_init__(self):
        if self.head_width == 0 and self.heads > 0:
            object.__setattr__(self, "head_width", self.width // self.heads)


def parts_of(path: str) -> list[str]:
    """The comma-separated parts of a path."""
    return [part.strip() for part in path.split(",")]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    source: Literal["stdlib", "enwik8", "text", "aclsum", "fasta", "copy", "reverse", "mri", "mosaics", "images"]
    path: str
    valid_path: str
    test_path: str
    annotation: str
    reverse_complement: bool
    tokenizer: str
    weights: tuple[float, ...]
    separator: str
    field: str
    prompt_field: str
    answer_field: str
    symbols: int
    pack: bool
    restart_positions: bool
    patch: int
    downsample: int
    grid: int
    seq_len: int
    source_len: int
    batch_size: int

    @property
    def parts(self) -> list[str]:
        """The comma-separated parts of `path`, each of which is a source."""
        return parts_of(self.path)

    @property
    def pixels(self) -> int:
        """The number of pixels in a token of an image."""
        return max(self.patch, 1) ** 2


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    name: Literal["adamw", "lion", "muon"]
    moments_dtype: Literal["float32", "bfloat16"]
    offload: bool
    steps: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    clip_norm: float
    beta1: float
    beta2: float
    accumulate: int
    max_skipped: int
    frozen: str  # patterns of parameters' names; see `models.freezing`


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    rank: int
    alpha: float
    targets: str  # patterns of linear maps' names; see `models.adapters`


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    start: int
    steps: int


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int
    task: str
    start_from: str
    mesh: MeshConfig
    masking: MaskingConfig
    labels: LabelsConfig
    attention: AttentionConfig
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig
    lora: LoraConfig
    profile: ProfileConfig
    eval_every: int
    eval_batches: int
    sample_prompt: str
    checkpoint_every: int
    checkpoints_kept: int
    log_every: int
    heartbeat_timeout: int


Section = typing.TypeVar("Section")


def from_dict(values: Mapping[str, Any]) -> Config:
    """The typed config of a nested mapping (an `ml_collections.ConfigDict`, or parsed JSON).

    Raises:
      ConfigError: an unknown or missing key, or a value of the wrong type or outside its choices.
    """
    return typed(Config, values)


def typed(kind: type[Section], values: Mapping[str, Any]) -> Section:
    """The typed form of one section, from a mapping of its own keys.

    Raises:
      ConfigError: as `from_dict`.
    """
    problems: list[str] = []
    section = _build(kind, values, "", problems)
    if problems:
        raise ConfigError("\n".join(problems))
    return section


def unknown_key(key: str, known: list[str]) -> str:
    """The error for a dotted `key` that is not among the `known` ones, with the nearest of them."""
    if any(name.startswith(f"{key}.") for name in known):
        return f"config key {key!r} is a group of keys; set {key}.NAME instead"
    by_leaf = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    near = next(iter(difflib.get_close_matches(key, known, n=1) or by_leaf), None)
    return f"unknown config key {key!r}; " + (f"did you mean {near!r}?" if near else f"known: {', '.join(known)}")


def unknown_choice(key: str, value: Any, choices: Iterable[str]) -> str:
    """What to say of a value of `key` that is not among its `choices`."""
    return f"{key}={value!r} is not known; choose one of {', '.join(map(repr, choices))}"


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """All leaves of a nested mapping under their dotted names."""
    leaves: dict[str, Any] = {}
    for name, value in values.items():
        leaves |= flat(value, f"{prefix}{name}.") if hasattr(value, "items") else {prefix + name: value}
    return leaves


def flat_keys(config: Config) -> dict[str, Any]:
    """All keys of a config, dotted, with their values."""
    return flat(dataclasses.asdict(config))


def _build(cls: type, values: Mapping[str, Any], prefix: str, problems: list[str]) -> Any:
    kinds = typing.get_type_hints(cls)
    problems += [unknown_key(prefix + k, [prefix + n for n in kinds]) for k in values if k not in kinds]
    fields = {}
    for name, kind in kinds.items():
        key = prefix + name
        if name not in values:
            problems.append(f"config key {key!r} is missing; start from configs/base.py, which has every key")
        elif dataclasses.is_dataclass(kind):
            if hasattr(values[name], "items"):
                fields[name] = _build(typing.cast(type, kind), values[name], f"{key}.", problems)
            else:
                problems.append(f"{key}={values[name]!r} is not a group of keys; set {key}.NAME instead")
        else:
            fields[name] = _leaf(kind, values[name], key, problems)
    return None if problems else cls(**fields)


def _leaf(kind: Any, value: Any, key: str, problems: list[str]) -> Any:
    if typing.get_origin(kind) is tuple:
        return _numbers(value, key, problems)
    choices = typing.get_args(kind)
    if choices:
        if value not in choices:
            problems.append(unknown_choice(key, value, choices))
        return value
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        problems.append(f"{key}={value!r} is of type {type(value).__name__}; give a value of type {kind.__name__}")
    return value


def _numbers(value: Any, key: str, problems: list[str]) -> tuple[float, ...]:
    """A tuple of numbers; saved as JSON it has become a list."""
    if isinstance(value, tuple | list) and all(type(number) in (int, float) for number in value):
        return tuple(map(float, value))
    problems.append(f"{key}={value!r} is no tuple of numbers; write (0.7, 0.3), or () for none")
    return ()


def gather_problems(*checks: Callable[[], object]) -> None:
    """Runs all checks and reports the problems of all at once.

    Raises:
      ConfigError: the problems of all checks, in their order.
    """
    found = []
    for check in checks:
        try:
            check()
        except ConfigError as error:
            found.append(str(error))
    if found:
        raise ConfigError("\n".join(found))


def changes(saved: Config, config: Config) -> dict[str, tuple[Any, Any]]:
    """The keys that differ between the saved config of a run and its new one, each to (then, now)."""
    before, after = flat_keys(saved), flat_keys(config)
    return {key: (before[key], after[key]) for key in after if before[key] != after[key]}


def with_value(config: Config, key: str, value: Any) -> Config:
    """The config with the value of one dotted key replaced."""
    section, _, name = key.rpartition(".")
    if not section:
        return dataclasses.replace(config, **{name: value})
    inner = dataclasses.replace(getattr(config, section), **{name: value})
    changed: dict[str, Any] = {section: inner}
    return dataclasses.replace(config, **changed)
