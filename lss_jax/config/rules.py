"""The rules that a config must keep, each with the values that break it and the remedy; strategies have their own."""

from collections.abc import Iterator, Mapping

from lss_jax.config.genome_rules import FASTA, genome_problems
from lss_jax.config.image_rules import image_problems
from lss_jax.config.model_rules import remat_problems, rope_problems
from lss_jax.config.schema import (
    AttentionConfig,
    Config,
    ConfigError,
    DataConfig,
    MeshConfig,
    OptimConfig,
    parts_of,
)
from lss_jax.config.splits import held_out_problems, papers_problems

MeshSizes = tuple[int, int, int]
WITHOUT_FILES = ("stdlib", "aclsum", "copy", "reverse")  # sources that have no path
LARGEST_BETA2 = 0.99  # of moments in bfloat16: what changes by less than 2**-8 stays as it is


def mesh_sizes(mesh: MeshConfig, device_count: int) -> MeshSizes:
    """Sizes (data, seq, model) over `device_count` devices; -1 fills one axis.

    Raises:
      ConfigError: a size is out of range, or the product of the sizes is not the number of devices.
    """
    sizes = [mesh.data, mesh.seq, mesh.model]
    shown = f"mesh.data={mesh.data}, mesh.seq={mesh.seq}, mesh.model={mesh.model}"
    if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
        raise ConfigError(f"{shown}: each size must be at least 1, and at most one may be -1 (fill the rest)")
    fixed = 1
    for size in sizes:
        fixed *= size if size != -1 else 1
    if -1 in sizes and device_count % fixed == 0:
        sizes[sizes.index(-1)] = device_count // fixed
    elif -1 in sizes or fixed != device_count:
        raise ConfigError(
            f"{shown} needs {'a multiple of ' if -1 in sizes else ''}{fixed} devices, but {device_count} are found; "
            f"change the mesh (-1 fills an axis), or simulate them on the CPU with "
            f"JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES={fixed}"
        )
    return sizes[0], sizes[1], sizes[2]


def problems(config: Config, device_count: int) -> tuple[list[str], MeshSizes | None]:
    """What is wrong with a config whatever its strategy, a line each; and the mesh sizes, None if these are wrong."""
    found = [*_out_of_range(config), *_cross_field(config)]
    try:
        sizes = mesh_sizes(config.mesh, device_count)
    except ConfigError as error:
        return [str(error), *found], None
    return [*found, *_mesh_problems(config, sizes)], sizes


def _out_of_range(config: Config) -> Iterator[str]:
    model, data, optim, attention = config.model, config.data, config.optim, config.attention
    at_least_1 = {
        **{
            f"model.{k}": getattr(model, k)
            for k in ("vocab", "layers", "encoder_layers", "width", "heads", "kv_heads", "mlp_width", "remat_every")
        },
        **{
            f"data.{k}": getattr(data, k)
            for k in ("seq_len", "source_len", "symbols", "batch_size", "downsample", "grid")
        },
        **{f"optim.{k}": getattr(optim, k) for k in ("steps", "accumulate", "max_skipped")},
        **{f"attention.{k}": getattr(attention, k) for k in ("block_queries", "block_keys", "head_groups")},
        "profile.start": config.profile.start,
        **{k: getattr(config, k) for k in ("checkpoint_every", "checkpoints_kept", "log_every", "eval_batches")},
    }
    for key, default in (("model.encoder_layers", "model.layers"), ("data.source_len", "data.seq_len")):
        if at_least_1[key] == at_least_1[default]:  # which it is by default, and the error is the other's
            del at_least_1[key]
    yield from less_than_1(at_least_1)
    if config.heartbeat_timeout < 10:
        yield f"heartbeat_timeout={config.heartbeat_timeout} must be at least 10 s, or busy processes count as lost"
    at_least_0 = {
        "seed": config.seed,
        "eval_every": config.eval_every,
        "profile.steps": config.profile.steps,
        "model.head_width": model.head_width,
        "model.classes": model.classes,
        "model.tile": model.tile,
        "model.patch": model.patch,
        "model.local_layers": model.local_layers,
        "model.local_width": model.local_width,
        "model.rope_original": model.rope_original,
        "model.rope_attention_factor": model.rope_attention_factor,
        "model.rope_columns": model.rope_columns,
        "data.patch": data.patch,
        "attention.window": attention.window,
        "attention.prefix": attention.prefix,
        "attention.global_tokens": attention.global_tokens,
        "attention.features": attention.features,
        "optim.warmup_steps": optim.warmup_steps,
        "optim.weight_decay": optim.weight_decay,
        "lora.rank": config.lora.rank,
    }
    if config.seed >= 2**32:
        yield f"seed={config.seed} must be less than 2**32"
    for key, number in at_least_0.items():
        if not 0 <= number < float("inf"):
            yield f"{key}={number} must be at least 0 and finite"
    above_0 = {f"optim.{k}": getattr(optim, k) for k in ("learning_rate", "clip_norm")}
    above_0 |= {f"model.{k}": getattr(model, k) for k in ("norm_epsilon", "rope_base", "rope_factor", "rope_low")}
    above_0 |= {"lora.alpha": config.lora.alpha}
    for key, number in above_0.items():
        if not 0 < number < float("inf"):
            yield f"{key}={number} must be greater than 0 and finite"
    masking = config.masking
    if not (0 < masking.rate < 1 and masking.random >= 0 and masking.kept >= 0 and masking.random + masking.kept <= 1):
        yield (
            f"masking.rate={masking.rate} must be between 0 and 1, and masking.random={masking.random} and "
            f"masking.kept={masking.kept} at least 0, and at most 1 together; usual are 0.15, 0.1 and 0.1"
        )
    below_1 = {"optim.beta1": optim.beta1, "optim.beta2": optim.beta2, "model.dropout": model.dropout}
    for key, number in below_1.items():
        if not 0 <= number < 1:
            yield f"{key}={number} must be at least 0 and less than 1"


