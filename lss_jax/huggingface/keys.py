"""A model's `config.json` as keys of our config, and back; what one side cannot express is said by its key there."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lss_jax.attention.strategies import EXACT
from lss_jax.config.schema import Config, ConfigError, flat_keys
from lss_jax.huggingface.families import FAMILIES, Family
from lss_jax.models.rope import rope_of

# Their kinds of `rope_scaling`, each with its keys, ours of the same meaning, and the value if one is left out.
MANDATORY = object()
ROPE: dict[str, tuple[str, dict[str, tuple[str, Any]]]] = {
    "default": ("none", {}),
    "linear": ("linear", {"factor": ("rope_factor", MANDATORY)}),
    "yarn": (
        "yarn",
        {
            "factor": ("rope_factor", MANDATORY),
            "original_max_position_embeddings": ("rope_original", None),  # max_position_embeddings
            "beta_slow": ("rope_low", 1.0),
            "beta_fast": ("rope_high", 32.0),
            "attention_factor": ("rope_attention_factor", 0.0),
        },
    ),
    "llama3": (
        "llama3",
        {
            "factor": ("rope_factor", MANDATORY),
            "original_max_position_embeddings": ("rope_original", MANDATORY),
            "low_freq_factor": ("rope_low", MANDATORY),
            "high_freq_factor": ("rope_high", MANDATORY),
        },
    ),
}
ROPE_BUILT = {"truncate": True, "partial_rotary_factor": 1.0, "mscale": None, "mscale_all_dim": None}  # no other values
LONGEST = "max_position_embeddings"


def family_of(theirs: Mapping[str, Any], file: Path) -> str:
    """The family of a `config.json`.

    Raises:
      ConfigError: none that is known here.
    """
    known = {family.architecture: name for name, family in FAMILIES.items()}
    named = theirs.get("architectures") or [theirs.get("model_type")]
    for name in named:
        if name in known or name in FAMILIES:
            return known.get(name, name)
    raise ConfigError(
        f"{file}: architecture {named[0]!r} is not known; known are "
        + ", ".join(f"{family.architecture} ({name})" for name, family in FAMILIES.items())
    )


def our_keys(theirs: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """The keys of our config that a `config.json` settles, dotted, with their values.

    Raises:
      ConfigError: a key is missing, or asks for something that is not built here; one line per problem.
    """
    name = family_of(theirs, file)
    family, problems = FAMILIES[name], []
    for key, built in family.theirs.items():
        if key in theirs and theirs[key] != built:
            problems.append(f"{file}: {key}={theirs[key]!r} is not built here for {name}, only {built!r}")
    ours = dict(family.ours)
    for key, their_key in family.keys.items():
        if their_key not in theirs and their_key not in family.defaults:
            problems.append(f"{file} has no {their_key!r}, which says {key}; add it")
            continue
        ours[key] = value = theirs.get(their_key, family.defaults.get(their_key))
        if not (value is None and their_key in family.defaults) and not _is_possible(value, their_key):
            problems.append(f"{file}: {their_key}={value!r} cannot be {key}; it must be a number above 0, or a boolean")
    if problems:
        raise ConfigError("\n".join(problems))
    ours |= {"model.kv_heads": ours.get("model.kv_heads") or ours["model.heads"]}
    ours |= {"model.head_width": ours.get("model.head_width") or ours["model.width"] // ours["model.heads"]}
    ours |= {"model.mlp_width": ours["model.mlp_width"] or 4 * ours["model.width"]}
    ours |= {"attention.window": _window(theirs, family, file)}
    return ours | (_our_rope(theirs, file) if family.rotary else {})


def _is_possible(value: Any, their_key: str) -> bool:
    if their_key == "tie_word_embeddings":
        return isinstance(value, bool)
    kinds = (int, float) if their_key.endswith(("eps", "epsilon")) else (int,)
    return isinstance(value, kinds) and not isinstance(value, bool) and value > 0


def _window(theirs: Mapping[str, Any], family: Family, file: Path) -> int:
    """`attention.window`, which is that of all layers."""
    if not family.window or (family.window == "if used" and not theirs.get("use_sliding_window")):
        return 0
    width = theirs.get("sliding_window", family.defaults.get("sliding_window")) or 0
    layers, first = theirs["num_hidden_layers"], theirs.get("max_window_layers", 0) if family.window == "if used" else 0
    kinds = theirs.get("layer_types") or ["full_attention"] * first + ["sliding_attention"] * (layers - first)
    if width and len(set(kinds[:layers])) > 1:
        raise ConfigError(
            f"{file}: {kinds.count('sliding_attention')} of {layers} layers have sliding_window={width}, and the "
            f"others do not; here attention.window is one for all layers"
        )
    return width if kinds[0] == "sliding_attention" else 0


def _our_rope(theirs: Mapping[str, Any], file: Path) -> dict[str, Any]:
    found = theirs.get("rope_parameters") or {**(theirs.get("rope_scaling") or {})}
    base = found.get("rope_theta") or theirs.get("rope_theta") or 10_000.0
    kind = found.get("rope_type", found.get("type", "default"))
    if kind not in ROPE:
        raise ConfigError(f"{file}: rope_type={kind!r} is not known; known are {', '.join(map(repr, ROPE))}")
    scaling, keys = ROPE[kind]
    ours = {"model.rope_base": float(base), "model.rope_scaling": scaling}
    for key, built in ROPE_BUILT.items():
        if found.get(key, built) != built:
            raise ConfigError(f"{file}: {key}={found[key]!r} of rope_type={kind!r} is not built here, only {built!r}")
    for key, (our_key, default) in keys.items():
        value = found.get(key)
        value = value if value is not None else theirs.get(LONGEST) if default is None else default
        if value is MANDATORY or value is None:
            raise ConfigError(f"{file}: rope_type={kind!r} has no {key!r}; add it")
        ours[f"model.{our_key}"] = int(value) if our_key == "rope_original" else float(value)
    return ours


def expressing(config: Config, wanted: str | None, preferred: str | None = None) -> str:
    """The family that has models like the config's: `wanted`; or else the preferred, or the first of those that have.

    Raises:
      ConfigError: there is none, with the reasons of the wanted family, or of the one with the fewest.
    """
    names = [wanted] if wanted else sorted(FAMILIES, key=lambda name: name != preferred)
    reasons = {name: [*_reasons(config, name)] for name in names}
    nearest = min(reasons, key=lambda name: len(reasons[name]))
    if reasons[nearest]:
        families = wanted or f"any of {', '.join(FAMILIES)}; {nearest} comes nearest"
        raise ConfigError(f"this run's model is not one of {families}: {'; '.join(reasons[nearest])}")
    return nearest


def _reasons(config: Config, name: str) -> Iterator[str]:
    """Why a family has no model like the config's."""
    model, attention, family = config.model, config.attention, FAMILIES[name]
    values = flat_keys(config)
    fixed = dict(family.ours)
    if "model.kv_heads" not in family.keys:
        fixed |= {"model.kv_heads": model.heads}
    if "model.head_width" not in family.keys:
        fixed |= {"model.head_width": model.width // model.heads}
    for key, value in fixed.items():
        if values[key] != value:
            yield f"{key}={values[key]!r}, and {name} has {value!r}"
    if attention.window and not family.window:
        yield f"attention.window={attention.window}, and {name} has none"
    if attention.prefix:
        yield f"attention.prefix={attention.prefix}, and {name} is causal from the first token on"
    if attention.strategy not in EXACT:
        yield f"attention.strategy={attention.strategy!r}, and {name} has softmax attention"


def their_config(config: Config, name: str, imported: Mapping[str, Any] | None) -> dict[str, Any]:
    """The `config.json` of a family for the config's model; what is not said by ours is kept of the `imported` one."""
    family, values = FAMILIES[name], flat_keys(config)
    theirs = {**(imported or {}), "architectures": [family.architecture], "model_type": name}
    for dtype in ("dtype", "torch_dtype"):  # of the tensors that came in
        theirs.pop(dtype, None)
    theirs |= family.theirs
    theirs |= {their_key: values[key] for key, their_key in family.keys.items()}
    if family.window:
        theirs |= {"sliding_window": config.attention.window or None}
        theirs.pop("layer_types", None)  # follows from these
    if family.window == "if used":
        theirs |= {"use_sliding_window": bool(config.attention.window), "max_window_layers": 0}
    if family.rotary:
        theirs |= _their_rope(config)
        theirs[LONGEST] = max(config.data.seq_len, (imported or {}).get(LONGEST, 0))
        if config.model.rope_scaling == "yarn":  # transformers 4 divides this by the original length, for the factor
            theirs[LONGEST] = round(config.model.rope_factor * config.model.rope_original)
    return theirs


def _their_rope(config: Config) -> dict[str, Any]:
    """The keys of transformers 5, and of 4, which read `rope_theta` and `rope_scaling`."""
    model, rope = config.model, rope_of(config.model)
    base, scaling = model.rope_base, model.rope_scaling
    if scaling == "ntk":  # which is a larger base
        width = model.head_width
        base, scaling = float(rope.frequencies(width)[1] ** (-width / 2)), "none"
    kind, keys = next((kind, keys) for kind, (ours, keys) in ROPE.items() if ours == scaling)
    found = {key: getattr(model, our_key) for key, (our_key, _) in keys.items()}
    if "attention_factor" in found:
        found["attention_factor"] = rope.magnitude()
    parameters = {"rope_type": kind, **found}
    scaled = parameters if kind != "default" else None
    return {"rope_theta": base, "rope_scaling": scaled, "rope_parameters": {**parameters, "rope_theta": base}}
