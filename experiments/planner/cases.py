"""The configs on which the planner's memory model is judged, as changes to `configs/base.py`."""

import itertools
import math
import random
from typing import Any

from configs import base
from lss_jax.config.schema import Config, ConfigError, from_dict
from lss_jax.parallel.mesh import AXES
from lss_jax.training.setup import validate

Case = dict[str, Any]  # config key to value
Sizes = tuple[int, int, int]  # data, seq, model

MODELS: dict[str, Case] = {
    "wide": {"model.layers": 4, "model.width": 1024, "model.heads": 16},
    "deep": {"model.layers": 24, "model.width": 256, "model.heads": 8},
    "enwik8": {"model.layers": 6, "model.width": 512, "model.heads": 8},
    "gqa": {"model.layers": 8, "model.width": 768, "model.heads": 16, "model.kv_heads": 8},
}
SEGMENTS = {"wide": (2048, 2), "deep": (2048, 1), "enwik8": (4096, 2), "gqa": (3072, 1)}  # tokens, sequences per device
STRATEGIES: dict[str, Case] = {  # LSS twice: what it saves for the backward pass differs
    "lss": {"attention.strategy": "lss"},
    "regather": {"attention.strategy": "lss", "attention.regather": True},
    "ring": {"attention.strategy": "ring"},
    "ulysses": {"attention.strategy": "ulysses"},
}
MESHES = ((1, 8, 1), (2, 4, 1), (1, 4, 2), (2, 2, 2), (1, 2, 4))
VARIANTS: tuple[Case, ...] = (
    {"model__dtype": "bfloat16"},
    {"attention__layout": "contiguous"},
    {"model__vocab": 32768},
    {"model__vocab": 32768, "model__tied_head": False, "model__positions": "rope"},
    {"optim__accumulate": 2},
    {"mesh__shard": "optimizer"},
    {"model__dropout": 0.1},
    {"data__separator": "a"},
    {"attention__window": 256},
    {"attention__head_groups": 2},
    {"model__layers": 48, "model__dtype": "bfloat16"},
    {"model__mlp_width": 512},
)


def config_of(case: Case) -> Config:
    """The typed config of a case."""
    values = base.get_config()
    values.update_from_flattened_dict(case)
    return from_dict(values)


def sizes_of(case: Case) -> Sizes:
    """The mesh of a case."""
    data, seq, model = (case[f"mesh.{axis}"] for axis in AXES)
    return data, seq, model


def on(mesh: Sizes) -> Case:
    """The config keys of a mesh."""
    return {f"mesh.{axis}": size for axis, size in zip(AXES, mesh, strict=True)}


def case(mesh: Sizes, model: str, strategy: str, **changes: Any) -> Case:
    """A model on a mesh with its usual segment; `model__remat="block"` changes `model.remat`."""
    length, rows = SEGMENTS[model]
    data, seq, parts = mesh
    return {
        **on(mesh),
        **MODELS[model],
        **STRATEGIES[strategy],
        "data.seq_len": length * seq * (2 if parts > 2 else 1),
        "data.batch_size": rows * data * changes.get("optim__accumulate", 1),
        **{key.replace("__", "."): value for key, value in changes.items()},
    }