def less_than_1(values: Mapping[str, int]) -> Iterator[str]:
    """Errors for counts below 1, by their keys."""
    yield from (f"{key}={value} must be at least 1" for key, value in values.items() if value < 1)


def _cross_field(config: Config) -> Iterator[str]:
    model, data, optim = config.model, config.data, config.optim
    if model.heads > 0 and model.width % model.heads and model.head_width == model.width // model.heads:
        yield (
            f"model.width={model.width} is not divisible by model.heads={model.heads}; use model.width="
            f"{next_multiple(model.width, model.heads)}, another number of heads, or a model.head_width of its own"
        )
    elif model.head_width % 2 and model.positions == "rope":
        yield (
            f"the head width model.head_width={model.head_width} is odd, but rope rotates pairs; "
            f'use an even head width or model.positions="learned"'
        )
    yield from rope_problems(model)
    if 0.99 < model.dropout < 1:
        yield f"model.dropout={model.dropout} leaves next to nothing; use at most 0.99"
    yield from remat_problems(model)
    yield from _moments_problems(optim)
    yield from attention_problems(config.attention, model.heads, model.kv_heads)
    if config.attention.prefix >= data.seq_len > 0 and config.attention.prefix:
        yield (
            f"attention.prefix={config.attention.prefix} leaves nothing to predict of data.seq_len={data.seq_len}; "
            f"use a shorter prefix"
        )
    if optim.warmup_steps > optim.steps > 0:
        yield (
            f"optim.warmup_steps={optim.warmup_steps} is more than optim.steps={optim.steps}; "
            f"warm up for at most {optim.steps} steps"
        )
    if config.profile.steps > 0 and config.profile.start > optim.steps > 0:
        yield (
            f"profile.start={config.profile.start} is beyond the last step, optim.steps={optim.steps}; trace from an "
            f"earlier step on, or set profile.steps=0 to trace none"
        )
    if data.restart_positions and model.positions == "none":
        yield 'data.restart_positions=True has no use with model.positions="none"; use another, or False'
    yield from _data_problems(data)
    yield from image_problems(config)


def _data_problems(data: DataConfig) -> Iterator[str]:
    yield from genome_problems(data)
    if data.source == "text" and not data.path:
        yield 'data.source="text" needs a file; give data.path, or use data.source="stdlib", which needs none'
    for key in ("path", "valid_path", "test_path"):
        path = getattr(data, key)
        if data.source in ("text", FASTA) and path and "" in parts_of(path):
            yield f"data.{key}={path!r} has an empty part between commas; give a file, folder or glob in each"
    yield from held_out_problems(data)
    yield from papers_problems(data)
    if data.source in WITHOUT_FILES and data.path:
        yield f'data.path={data.path!r} has no use with data.source="{data.source}"; use data.source="text"'
    if not data.tokenizer:
        yield 'data.tokenizer="" names no tokenizer; use "bytes", or the path of a tokenizer.json'
    if bool(data.prompt_field) != bool(data.answer_field):
        yield (
            f"data.prompt_field={data.prompt_field!r} and data.answer_field={data.answer_field!r} go together; name "
            f"both fields, or none and data.field"
        )
    if data.weights and data.source not in ("text", FASTA):
        yield f"data.weights={data.weights} has no use with data.source={data.source!r}, which is one; use ()"
    elif data.weights and len(data.weights) != len(data.parts):
        yield (
            f"data.weights={data.weights} are {len(data.weights)} numbers, but data.path={data.path!r} has "
            f"{len(data.parts)} sources; give a weight to each comma-separated part, or () to draw by size"
        )
    if not all(0 < weight < float("inf") for weight in data.weights):
        yield f"data.weights={data.weights} must each be greater than 0 and finite; leave out what is not to be used"


