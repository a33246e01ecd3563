"""The rules that a config must keep, each with the values that break it and the remedy."""

from collections.abc import Iterator, Mapping

from lss_jax.config.schema import AttentionConfig, Config, ConfigError, MeshConfig

MeshSizes = tuple[int, int, int]


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


def validate(config: Config, device_count: int) -> MeshSizes:
    """Checks everything that can be known before data is opened and anything is compiled; returns the mesh sizes.

    Raises:
      ConfigError: all problems at once, a line each.
    """
    found = [*_out_of_range(config), *_cross_field(config)]
    sizes = None
    try:
        sizes = mesh_sizes(config.mesh, device_count)
        found += _mesh_problems(config, sizes)
    except ConfigError as error:
        found.insert(0, str(error))
    if found:
        raise ConfigError("\n".join(found))
    assert sizes is not None
    return sizes


def _out_of_range(config: Config) -> Iterator[str]:
    model, data, optim, attention = config.model, config.data, config.optim, config.attention
    at_least_1 = {
        **{f"model.{k}": getattr(model, k) for k in ("vocab", "layers", "width", "heads", "kv_heads", "mlp_width")},
        **{f"data.{k}": getattr(data, k) for k in ("seq_len", "batch_size")},
        **{f"optim.{k}": getattr(optim, k) for k in ("steps", "accumulate", "max_skipped")},
        **{f"attention.{k}": getattr(attention, k) for k in ("block_queries", "block_keys", "gather_groups")},
        "profile.start": config.profile.start,
        **{k: getattr(config, k) for k in ("checkpoint_every", "checkpoints_kept", "log_every", "eval_batches")},
    }
    yield from less_than_1(at_least_1)
    if config.heartbeat_timeout < 10:
        yield f"heartbeat_timeout={config.heartbeat_timeout} must be at least 10 s, or busy processes count as lost"
    at_least_0 = {
        "seed": config.seed,
        "eval_every": config.eval_every,
        "sample_tokens": config.sample_tokens,
        "profile.steps": config.profile.steps,
        "attention.window": attention.window,
        "attention.prefix": attention.prefix,
        "optim.warmup_steps": optim.warmup_steps,
        "optim.weight_decay": optim.weight_decay,
    }
    if config.seed >= 2**32:
        yield f"seed={config.seed} must be less than 2**32"
    for key, number in at_least_0.items():
        if not 0 <= number < float("inf"):
            yield f"{key}={number} must be at least 0 and finite"
    above_0 = {f"optim.{k}": getattr(optim, k) for k in ("learning_rate", "clip_norm")}
    above_0 |= {f"model.{k}": getattr(model, k) for k in ("rope_base", "rope_factor")}
    for key, number in above_0.items():
        if not 0 < number < float("inf"):
            yield f"{key}={number} must be greater than 0 and finite"
    below_1 = {"optim.beta1": optim.beta1, "optim.beta2": optim.beta2, "model.dropout": model.dropout}
    for key, number in below_1.items():
        if not 0 <= number < 1:
            yield f"{key}={number} must be at least 0 and less than 1"


def less_than_1(values: Mapping[str, int]) -> Iterator[str]:
    """Errors for counts below 1, by their keys."""
    yield from (f"{key}={value} must be at least 1" for key, value in values.items() if value < 1)


def _cross_field(config: Config) -> Iterator[str]:
    model, data, optim = config.model, config.data, config.optim
    if model.heads > 0 and model.width % model.heads:
        yield (
            f"model.width={model.width} is not divisible by model.heads={model.heads}; "
            f"use model.width={_next_multiple(model.width, model.heads)} or another number of heads"
        )
    elif model.heads > 0 and model.positions == "rope" and model.width // model.heads % 2:
        yield (
            f"the head width model.width/model.heads={model.width // model.heads} is odd, but rope rotates pairs; "
            f'use an even head width or model.positions="learned"'
        )
    if model.rope_scaling == "none" and model.rope_factor != 1.0:
        yield (
            f'model.rope_factor={model.rope_factor} has no use with model.rope_scaling="none"; '
            f'use "linear" or "ntk", or model.rope_factor=1.0'
        )
    if model.rope_scaling != "none" and model.positions != "rope":
        yield (
            f"model.rope_scaling={model.rope_scaling!r} has no use with model.positions={model.positions!r}; "
            f'use model.positions="rope" or model.rope_scaling="none"'
        )
    if 0.99 < model.dropout < 1:
        yield f"model.dropout={model.dropout} leaves next to nothing; use at most 0.99"
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
    if optim.name == "muon" and optim.shard_state:
        yield (
            'optim.shard_state=True leaves each device a share of a matrix, and optim.name="muon" needs all of it; '
            'use optim.shard_state=False or optim.name="adamw"'
        )
    if config.profile.steps > 0 and config.profile.start > optim.steps > 0:
        yield (
            f"profile.start={config.profile.start} is beyond the last step, optim.steps={optim.steps}; trace from an "
            f"earlier step on, or set profile.steps=0 to trace none"
        )
    if data.source == "text" and not data.path:
        yield 'data.source="text" needs a file; give data.path, or use data.source="stdlib", which needs none'
    if data.source == "stdlib" and data.path:
        yield f'data.path={data.path!r} has no use with data.source="stdlib"; use data.source="text"'


