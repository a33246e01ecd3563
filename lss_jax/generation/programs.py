"""The compiled programs of generation: a prefill that is parallel over the sequence, and a step for one token per row.

The *prefill* is the training model with its strategy, and leaves each layer's keys and values on the device that
computed them; for an encoder-decoder it is the encoder, and what the decoder's layers make of its output. A *step*
takes the last token of every row: to the model these are a segment of `B` tokens, each at its own position, so that
rows of different length, and weights sharded over `model`, need no extra code. The first step takes the prompts' last
tokens, or start tokens, so that all logits come from steps.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lss_jax.attention.collectives import stacked
from lss_jax.attention.mask import Intervals, first_keys
from lss_jax.attention.placement import setting_on
from lss_jax.attention.setting import IN_SOURCE
from lss_jax.attention.strategies import make_attend
from lss_jax.config.schema import Config
from lss_jax.generation.cache import (
    CACHE_SPECS,
    SPECS_WITH_SOURCE,
    Cache,
    attend_to_cache,
    attend_to_source,
    empty,
    fill,
    reordered,
    write,
)
from lss_jax.models import FAMILIES, Model, Params, build_model
from lss_jax.models.layers import AttendWithPast, Segment, Source, without_past
from lss_jax.parallel.layout import SEQUENCE, SOURCE, layout_on
from lss_jax.parallel.mesh import DATA, MODEL, SEQ, axis_if_sharded, sequence_axes
from lss_jax.parallel.scopes import ATTENTION, CROSS_ATTENTION
from lss_jax.parallel.tensor_parallel import own_part
from lss_jax.tasks import make_task
from lss_jax.training.step import on_mesh
from lss_jax.training.tables import in_layout_order

ROWS = P((DATA, MODEL))  # a spec for one token per row: a model group's rows are its segment
PROMPT_SPECS = P(DATA, SEQ), P(SEQ), P(DATA)

Prefill = Callable[[Params, jax.Array, jax.Array], Cache]


def reads_source(config: Config) -> bool:
    """Whether a text is generated from a source, and does not go on with a prompt."""
    return SOURCE in FAMILIES[config.model.family].sequences


def cache_specs(config: Config) -> Cache:
    """The specs of a model's cache."""
    return SPECS_WITH_SOURCE if reads_source(config) else CACHE_SPECS


def make_prefill(model: Model, mesh: Mesh, tokens: int) -> Prefill:
    """The prefill: from global parameters, prompts `tokens_BL` (padded, natural order) and their lengths to a cache.

    The cache has room for `tokens` more. It leaves out each prompt's last token, which the first step adds; under a
    prefix mask the others have attended to that token all the same.
    """
    config, layout, axis = model.config, layout_on(model.config, mesh), axis_if_sharded(MODEL, mesh)

    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=on_mesh((model.specs, *PROMPT_SPECS), mesh),
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