def _moments_problems(optim: OptimConfig) -> Iterator[str]:
    if optim.moments_dtype == "float32":
        return
    if optim.name == "muon":
        yield (
            f'optim.moments_dtype={optim.moments_dtype!r} is not for optim.name="muon", which orthogonalizes its '
            f'moments; use optim.moments_dtype="float32"'
        )
    elif LARGEST_BETA2 < optim.beta2 < 1:
        yield (
            f"optim.beta2={optim.beta2} changes a moment by less than the 8 bits of optim.moments_dtype="
            f'{optim.moments_dtype!r} can show; use optim.beta2={LARGEST_BETA2} or less, or "float32"'
        )


def attention_problems(attention: AttentionConfig, heads: int, kv_heads: int) -> Iterator[str]:
    """Errors in the options of attention that neither a mesh nor another strategy can mend."""
    if heads > 0 and kv_heads > 0 and heads % kv_heads:
        yield (
            f"model.heads={heads} is not divisible by model.kv_heads={kv_heads}; each key/value head "
            f"serves equally many query heads: use model.kv_heads={heads} or a divisor of it"
        )
    if attention.window >= 2**31:
        yield f"attention.window={attention.window} must be less than 2**31; use 0 for all that came before"


def optimizer_problems(config: Config, sizes: MeshSizes | None) -> Iterator[str]:
    """Errors in how the state of the optimizer is sharded: for training alone, as others read parameters only."""
    if config.optim.offload and sizes and sizes[0] * sizes[1] > 1 and config.mesh.shard != "all":
        yield (
            f"optim.offload=True with mesh.shard={config.mesh.shard!r} would keep a copy of all weights in host memory "
            f'for each device; use mesh.shard="all", which shards them, or optim.offload=False'
        )
    if config.optim.name != "muon":
        return
    if config.lora.rank:
        yield (
            f'lora.rank={config.lora.rank} trains adapters, and optim.name="muon" orthogonalizes updates of kernels '
            f'alone; use optim.name="adamw" or "lion"'
        )
    if config.optim.offload:
        yield (
            'optim.offload=True updates a part of a matrix at a time, and optim.name="muon" needs all of it; '
            'use optim.offload=False or optim.name="adamw"'
        )
    if config.mesh.shard != "none":
        yield (
            f'mesh.shard={config.mesh.shard!r} leaves each device a shard of a matrix, and optim.name="muon" needs all '
            f'of it; use mesh.shard="none" or optim.name="adamw"'
        )
    if sizes and sizes[2] > 1:
        yield (
            f'mesh.model={sizes[2]} shards the matrices of layers, and optim.name="muon" needs all of each; '
            f'use mesh.model=1, or train anew with optim.name="adamw"'
        )


def _mesh_problems(config: Config, sizes: MeshSizes) -> Iterator[str]:
    data, _, model = sizes
    batch, accumulate = config.data.batch_size, config.optim.accumulate
    sharded = {key: getattr(config.model, key) for key in ("heads", "kv_heads", "mlp_width")}
    for key, value in sharded.items():
        if value % model:
            yield (
                f"model.{key}={value} is not divisible by mesh.model={model}, which shards it; "
                f"use model.{key}={next_multiple(value, model)} or a mesh.model that divides it"
            )
    if accumulate > 0 and batch % (data * accumulate):
        yield (
            f"data.batch_size={batch} is not divisible by mesh.data={data} times optim.accumulate={accumulate}; "
            f"use data.batch_size={next_multiple(batch, data * accumulate)}"
        )


def next_multiple(value: int, of: int) -> int:
    """The least multiple of `of` that is not less than the value."""
    return -(-value // of) * of