def attention_problems(attention: AttentionConfig, heads: int, kv_heads: int) -> Iterator[str]:
    """Errors in the options of heads, strategy and kernel that no mesh can mend."""
    strategy, kernel, groups = attention.strategy, attention.kernel, attention.gather_groups
    if heads > 0 and kv_heads > 0 and heads % kv_heads:
        yield (
            f"model.heads={heads} is not divisible by model.kv_heads={kv_heads}; each key/value head "
            f"serves equally many query heads: use model.kv_heads={heads} or a divisor of it"
        )
    if strategy == "ring" and kernel not in ("auto", "blockwise"):
        yield (
            f'attention.kernel={kernel!r} cannot take keys as they come by, which attention.strategy="ring" needs; '
            f'use attention.kernel="blockwise"'
        )
    if strategy != "lss" and groups != 1:
        yield (
            f"attention.gather_groups={groups} has no use with attention.strategy={strategy!r}, which gathers nothing; "
            f'use attention.gather_groups=1 or attention.strategy="lss"'
        )
    if attention.regather and strategy != "lss":
        yield (
            f"attention.regather=True has no use with attention.strategy={strategy!r}, which keeps no gathered pairs; "
            f"use attention.regather=False"
        )
    if strategy == "lss" and groups > 0 and kv_heads > 0 and kv_heads % groups:
        yield (
            f"model.kv_heads={kv_heads} is not divisible by attention.gather_groups={groups}; "
            f"use attention.gather_groups={kv_heads} or another divisor"
        )
    if attention.window >= 2**31:
        yield f"attention.window={attention.window} must be less than 2**31; use 0 for all that came before"


def _mesh_problems(config: Config, sizes: MeshSizes) -> Iterator[str]:
    data, seq, model = sizes
    batch, accumulate = config.data.batch_size, config.optim.accumulate
    sharded = {key: getattr(config.model, key) for key in ("heads", "kv_heads", "mlp_width")}
    sharded |= {"vocab": config.model.vocab} if config.model.vocab_parallel else {}
    uneven = {key: value for key, value in sharded.items() if value % model}
    for key, value in uneven.items():
        yield (
            f"model.{key}={value} is not divisible by mesh.model={model}, which shards it; "
            f"use model.{key}={_next_multiple(value, model)} or a mesh.model that divides it"
        )
    if not uneven:
        yield from strategy_on_mesh(config.attention, config.model.heads, config.model.kv_heads, seq, model)
    if config.optim.name == "muon" and model > 1:
        yield (
            f'mesh.model={model} cuts the matrices of layers, and optim.name="muon" needs all of each; '
            f'use mesh.model=1 or optim.name="adamw"'
        )
    if accumulate > 0 and batch % (data * accumulate):
        yield (
            f"data.batch_size={batch} is not divisible by mesh.data={data} times optim.accumulate={accumulate}; "
            f"use data.batch_size={_next_multiple(batch, data * accumulate)}"
        )


def strategy_on_mesh(attention: AttentionConfig, heads: int, kv_heads: int, seq: int, model: int) -> Iterator[str]:
    """Errors for heads that a strategy cannot divide among `seq` devices, after `model` has sharded them."""
    groups = attention.gather_groups
    if attention.strategy == "ulysses" and heads % (seq * model):
        by = f"mesh.seq={seq}" + (f" times mesh.model={model}" if model > 1 else "")
        yield (
            f'model.heads={heads} is not divisible by {by}, which attention.strategy="ulysses" needs; '
            f'use model.heads={_next_multiple(heads, seq * model)} or attention.strategy="lss"'
        )
    if groups > 0 and kv_heads % groups == 0 and kv_heads // model % groups:
        yield (
            f"model.kv_heads={kv_heads} is not divisible by attention.gather_groups={groups} times mesh.model={model}; "
            f"use attention.gather_groups=1 or another divisor of {kv_heads // model}"
        )


def _next_multiple(value: int, of: int) -> int:
    return -(-value // of) * of
