"""Sequence-parallel transformer training in JAX: the LSS Transformer (arXiv 2311.02382).

The public functions are exported here; the rest is in the modules (docs/package.md).

>>> import tempfile
>>> import lss_jax
>>> _ = lss_jax.start()  # 8 simulated devices where there is no accelerator
>>> config = lss_jax.load_config("configs/default.py", {"model.layers": 1, "data.seq_len": 64, "eval_batches": 1})
>>> workdir = tempfile.mkdtemp()
>>> trainer = lss_jax.Trainer(config, workdir)
>>> for record in trainer.fit():  # can be left or interrupted, and called again
...     if record["step"] == 20:
...         break
>>> trainer.save()
>>> trainer.close()
>>> sorted(record)
['bits_per_byte', 'grad_norm', 'learning_rate', 'loss', 'skipped', 'split', 'step', 'step_seconds', 'tokens_per_second']
>>> len(lss_jax.generate_text(workdir, "def ", tokens=10, temperature=0))
14
>>> lss_jax.evaluate_run(workdir, "test")  # doctest: +SKIP
>>> lss_jax.audit_step(config)  # doctest: +SKIP
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lss_jax.attention.flax_attention import attention_fn
    from lss_jax.attention.global_attention import dot_product_attention
    from lss_jax.generation.generate import generate_text
    from lss_jax.inspection.audit import audit_step
    from lss_jax.parallel.mesh import make_mesh
    from lss_jax.runtime.distributed import start
    from lss_jax.storage.workdir import load_config
    from lss_jax.training.evaluation import evaluate_run
    from lss_jax.training.trainer import Trainer

HOMES = {
    "Trainer": "training.trainer",
    "attention_fn": "attention.flax_attention",
    "audit_step": "inspection.audit",
    "dot_product_attention": "attention.global_attention",
    "evaluate_run": "training.evaluation",
    "generate_text": "generation.generate",
    "load_config": "storage.workdir",
    "make_mesh": "parallel.mesh",
    "start": "runtime.distributed",
}
__all__ = [
    "Trainer",
    "attention_fn",
    "audit_step",
    "dot_product_attention",
    "evaluate_run",
    "generate_text",
    "load_config",
    "make_mesh",
    "start",
]


def __getattr__(name: str) -> Any:  # PEP 562: importing the package imports nothing else
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *HOMES]
