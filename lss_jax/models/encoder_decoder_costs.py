"""What a training step of the encoder-decoder sends and computes outside attention, and which attentions it has."""

import dataclasses
from collections.abc import Iterator

from jax.sharding import AbstractMesh, Mesh

from lss_jax.attention.setting import CROSS, IN_SOURCE, SELF
from lss_jax.attention.traffic import Traffic
from lss_jax.config.schema import Config
from lss_jax.models.decoder_costs import (
    Layers,
    any_trained,
    moved,
    part_of,
    products_of_head,
    products_of_layers,
    traffic_of_embedding,
    traffic_of_head,
    traffic_of_layers,
)
from lss_jax.models.encoder_decoder import encoder_of
from lss_jax.models.family import AttentionLayers, Trained
from lss_jax.parallel.layout import SEQUENCE, SOURCE
from lss_jax.parallel.scopes import ATTENTION, CROSS_ATTENTION


def reaches_layers(trained: Trained, stack: str) -> bool:
    """Whether the backward pass goes through the encoder's layers, or the decoder's ("stack")."""
    before = ("tokens", "source_positions", "encoder")
    return any_trained(trained, *before, *(() if stack == "encoder" else ("encoder_norm", "positions", "stack")))


def attentions(config: Config, mesh: Mesh | AbstractMesh, trained: Trained) -> list[AttentionLayers]:
    """Within the sequence, within the source, and from one to the other."""
    encoder, decoder = (reaches_layers(trained, stack) for stack in ("encoder", "stack"))
    of_encoder = dataclasses.replace(config, model=encoder_of(config.model))
    return [
        AttentionLayers(config, mesh, SELF, ATTENTION, decoder),
        AttentionLayers(of_encoder, mesh, IN_SOURCE, ATTENTION, encoder),
        AttentionLayers(config, mesh, CROSS, CROSS_ATTENTION, decoder),
    ]


def traffic(config: Config, mesh: Mesh | AbstractMesh, trained: Trained) -> Iterator[tuple[str, Traffic]]:
    """Tensor parallelism of both stacks; and the encoder's output, gathered once for all layers of the decoder."""
    for sequence in (SOURCE, SEQUENCE):
        yield from traffic_of_embedding(config, mesh, sequence, trained)
    for layers in _stacks(config, trained):
        yield from traffic_of_layers(config, mesh, layers)
    output = {part_of(config, mesh, SOURCE): 1}
    yield from moved(config, mesh, "forward", output, gathers=1, scatters=0)
    yield from moved(config, mesh, "backward", output, gathers=0, scatters=int(_reaches_output(trained)))
    yield from traffic_of_head(config, mesh, trained, reaches_layers(trained, "stack"))


def products(config: Config, mesh: Mesh | AbstractMesh, trained: Trained) -> int:
    """Operations of projections, MLPs and head, per device."""
    of_layers = sum(products_of_layers(config, mesh, layers) for layers in _stacks(config, trained))
    return of_layers + products_of_head(config, mesh, trained, reaches_layers(trained, "stack"))


def _stacks(config: Config, trained: Trained) -> Iterator[Layers]:
    encoder, decoder = (reaches_layers(trained, stack) for stack in ("encoder", "stack"))
    yield Layers(SOURCE, config.model.encoder_layers, encoder, False, trained["encoder"]["blocks"])
    yield Layers(SEQUENCE, config.model.layers, decoder, _reaches_output(trained), trained["stack"]["blocks"])


def _reaches_output(trained: Trained) -> bool:
    """Whether the encoder's output has a gradient."""
    return reaches_layers(trained, "encoder") or any_trained(trained, "encoder_norm")
