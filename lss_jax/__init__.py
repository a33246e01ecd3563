"""Sequence-parallel transformer training in JAX: the LSS Transformer (arXiv 2311.02382).

What one calls has a name here; the rest is in the modules (README, "The package").

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
>>> len(lss_jax.generate(workdir, "def ", tokens=10, temperature=0))
14
>>> lss_jax.evaluate(workdir, "test")  # doctest: +SKIP
>>> lss_jax.audit(config)  # doctest: +SKIP
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lss_jax.audit import audit
    from lss_jax.cli import load_config
    from lss_jax.distributed import start
    from lss_jax.evaluate import evaluate
    from lss_jax.flax_attention import attention_fn
    from lss_jax.generate import generate
    from lss_jax.global_attention import dot_product_attention
    from lss_jax.mesh import make_mesh
    from lss_jax.trainer import Trainer

HOMES = {
    "Trainer": "trainer",
    "attention_fn": "flax_attention",
    "audit": "audit",
    "dot_product_attention": "global_attention",
    "evaluate": "evaluate",
    "generate": "generate",
    "load_config": "cli",
    "make_mesh": "mesh",
    "start": "distributed",
}
__all__ = [
    "Trainer",
    "attention_fn",
    "audit",
    "dot_product_attention",
    "evaluate",
    "generate",
    "load_config",
    "make_mesh",
    "start",
]


class _Package(ModuleType):
    """Some functions are called as the module that they are in, which is a command line; here the functions count."""

    def __getattr__(self, name: str) -> Any:
        if name not in HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{HOMES[name]}"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in HOMES and isinstance(value, ModuleType)):  # as the import of a submodule would have it
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *HOMES]


sys.modules[__name__].__class__ = _Package  # importing it imports nothing else
