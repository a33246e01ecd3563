"""Text generation: a sequence-parallel prefill, then decoding token by token from a cache that stays sharded.

There are two compiled programs. The *prefill* is the training model with its strategy, and leaves each layer's keys and
values on the device that computed them. A *step* takes the last token of every row: to the model these are a segment of
`B` tokens, each at its own position, so that rows of different length, and weights sharded over `model`, need no extra
code. The first step takes the prompts' last tokens, so that all logits come from steps.
"""

import dataclasses
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lss_jax.attention.collectives import stacked
from lss_jax.attention.mask import Intervals
from lss_jax.attention.placement import setting_on
from lss_jax.attention.strategies import EXACT, make_attend
from lss_jax.config.schema import Config, ConfigError
from lss_jax.data.text import Tokenizer
from lss_jax.generation.cache import CACHE_SPECS, Cache, attend_to_cache, fill, write
from lss_jax.generation.sampling import Sampling, sample
from lss_jax.models import FAMILIES, Model, Params, build_model
from lss_jax.models.layers import AttendWithPast, Segment
from lss_jax.parallel.layout import layout_on
from lss_jax.parallel.mesh import DATA, MODEL, SEQ, axis_if_sharded, like, shardings
from lss_jax.parallel.scopes import ATTENTION
from lss_jax.parallel.tensor_parallel import own_part
from lss_jax.tasks import make_task
from lss_jax.tasks.task import Task
from lss_jax.training.step import on_mesh
from lss_jax.training.tables import in_layout_order

ROWS = P((DATA, MODEL))  # a spec for one token per row: a model group's rows are its segment