def crossed() -> list[Case]:
    """Every strategy with every remat and mesh; models, dtypes and layouts alternate."""
    cases = []
    for number, (strategy, remat, mesh) in enumerate(itertools.product(STRATEGIES, ("block", "none"), MESHES)):
        dtype, layout = ("float32", "bfloat16")[number // 2 % 2], ("zigzag", "contiguous")[number // 3 % 2]
        model = list(MODELS)[number % len(MODELS)]
        cases.append(case(mesh, model, strategy, model__remat=remat, model__dtype=dtype, attention__layout=layout))
    return cases


def variants() -> list[Case]:
    """Changes to one config on a mesh without and with a model axis, and what the crossed cases leave out.

    These are the dense kernel, sequences that are not sharded, and segments of a few tokens.
    """
    both = ((1, 8, 1), (2, 2, 2))
    block = {"model__remat": "block"}
    cases = [case(mesh, "enwik8", "regather", **block, **change) for change in VARIANTS for mesh in both]
    vocab_parallel = {"model__vocab": 32768, "model__vocab_parallel": True}
    cases.append(case((2, 2, 2), "enwik8", "regather", **block, **vocab_parallel))
    for remat, mesh in itertools.product(("block", "none"), (*both, (8, 1, 1))):
        dense = case(mesh, "enwik8", "lss", model__remat=remat, attention__kernel="dense")
        cases.append({**dense, "data.seq_len": 1024 * mesh[1]})
    kinds = (("wide", "float32"), ("deep", "bfloat16"))
    for (model, dtype), mesh, remat in itertools.product(kinds, ((8, 1, 1), (1, 1, 8), (2, 1, 4)), ("block", "none")):
        changes = {"model__remat": remat, "model__dtype": dtype, "model__kv_heads": 8}
        cases.append(case(mesh, model, "lss", **changes))
    for length, strategy in itertools.product((64, 256), STRATEGIES):
        cases.append({**case((1, 8, 1), "wide", strategy, **block), "data.seq_len": 8 * length})
    return cases


def grouped() -> list[Case]:
    """LSS in 2, 4 and 8 groups of heads: on meshes of all axes, saved and re-gathered, narrow and wide, dense too."""
    block, narrow = {"model__remat": "block"}, {"model__dtype": "bfloat16"}
    cases = [case((1, 8, 1), "enwik8", "regather", **block, attention__head_groups=8)]
    for groups in (2, 4):
        split = {"attention__head_groups": groups}
        cases += [
            case((1, 8, 1), "enwik8", "lss", **block, **split),
            case((1, 8, 1), "gqa", "regather", **block, **narrow, **split),
            case((2, 4, 1), "wide", "regather", model__remat="none", **split),
            case((1, 4, 2), "gqa", "lss", model__remat="none", **narrow, **split),
            case((2, 2, 2), "wide", "regather", **block, **narrow, attention__layout="contiguous", **split),
            {**case((1, 8, 1), "enwik8", "lss", **block, attention__kernel="dense", **split), "data.seq_len": 8192},
        ]
    return cases


def large() -> list[Case]:
    """What makes room for large models: sharded weights, tiles, blocks recomputed whole, groups; alone and together."""
    llama: dict[str, Any] = {"model__norm": "rms", "model__mlp": "swiglu", "model__bias": False}
    llama |= {"model__tied_head": False, "model__positions": "rope"}
    together: dict[str, Any] = {"mesh__shard": "all", "model__tile": 256, "model__remat": "offload"}
    together["attention__head_groups"] = 2
    alone: list[dict[str, Any]] = [
        {"model__remat": "block", "mesh__shard": "all"},
        {"model__remat": "none", "mesh__shard": "all"},
        {"model__remat": "block", "model__tile": 256},
        {"model__remat": "offload"},
        {"model__remat": "offload", "model__remat_every": 2},
        {**together, "attention__regather": True},
        {"model__remat": "block", "mesh__shard": "all", "optim__offload": True},
        {**together, "attention__regather": True, "optim__offload": True},
    ]
    cases = [
        case(mesh, model, "lss", **llama, **changes)
        for mesh, model in (((1, 8, 1), "gqa"), ((2, 2, 2), "wide"))
        for changes in alone
    ]
    return [
        *cases,
        case((1, 8, 1), "gqa", "ulysses", **llama, **together, attention__regather=True, model__dtype="bfloat16"),
        case((2, 4, 1), "wide", "ring", **llama, **together),
    ]


def drawn(seed: int, count: int) -> list[Case]:
    """At most `count` random cases, the same for the same seed; those that break a rule are left out."""
    meshes = [(1, 16, 1), (1, 32, 1), (2, 8, 2), (1, 8, 4), (4, 8, 1), (1, 4, 8), (2, 2, 8), (1, 4, 1), (1, 1, 2)]
    meshes += [(1, 2, 1), (1, 1, 1)]
    draw = random.Random(seed)
    return [case for case in (_drawn(draw, meshes) for _ in range(count)) if _possible(case)]


def _possible(case: Case) -> bool:
    try:
        validate(config_of(case), math.prod(sizes_of(case)))
    except ConfigError:
        return False
    return True


def _drawn(draw: random.Random, meshes: list[Sizes]) -> Case:
    mesh = draw.choice(meshes)
    data, seq, parts = mesh
    head_width = draw.choice([64, 128])
    heads = draw.choice([32] if seq * parts > 16 else [16, 32])
    return {
        **on(mesh),
        **STRATEGIES[draw.choice(list(STRATEGIES))],
        "model.heads": heads,
        "model.layers": draw.choice([2, 4, 8, 16]),
        "model.width": heads * head_width if draw.random() < 0.5 else heads * 32,
        "model.kv_heads": draw.choice([heads, heads, heads // 2]),
        "model.vocab": draw.choice([256, 256, 8192]),
        "data.batch_size": data * draw.choice([1, 2]),
        "data.seq_len": seq * parts * draw.choice([256, 512, 2048]),
        "model.remat": draw.choice(["block", "block", "none"]),
        "model.dtype": draw.choice(["bfloat16", "float32"]),
        "model.positions": draw.choice(["learned", "rope"]),
        "attention.layout": draw.choice(["zigzag", "contiguous"]),
    }


def tpu_sample() -> list[Case]:
    """`configs/enwik8.py` with a change or two, for a compiler that takes longer."""

    def changed(mesh: Sizes, strategy: str = "regather", length: int = 32768, rows: int = 8, **changes: Any) -> Case:
        values = {"model__remat": "block", "model__dtype": "bfloat16", **changes}
        return {**case(mesh, "enwik8", strategy, **values), "data.seq_len": length, "data.batch_size": rows}

    return [
        changed((1, 8, 1)),
        changed((1, 8, 1), length=65536),
        changed((1, 8, 1), model__layers=12),
        changed((1, 8, 1), "ulysses"),
        changed((1, 8, 1), "lss", model__remat="none"),
        changed((2, 2, 2)),
        changed((1, 8, 1), "ring"),
        changed((1, 1, 8), "lss"),
        changed((1, 8, 1), model__dtype="float32"),
        changed((1, 4, 2), length=16384, attention__layout="contiguous"),
    ]


GRID = [*crossed(), *variants()]
SETS = {
    "grid": GRID,
    "grouped": grouped(),
    "large": large(),
    "drawn": drawn(seed=7, count=40),
    "drawn again": drawn(seed=8, count=25),
}