def make_source_prefill(model: Model, mesh: Mesh, tokens: int, rows: int) -> Prefill:
    """The prefill of sources: from global parameters, `source_DS` (padded, natural order) and their lengths to a cache.

    The cache has so many `rows` for each source, which share what is cached of it, and room for `tokens` in each row.
    """
    config, layout, axis = model.config, layout_on(model.config, mesh, SOURCE), axis_if_sharded(MODEL, mesh)
    axes = sequence_axes(mesh)
    # the table of the sequence itself is for the steps
    specs = model.with_tables(lambda spec, sequence: spec if sequence == SOURCE else P(), model.specs)

    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=on_mesh((specs, *PROMPT_SPECS), mesh),
        out_specs=on_mesh(SPECS_WITH_SOURCE, mesh),
    )
    def on_segments(params: Params, source_Ds: jax.Array, positions_s: jax.Array, length_D: jax.Array) -> Cache:
        params = model.with_tables(
            lambda table, sequence: layout.from_natural(table, axes) if sequence == SOURCE else table, params
        )
        mask = first_keys(positions_s, length_D[:, None], length_D[:, None])  # of its source a token sees all
        attend = make_attend(config.attention.strategy, mask, setting_on(config, mesh, IN_SOURCE))
        kv_n2DGsK = model.remember(params, source_Ds, _segment(positions_s, without_past(attend), axis))
        source = fill(kv_n2DGsK, positions_s, length_D, more=0)
        return empty(source, slots=-(-tokens // layout.devices), rows=rows)

    def prefill(params: Params, source_DS: jax.Array, length_D: jax.Array) -> Cache:
        length = source_DS.shape[1]
        positions_S = layout.positions(length)
        used = {SOURCE: length, SEQUENCE: 0}
        cropped = model.with_tables(lambda table, sequence: _first_rows(table, used[sequence]), params)
        return on_segments(cropped, source_DS[:, positions_S], positions_S, length_D)

    return prefill


def make_reorder(config: Config, mesh: Mesh, beams: int) -> Callable[[Cache, jax.Array], Cache]:
    """From a cache with so many neighbouring rows for each source to one with other rows of the same sources.

    `parent_B` is the number of each new row among those of its source.
    """
    specs = cache_specs(config)

    @partial(jax.shard_map, mesh=mesh, in_specs=on_mesh((specs, P(DATA)), mesh), out_specs=on_mesh(specs, mesh))
    def reorder(cache: Cache, parent_B: jax.Array) -> Cache:
        return reordered(cache, jnp.arange(len(parent_B)) // beams * beams + parent_B)

    return reorder


Step = Callable[[Params, Cache, jax.Array, jax.Array, jax.Array], tuple[Cache, jax.Array]]


def make_step(model: Model, mesh: Mesh, length: int) -> Step:
    """The step: from global parameters, cache, `token_B`, `position_B` and its number to the cache and `logits_BV`.

    `length` is that of the padded prompts, 0 for an encoder-decoder. Each step writes to the next device of the
    sequence group, so that the cache stays balanced.
    """
    config, axis, seq_axis = model.config, axis_if_sharded(MODEL, mesh), axis_if_sharded(SEQ, mesh)
    layout, of_cache = layout_on(config, mesh), cache_specs(config)
    specs = model.with_tables(lambda _, sequence: ROWS if sequence == SEQUENCE else P(), model.specs)
    logits_spec = P(DATA, MODEL) if config.model.vocab_parallel else ROWS
    # Logits from weights that were gathered over `seq` are the same along it, but do not count as such.
    copies = seq_axis is not None and any(one.times for one in jax.tree.leaves(model.gathers))
    logits_spec = P(SEQ, *logits_spec) if copies else logits_spec

    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=on_mesh((specs, of_cache, P(DATA), P(DATA), P()), mesh),
        out_specs=on_mesh((of_cache, logits_spec), mesh),
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

        segment, past = _segment(position_B, attend, axis), cache.kv_n2BGcK
        if cache.source is not None:
            segment = segment._replace(source=Source(segment, attend_to_source_of(cache.source, seq_axis)))
            past = past, cache.source.kv_n2BGcK
        outputs, kv_n2BGK = model.recall(params, token_B[None], segment, past)
        slot = length // layout.devices + number // layout.devices
        mine = seq_axis is None or number % layout.devices == jax.lax.axis_index(seq_axis)
        (logits_BV,) = outputs.all()
        return write(cache, kv_n2BGK, position_B, slot, mine), logits_BV[None] if copies else logits_BV

    def step(
        params: Params, cache: Cache, token_B: jax.Array, position_B: jax.Array, number: jax.Array
    ) -> tuple[Cache, jax.Array]:
        looked_up = model.with_tables(
            lambda table, sequence: table[position_B] if sequence == SEQUENCE else table[:0], params
        )
        cache, logits_BV = on_devices(looked_up, cache, token_B, position_B, number)
        logits_BV = logits_BV[0] if copies else logits_BV
        logits_BV = jax.lax.with_sharding_constraint(logits_BV, NamedSharding(mesh, P()))
        return cache, logits_BV[:, : config.model.vocab]  # without padding

    return step


def attend_to_source_of(source: Cache, axis: str | None) -> AttendWithPast:
    """The attention of a step to the cached sources."""

    @jax.named_scope(CROSS_ATTENTION)
    def attend(q_1BHK, k, v, dropout, past_2DGcK):
        return attend_to_source(q_1BHK[0], past_2DGcK, source.position_Bc, axis)[None], None

    return attend


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


def forward_model(config: Config, mesh: Mesh) -> Model:
    """The model for inference: without remat, and scanned, since only then does XLA update the cache in place."""
    layers = dataclasses.replace(config.model, scan_layers=True, remat="none", remat_every=1)
    return build_model(dataclasses.replace(config, model=layers), mesh)
