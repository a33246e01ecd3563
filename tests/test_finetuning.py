"""Frozen parameters and low-rank adapters, against the oracle: loss, the gradient of what is trained, and nothing else.

The oracle knows no adapters' products: it adds the factors' product to the kernel first (`oracle.plain`).
"""

import dataclasses

import jax
import numpy as np
import oracle
import pytest
from helpers import (
    assert_close,
    batch_on,
    change,
    check_against_oracle,
    model_on,
    perturbed_params,
    sampled,
    small_config,
    windows_of,
)

from lss_jax.config.schema import ConfigError
from lss_jax.inspection import operations
from lss_jax.models import build_model
from lss_jax.models.layers import merged
from lss_jax.training.optimizer import make_optimizer
from lss_jax.training.setup import validate
from lss_jax.training.state import init_state
from lss_jax.training.step import make_eval_step, make_train_step, trace_train_step

LLAMA = {
    "model__norm": "rms",
    "model__mlp": "swiglu",
    "model__bias": False,
    "model__tied_head": False,
    "model__positions": "rope",
    "model__heads": 16,
    "model__kv_heads": 8,
    "model__mlp_width": 88,
}
LORA = {"lora__rank": 3, "lora__targets": "*"}
TUNED = {  # changes of the config, and which names then have a gradient
    "adapters": (LORA, lambda name: "/lora_" in name),
    "two adapters": ({"lora__rank": 2, "lora__targets": "query, mlp/d*"}, lambda name: "/lora_" in name),
    "adapters and norms": ({**LORA, "optim__frozen": "*/kernel,tokens/*,head/*"}, lambda name: "lora_" in name or "norm" in name),
    "embedding frozen": ({"optim__frozen": "tokens/*"}, lambda name: not name.startswith("tokens")),
    "layers frozen": ({"optim__frozen": "stack/*"}, lambda name: not name.startswith("stack")),
    "head alone": ({"optim__frozen": "stack/*,tokens/*,final_norm/*"}, lambda name: name.startswith("head")),
}


@pytest.mark.parametrize("name", ["adapters","head alone"])
def test_gradient_equals_the_oracle(name):
    changes, learns = TUNED[name]
    check_against_oracle(2, 2, 2, **LLAMA, **changes, learns=learns)
