"""What a training step of each model costs on eight devices, by the audit: compiled here, and not run."""

from typing import Any

import jax

from experiments.alternatives.models import MODELS, keys_of
from experiments.alternatives.tasks import SMALL
from lss_jax import audit_step, load_config
from lss_jax.inspection.audit import on_device
from lss_jax.parallel.scopes import ATTENTION, PATCHES

FILE, LENGTHS, DEVICES = "configs/default.py", (1024, 16_384), 8


def costs_of_models() -> dict[str, dict[str, Any]]:
    """Operations, bytes that attention sends and memory, per device and step of one sequence, by model and length."""
    return {f"{model}, {length}": _costs(model, length) for model in MODELS for length in LENGTHS}


def _costs(model: str, length: int) -> dict[str, Any]:
    keys = {**SMALL, "data.seq_len": length, "data.batch_size": 1, "mesh.data": 1, "mesh.seq": -1}
    audit = audit_step(load_config(FILE, keys_of(model, FILE, keys)), jax.devices()[:DEVICES])
    assert audit.collectives is not None and audit.memory is not None
    sent = sum(total.bytes for line, total in audit.collectives.items() if line.place.startswith((ATTENTION, PATCHES)))
    return {"operations": audit.flops + audit.attention_flops, "sent": sent, "memory": on_device(audit.memory)}
