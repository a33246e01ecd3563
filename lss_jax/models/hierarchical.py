"""A hierarchy of two decoders, as MEGABYTE (Yu et al. 2023, arXiv 2305.07185): another model, not another attention.

The sequence is a sequence of patches of `model.patch` tokens. A global decoder of `model.layers` layers attends over
patches, with the config's strategy and layout, and sees a token's patch only after that patch has ended. A local
decoder of `model.local_layers` layers predicts each token from those before it in its patch, and from what the global
one knows at that patch. It stays within a patch, and so communicates nothing.

What a patch is follows from what is predicted: the tokens that are inputs where its first target is predicted are those
of all patches before it, and its own first one, which the local decoder sees. The paper pads that place instead.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from lss_jax.attention.mask import causal
from lss_jax.attention.placement import setting_on
from lss_jax.attention.strategies import make_attend
from lss_jax.config.schema import Config
from lss_jax.models.embeddings import Head, RestartedPositions, TokenEmbedding, sinusoidal
from lss_jax.models.layers import Linear, Segment, norm, whole, without_past
from lss_jax.models.outputs import PerToken
from lss_jax.models.stack import Stack
from lss_jax.parallel.layout import Layout
from lss_jax.parallel.mesh import abstract_mesh
from lss_jax.parallel.scopes import PATCHES


def global_config(config: Config) -> Config:
    """The config of the decoder over patches: a token is a patch."""
    patches = -(-config.data.seq_len // config.model.patch)
    data = dataclasses.replace(config.data, seq_len=patches)
    return dataclasses.replace(config, data=data, model=dataclasses.replace(config.model, patch=0))


def local_config(config: Config, rows: int) -> Config:
    """The config of the decoder within patches: `rows` sequences of one patch each, on as many devices as there are."""
    model, data = config.model, config.data
    local = dataclasses.replace(
        model,
        patch=0,
        layers=model.local_layers,
        width=model.local_width,
        head_width=model.local_width // model.heads,
        mlp_width=model.mlp_width * model.local_width // model.width,
        remat_every=1,
        tile=0,  # a tile would be a patch at most
    )
    attention = dataclasses.replace(
        config.attention,
        strategy="lss",
        layout="contiguous",
        kernel="dense",  # a patch's scores are few, and all patches are computed at once
        head_groups=1,
        regather=False,
        window=0,
        global_tokens=0,
        features=0,
    )
    data = dataclasses.replace(data, seq_len=model.patch, batch_size=rows)
    return dataclasses.replace(config, model=local, attention=attention, data=data)


class Hierarchical(nnx.Module):
    """A decoder over patches, and one within each of them; their parameters are apart, but for nothing."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        model, local = config.model, local_config(config, rows=1)
        self.config, self.local, self.of_token = config, local, model.width // model.patch
        # A patch's embedding is those of its tokens, one after the other; behind the vocabulary stands what comes
        # before the first patch.
        of_tokens = dataclasses.replace(model, width=self.of_token, vocab=model.vocab + 1)
        self.tokens = TokenEmbedding(of_tokens, rngs)
        if model.positions == "learned":
            self.positions = RestartedPositions(model, global_config(config).data.seq_len, rngs)
            self.local_positions = RestartedPositions(local.model, model.patch, rngs)
        self.stack = Stack(model, rngs)
        self.global_norm = norm(model, rngs)
        bias = P() if model.bias else None
        self.to_local = Linear(
            local.model, (self.of_token,), (model.local_width,), rngs, kernel_spec=P(), bias_spec=bias
        )
        self.local_tokens = TokenEmbedding(local.model, rngs)
        self.local_stack = Stack(local.model, rngs)
        self.final_norm = norm(local.model, rngs)
        if not model.tied_head:
            self.head = Head(local.model, 1, rngs)

    def __call__(self, tokens_Bl: jax.Array, segment: Segment) -> PerToken:
        """Next-token logits for local `tokens_Bl`, whose chunks are whole patches; `segment.attend` is over patches."""
        (B, l), patch, dtype = tokens_Bl.shape, self.config.model.patch, self.config.model.dtype
        position_n = segment.positions_l[::patch] // patch
        before_Bl = self._patches_before(tokens_Bl, segment)
        x_BnE = whole(self.tokens, dtype)(before_Bl, None).reshape(B, l // patch, -1)
        x_BnE = self._with_positions(x_BnE, position_n, getattr(self, "positions", None))
        x_BnE, _ = self.stack(x_BnE, _at(segment, position_n))
        seen_icE = self.global_norm(x_BnE).reshape(-1, patch, self.of_token)
        embedding = whole(self.local_tokens, dtype)
        x_icD = whole(self.to_local, dtype)(seen_icE) + embedding(tokens_Bl.reshape(-1, patch), None)
        position_c = jnp.arange(patch, dtype=jnp.int32)
        x_icD = self._with_positions(x_icD, position_c, getattr(self, "local_positions", None))
        attend = make_attend("lss", causal(position_c), setting_on(self.local, abstract_mesh((1, 1, 1))))
        within = _at(segment, position_c)._replace(attend=without_past(attend), head_groups=1)
        x_icD, _ = self.local_stack(x_icD, within)

        def logits(modules: tuple, x_BtD: jax.Array) -> jax.Array:
            final_norm, head = modules
            return head.logits(final_norm(x_BtD))

        head = whole(self.head, dtype) if hasattr(self, "head") else embedding
        return PerToken(logits, (self.final_norm, head), x_icD.reshape(B, l, -1), self.config.model.tile)

    def _with_positions(self, x: jax.Array, positions: jax.Array, table: RestartedPositions | None) -> jax.Array:
        if self.config.model.positions == "sinusoidal":
            return sinusoidal(x, positions)
        return x if table is None else whole(table, self.config.model.dtype)(x, positions)

    @jax.named_scope(PATCHES)
    def _patches_before(self, tokens_Bl: jax.Array, segment: Segment) -> jax.Array:
        """The tokens of the patch before each patch; a chunk's first patch has them from where the chunk before is."""
        patch, axis = self.config.model.patch, segment.sequence_axes[0] if segment.sequence_axes else None
        layout = Layout(self.config.attention.layout, jax.lax.axis_size(axis) if axis else 1)
        chunks_Bnl = tokens_Bl.reshape(len(tokens_Bl), layout.chunks_per_device, -1)
        last_Bnc = chunks_Bnl[:, :, -patch:]
        first_Bnc = jnp.stack(_from_chunks_before(last_Bnc, layout, axis), axis=1)
        starts_n = segment.positions_l.reshape(layout.chunks_per_device, -1)[:, :1] == 0
        first_Bnc = jnp.where(starts_n, self.config.model.vocab, first_Bnc)  # before the first patch
        return jnp.concatenate((first_Bnc, chunks_Bnl[:, :, :-patch]), axis=2).reshape(tokens_Bl.shape)


def _from_chunks_before(last_Bnc: jax.Array, layout: Layout, axis: str | None) -> list[jax.Array]:
    """For each of this device's chunks, what the chunk before it ends with; anything for the first of all."""
    early, *late = jnp.moveaxis(last_Bnc, 1, 0)
    if axis is None:
        return [early, *[early] * len(late)]  # of two chunks the late one follows the early one
    N = layout.devices
    found = [jax.lax.ppermute(early, axis, [(device, device + 1) for device in range(N - 1)])]
    for tokens_Bc in late:
        behind = jax.lax.ppermute(tokens_Bc, axis, [(device + 1, device) for device in range(N - 1)])
        found.append(jnp.where(jax.lax.axis_index(axis) == N - 1, early, behind))
    return found


def _at(segment: Segment, positions: jax.Array) -> Segment:
    """The context of other positions than a segment's tokens: of its patches, or within each of them."""
    there = jnp.ones_like(positions, bool)
    return segment._replace(positions_l=positions, positions_p=positions, embedded_l=positions, is_token_p=there)
