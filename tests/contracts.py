"""Compiled training steps of small models beside their contracts."""

from functools import cache

from helpers import model_on

from lss_jax.inspection import contract, hlo
from lss_jax.training.step import trace_train_step

LAYERS = 3


def lowered_step(*sizes, **changes):
    model, mesh = model_on(*sizes, **{"model__layers": LAYERS, **changes})
    return model, mesh, trace_train_step(model, mesh).lower()


@cache  # several tests ask about one program
def compiled_step(*sizes, **changes):
    model, mesh, lowered = lowered_step(*sizes, **changes)
    return model, mesh, hlo.collectives(lowered.compile().as_text())


def check_contract(*sizes, **changes):
    model, mesh, found = compiled_step(*sizes, **changes)
    compiled, predicted = contract.found(found, mesh), contract.predicted(model, mesh)
    assert not contract.disagreements(compiled, predicted)
    if model.config.model.dtype == "float32":
        moved = {line: total.bytes for line, total in compiled.items() if line.kind != "scalars"}
        assert moved == {line: total.bytes for line, total in predicted.items() if line.kind != "scalars"}
