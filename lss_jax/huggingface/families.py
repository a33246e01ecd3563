"""The families that come in and go out: for each, its tensors' names beside ours, and its keys beside ours.

A new family is one table of names, one of keys, and one line in `FAMILIES`. Ours are those of `models/decoder.py`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Theirs(NamedTuple):
    """A tensor of theirs, or a third of one, for one of our parameters; `{}` is the number of the layer."""

    name: str
    inputs: int = 1  # of our axes, this many are their rows and the rest their columns; 0: a vector of all
    transposed: bool = False  # or columns and rows, as in PyTorch's linear maps
    third: int | None = None  # of queries, keys and values that are fused along the last axis


class Family(NamedTuple):
    """What `config.json` and the tensors of a family are called, and what about it cannot be otherwise."""

    architecture: str  # of the class with a language model's head
    tensors: Mapping[str, Theirs]  # by the names of our parameters
    keys: Mapping[str, str]  # our config's keys and theirs of the same meaning
    ours: Mapping[str, Any]  # our keys that this family settles, with their values
    theirs: Mapping[str, Any]  # their keys for which only these values, the defaults, are built here
    defaults: Mapping[str, Any]  # of their keys that `config.json` may leave out; others are mandatory
    rotary: bool = True  # whether it has the keys of rotary positions
    window: str = ""  # "": none; "always": `sliding_window` counts; "if used": only with `use_sliding_window`
    ignored: tuple[str, ...] = ()  # endings of tensors' names that hold constants, which some old files have


def _linear(name: str, inputs: int = 1) -> Theirs:
    """The kernel of a PyTorch `Linear`."""
    return Theirs(f"{name}.weight", inputs, transposed=True)


def _vector(name: str, third: int | None = None) -> Theirs:
    return Theirs(name, inputs=0, third=third)


LLAMA = {
    "tokens/table_VE": Theirs("model.embed_tokens.weight"),
    "stack/blocks/attention_norm/scale": _vector("model.layers.{}.input_layernorm.weight"),
    "stack/blocks/attention/query/kernel": _linear("model.layers.{}.self_attn.q_proj"),
    "stack/blocks/attention/key/kernel": _linear("model.layers.{}.self_attn.k_proj"),
    "stack/blocks/attention/value/kernel": _linear("model.layers.{}.self_attn.v_proj"),
    "stack/blocks/attention/out/kernel": _linear("model.layers.{}.self_attn.o_proj", inputs=2),
    "stack/blocks/mlp_norm/scale": _vector("model.layers.{}.post_attention_layernorm.weight"),
    "stack/blocks/mlp/gate/kernel": _linear("model.layers.{}.mlp.gate_proj"),
    "stack/blocks/mlp/up/kernel": _linear("model.layers.{}.mlp.up_proj"),
    "stack/blocks/mlp/down/kernel": _linear("model.layers.{}.mlp.down_proj"),
    "final_norm/scale": _vector("model.norm.weight"),
    "head/kernel_EV": _linear("lm_head"),
}
QWEN2 = LLAMA | {
    "stack/blocks/attention/query/bias": _vector("model.layers.{}.self_attn.q_proj.bias"),
    "stack/blocks/attention/key/bias": _vector("model.layers.{}.self_attn.k_proj.bias"),
    "stack/blocks/attention/value/bias": _vector("model.layers.{}.self_attn.v_proj.bias"),
}
QWEN3 = LLAMA | {
    "stack/blocks/attention/query_norm/scale": _vector("model.layers.{}.self_attn.q_norm.weight"),
    "stack/blocks/attention/key_norm/scale": _vector("model.layers.{}.self_attn.k_norm.weight"),
}
GPT2 = {
    "tokens/table_VE": Theirs("transformer.wte.weight"),
    "positions/table_LE": Theirs("transformer.wpe.weight"),
    "stack/blocks/attention_norm/scale": _vector("transformer.h.{}.ln_1.weight"),
    "stack/blocks/attention_norm/bias": _vector("transformer.h.{}.ln_1.bias"),
    "stack/blocks/attention/query/kernel": Theirs("transformer.h.{}.attn.c_attn.weight", third=0),
    "stack/blocks/attention/query/bias": _vector("transformer.h.{}.attn.c_attn.bias", third=0),
    "stack/blocks/attention/key/kernel": Theirs("transformer.h.{}.attn.c_attn.weight", third=1),
    "stack/blocks/attention/key/bias": _vector("transformer.h.{}.attn.c_attn.bias", third=1),
    "stack/blocks/attention/value/kernel": Theirs("transformer.h.{}.attn.c_attn.weight", third=2),
    "stack/blocks/attention/value/bias": _vector("transformer.h.{}.attn.c_attn.bias", third=2),
    "stack/blocks/attention/out/kernel": Theirs("transformer.h.{}.attn.c_proj.weight", inputs=2),
    "stack/blocks/attention/out/bias": _vector("transformer.h.{}.attn.c_proj.bias"),
    "stack/blocks/mlp_norm/scale": _vector("transformer.h.{}.ln_2.weight"),
    "stack/blocks/mlp_norm/bias": _vector("transformer.h.{}.ln_2.bias"),
    "stack/blocks/mlp/up/kernel": Theirs("transformer.h.{}.mlp.c_fc.weight"),
    "stack/blocks/mlp/up/bias": _vector("transformer.h.{}.mlp.c_fc.bias"),
    "stack/blocks/mlp/down/kernel": Theirs("transformer.h.{}.mlp.c_proj.weight"),
    "stack/blocks/mlp/down/bias": _vector("transformer.h.{}.mlp.c_proj.bias"),
    "final_norm/scale": _vector("transformer.ln_f.weight"),
    "final_norm/bias": _vector("transformer.ln_f.bias"),
    "head/kernel_EV": _linear("lm_head"),
}

LLAMA_KEYS = {
    "model.vocab": "vocab_size",
    "model.layers": "num_hidden_layers",
    "model.width": "hidden_size",
    "model.heads": "num_attention_heads",
    "model.kv_heads": "num_key_value_heads",
    "model.head_width": "head_dim",
    "model.mlp_width": "intermediate_size",
    "model.norm_epsilon": "rms_norm_eps",
    "model.tied_head": "tie_word_embeddings",
}
LLAMA_OURS = {
    "model.family": "decoder",
    "model.norm": "rms",
    "model.mlp": "swiglu",
    "model.bias": False,
    "model.qkv_bias": False,
    "model.qk_norm": False,
    "model.positions": "rope",
    "model.rope_columns": 0,
}
LLAMA_THEIRS = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
LLAMA_DEFAULTS = {
    "num_key_value_heads": None,  # as many as heads
    "head_dim": None,  # width / heads
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
LLAMA_IGNORED = (".rotary_emb.inv_freq",)

GPT2_KEYS = {
    "model.vocab": "vocab_size",
    "data.seq_len": "n_positions",
    "model.layers": "n_layer",
    "model.width": "n_embd",
    "model.heads": "n_head",
    "model.mlp_width": "n_inner",
    "model.norm_epsilon": "layer_norm_epsilon",
    "model.tied_head": "tie_word_embeddings",
}
GPT2_OURS = {
    "model.family": "decoder",
    "model.norm": "layer",
    "model.mlp": "gelu",
    "model.bias": True,
    "model.qkv_bias": True,
    "model.qk_norm": False,
    "model.positions": "learned",
}
GPT2_THEIRS = {
    "activation_function": "gelu_new",
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
GPT2_DEFAULTS = {
    "n_inner": None,  # 4 * width
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
}
GPT2_IGNORED = (".attn.bias", ".attn.masked_bias")

FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM", LLAMA, LLAMA_KEYS, LLAMA_OURS, LLAMA_THEIRS, LLAMA_DEFAULTS, ignored=LLAMA_IGNORED
    ),
    "mistral": Family(
        "MistralForCausalLM",
        LLAMA,
        LLAMA_KEYS,
        LLAMA_OURS,
        {"hidden_act": "silu"},
        {**LLAMA_DEFAULTS, "sliding_window": 4096},
        window="always",
        ignored=LLAMA_IGNORED,
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        QWEN2,
        LLAMA_KEYS,
        {**LLAMA_OURS, "model.qkv_bias": True},
        {"hidden_act": "silu"},
        LLAMA_DEFAULTS,
        window="if used",
        ignored=LLAMA_IGNORED,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        QWEN3,
        LLAMA_KEYS,
        {**LLAMA_OURS, "model.qk_norm": True},
        {"hidden_act": "silu", "attention_bias": False},
        {**LLAMA_DEFAULTS, "head_dim": 128},
        window="if used",
        ignored=LLAMA_IGNORED,
    ),
    "gpt2": Family(
        "GPT2LMHeadModel", GPT2, GPT2_KEYS, GPT2_OURS, GPT2_THEIRS, GPT2_DEFAULTS, rotary=False, ignored=GPT2_IGNORED
    ),
}