def make_prefill(model: Model, mesh: Mesh, tokens: int) -> Callable[[Params, jax.Array, jax.Array], Cache]:
    """The prefill: from global parameters, prompts `tokens_BL` (padded, natural order) and their lengths to a cache.

    The cache has room for `tokens` more. It leaves out each prompt's last token, which the first step adds; under a
    prefix mask the others have attended to that token all the same.
    """
    config, layout, axis = model.config, layout_on(model.config, mesh), axis_if_sharded(MODEL, mesh)
    prompt_specs = (P(DATA, SEQ), P(SEQ), P(DATA))

    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=on_mesh((model.specs, *prompt_specs), mesh),
        out_specs=on_mesh(CACHE_SPECS, mesh),
    )
    def on_segments(params: Params, tokens_Bl: jax.Array, positions_l: jax.Array, length_B: jax.Array) -> Cache:
        params = in_layout_order(params, model, mesh)
        strategy = make_attend(config.attention.strategy, _mask(config, positions_l), setting_on(config, mesh))

        def attend(q_BlHK, k_BlGK, v_BlGK, dropout, past):
            return strategy(q_BlHK, k_BlGK, v_BlGK, dropout), stacked(k_BlGK, v_BlGK)

        segment = _segment(positions_l, attend, axis)
        _, kv_n2BGlK = model.recall(params, tokens_Bl, segment, None)  # the logits are not needed
        return fill(kv_n2BGlK, positions_l, length_B - 1, more=-(-tokens // layout.devices))

    def prefill(params: Params, tokens_BL: jax.Array, length_B: jax.Array) -> Cache:
        length = tokens_BL.shape[1]
        positions_L = layout.positions(length)
        cropped = model.with_tables(lambda table_LE, _: _first_rows(table_LE, length), params)
        return on_segments(cropped, tokens_BL[:, positions_L], positions_L, length_B)

    return prefill


Step = Callable[[Params, Cache, jax.Array, jax.Array, jax.Array], tuple[Cache, jax.Array]]


def make_step(model: Model, mesh: Mesh, length: int) -> Step:
    """The step: from global parameters, cache, `token_B`, `position_B` and its number to the cache and `logits_BV`.

    `length` is that of the padded prompts. Each step writes to the next device of the sequence group, so that the cache
    stays balanced.
    """
    config, axis, seq_axis = model.config, axis_if_sharded(MODEL, mesh), axis_if_sharded(SEQ, mesh)
    layout = layout_on(config, mesh)
    specs = model.with_tables(lambda *_: ROWS, model.specs)
    logits_spec = P(DATA, MODEL) if config.model.vocab_parallel else ROWS
    # Logits from weights that were gathered over `seq` are the same along it, but do not count as such.
    copies = seq_axis is not None and any(one.times for one in jax.tree.leaves(model.gathers))
    logits_spec = P(SEQ, *logits_spec) if copies else logits_spec

    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=on_mesh((specs, CACHE_SPECS, P(DATA), P(DATA), P()), mesh),
        out_specs=on_mesh((CACHE_SPECS, logits_spec), mesh),
    )
    def on_devices(
        params: Params, cache: Cache, token_B: jax.Array, position_B: jax.Array, number: jax.Array
    ) -> tuple[Cache, jax.Array]:
        mask = _mask(config, position_B)

        @jax.named_scope(ATTENTION)
        def attend(q_1BHK, k_1BGK, v_1BGK, dropout, past_2BGcK):
            own_2BGK = jnp.concatenate((k_1BGK, v_1BGK))
            o_BHK = attend_to_cache(
                q_1BHK[0], own_2BGK, past_2BGcK, position_Bc=cache.position_Bc, mask=mask, axis=seq_axis
            )
            return o_BHK[None], own_2BGK

        segment = _segment(position_B, attend, axis)
        outputs, kv_n2BGK = model.recall(params, token_B[None], segment, cache.kv_n2BGcK)
        slot = length // layout.devices + number // layout.devices
        mine = seq_axis is None or number % layout.devices == jax.lax.axis_index(seq_axis)
        (logits_BV,) = outputs.all()
        return write(cache, kv_n2BGK, position_B, slot, mine), logits_BV[None] if copies else logits_BV

    def step(
        params: Params, cache: Cache, token_B: jax.Array, position_B: jax.Array, number: jax.Array
    ) -> tuple[Cache, jax.Array]:
        looked_up = model.with_tables(lambda table_LE, _: table_LE[position_B], params)
        cache, logits_BV = on_devices(looked_up, cache, token_B, position_B, number)
        logits_BV = logits_BV[0] if copies else logits_BV
        logits_BV = jax.lax.with_sharding_constraint(logits_BV, NamedSharding(mesh, P()))
        return cache, logits_BV[:, : config.model.vocab]  # without padding

    return step


def _segment(positions_l: jax.Array, attend: AttendWithPast, axis: str | None) -> Segment:
    """A segment of generation: a single document, by whose own positions the model tells tokens apart."""
    return Segment(
        positions_l=positions_l,
        positions_p=own_part(positions_l, axis, 0),
        embedded_l=positions_l,
        is_token_p=jnp.ones_like(own_part(positions_l, axis, 0), bool),
        attend=attend,
        head_groups=1,
        dropout=None,
        model_axis=axis,
        sequence_axes=(),  # nothing is pooled
        source=None,
    )


def _mask(config: Config, positions_l: jax.Array) -> Intervals:
    """The config's mask for a single document without end."""
    endless = dataclasses.replace(config.data, seq_len=np.iinfo(np.int32).max)
    return make_task(dataclasses.replace(config, data=endless)).mask(positions_l)


def _first_rows(table_LE: jax.Array, length: int) -> jax.Array:
    """The first `length` rows of a table, with zeros after its last row."""
    return jnp.pad(table_LE[:length], ((0, max(length - len(table_LE), 0)), (0, 0)))


class Generation:
    """Continues prompts by programs compiled for this mesh; iterating runs them.

    Each iteration yields the bytes of one token per prompt, or `b""` after the end of its document, and for a token
    that stands for no text. Texts are the same on every mesh, except where two tokens are so close that rounding
    decides; and a text does not depend on the other prompts.

    Raises:
      ConfigError: the prompts, the number of tokens or the sampling cannot work; nothing has been compiled.
    """

    def __init__(
        self, config: Config, mesh: Mesh, params: Params, prompts: Sequence[bytes], tokens: int, sampling: Sampling
    ):
        check_request(config, prompts, tokens, sampling)
        _, text = task_and_text(config)
        self._text = text
        self._prompts, self._tokens, self._params = list(prompts), tokens, params
        self._separator = config.data.separator.encode()
        surplus = -len(prompts) % (mesh.shape[DATA] * mesh.shape[MODEL])  # padding rows, whose texts are dropped
        rows = [*prompts, *[prompts[0]] * surplus]
        cache_shardings, replicated = shardings(CACHE_SPECS, mesh), NamedSharding(mesh, P())
        tokenized = [text.tokens_of(row) for row in rows]
        length_B = np.array([len(row) for row in tokenized], np.int32)
        length = layout_on(config, mesh).padded(int(length_B.max()))
        tokens_BL = np.stack([np.pad(row, (0, length - len(row))) for row in tokenized])
        last_B = tokens_BL[np.arange(len(rows)), length_B - 1]
        stream_B = np.array([zlib.crc32(row, rows[:number].count(row)) for number, row in enumerate(rows)], np.uint32)
        self._tokens_BL, self._length_B, self._last_B = jax.device_put((tokens_BL, length_B, last_B), replicated)

        model = _forward_model(config, mesh)
        prefill, step = make_prefill(model, mesh, tokens), make_step(model, mesh, length)

        def next_token(
            params: Params, cache: Cache, token_B: jax.Array, length_B: jax.Array, number: jax.Array
        ) -> tuple[Cache, jax.Array]:
            position_B = length_B - 1 + number
            cache, logits_BV = step(params, cache, token_B, position_B, number)
            return cache, sample(logits_BV, sampling, jnp.asarray(stream_B), position_B, vocab=text.vocab)

        prompt = (params, self._tokens_BL, self._length_B)
        self._prefill = jax.jit(prefill, out_shardings=cache_shardings).lower(*prompt).compile()
        cache = like(jax.eval_shape(prefill, *prompt), cache_shardings)
        stepping = jax.jit(next_token, donate_argnums=1, out_shardings=(cache_shardings, replicated))
        self._step = stepping.lower(params, cache, self._last_B, self._length_B, np.int32(0)).compile()

    @property
    def cache_bytes(self) -> int:
        """Bytes per device that the compiled step updates in place."""
        analysis = self._step.memory_analysis()
        assert analysis is not None, "every backend has one"
        return analysis.alias_size_in_bytes

    def __iter__(self) -> Iterator[list[bytes]]:
        tails, ended = list(self._prompts), [False] * len(self._prompts)
        cache = jax.block_until_ready(self._prefill(self._params, self._tokens_BL, self._length_B))
        token_B = self._last_B
        for number in range(self._tokens):
            step = self._step(self._params, cache, token_B, self._length_B, np.int32(number))
            cache, token_B = jax.block_until_ready(step)  # queued steps of simulated devices would block one another
            found = np.asarray(token_B)
            new = [b"" if end else self._text.bytes_of(int(found[row])) for row, end in enumerate(ended)]
            ended = [end or found[row] == self._text.end for row, end in enumerate(ended)]
            if self._separator:
                cut = [self._to_separator(tail, piece) for tail, piece in zip(tails, new, strict=True)]
                new = [piece for piece, _ in cut]
                tails = [(tail + piece)[-len(self._separator) :] for tail, piece in zip(tails, new, strict=True)]
                ended = [end or here for end, (_, here) in zip(ended, cut, strict=True)]
            yield new
            if all(ended):
                return

    def _to_separator(self, tail: bytes, new: bytes) -> tuple[bytes, bool]:
        """New bytes behind a text's last ones, as far as the end of its document, and whether that is there."""
        before, found, _ = (tail + new).partition(self._separator)
        return (tail + new)[len(tail) : len(before) + len(found)], bool(found)


def task_and_text(config: Config) -> tuple[Task, Tokenizer]:
    """The config's task and what its tokens stand for, if it and the model's family can generate.

    Raises:
      ConfigError: one of them cannot, or the tokenizer cannot be read or has more tokens than the model.
    """
    task, family = make_task(config), config.model.family
    text = task.text
    if text is None:
        raise ConfigError(f"task={config.task!r} has no text to generate; give a run of a language model")
    if not FAMILIES[family].generates:
        able = ", ".join(repr(name) for name, one in FAMILIES.items() if one.generates)
        raise ConfigError(f"model.family={family!r} cannot generate; give a run of one that can: {able}")
    if config.attention.strategy not in EXACT:
        able = ", ".join(map(repr, EXACT))
        raise ConfigError(
            f"attention.strategy={config.attention.strategy!r} cannot generate: a step attends exactly to cached "
            f"keys and values, and so would continue another model than was trained; give a run of one that can: {able}"
        )
    if config.model.vocab < text.vocab:
        raise ConfigError(
            f"data.tokenizer={text.name!r} has {text.vocab} tokens, but the model model.vocab={config.model.vocab}; "
            f"give the tokenizer that the model was trained with"
        )
    return task, text


def _forward_model(config: Config, mesh: Mesh) -> Model:
    """The model for inference: without remat, and scanned, since only then does XLA update the cache in place."""
    layers = dataclasses.replace(config.model, scan_layers=True, remat="none", remat_every=1)
    return build_model(dataclasses.replace(config, model=layers), mesh)


def check_request(config: Config, prompts: Sequence[bytes], tokens: int, sampling: Sampling) -> None:
    """Raises a ConfigError, with a line per problem, for a request that no text can come from."""
    problems, (_, text) = [*sampling.problems()], task_and_text(config)
    if tokens < 1:
        problems.append(f"--tokens={tokens} must be at least 1")
    if not prompts:
        problems.append("there is no prompt; give --prompt TEXT or --prompt-file FILE, several times if you like")
    for number, prompt in enumerate(prompts, start=1):
        name = f"prompt {number}" if len(prompts) > 1 else "the prompt"
        problems += _problems_of(prompt, name=name, text=text, config=config, tokens=tokens)
    if problems:
        raise ConfigError("\n".join(problems))


def _problems_of(prompt: bytes, *, name: str, text: Tokenizer, config: Config, tokens: int) -> Iterator[str]:
    separator, prefix, seq_len = config.data.separator, config.attention.prefix, config.data.seq_len
    items = make_task(config).items
    try:
        length = len(text.tokens_of(prompt))
    except ConfigError as error:
        yield f"{name}: {error}"
        return
    if not prompt or not length:
        yield f"{name} is empty, and there must be something to continue; give at least one byte"
    if separator and separator.encode() in prompt:
        yield (
            f"{name} has data.separator={separator!r} in it, after which a new document starts that does not attend to "
            f"anything before; give only what follows the last one"
        )
    if length < prefix:
        yield (
            f"{name} has {length} {items}, less than attention.prefix={prefix}, and the model was not trained to "
            f"predict {items} of the prefix; give at least {prefix}"
        )
    if config.model.positions != "learned":
        return
    longer = 'train with a longer data.seq_len, or with model.positions="rope", which has no end'
    if length > seq_len:
        yield f"{name} has {length} {items}, more than data.seq_len={seq_len} learned positions; cut it, or {longer}"
    elif length + tokens - 1 > seq_len:
        yield (
            f"{name} has {length} {items}, and data.seq_len={seq_len} learned positions leave room for "
            f"--tokens={seq_len + 1 - length}, not {tokens}; ask for less, or {longer}"
        )
