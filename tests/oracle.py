"""The oracle: the same model written once more, plainly, for one device. It shares no code with `lss_jax`."""

import jax
import jax.numpy as jnp
import numpy as np


def logits(params, tokens_BL, model):
    """Logits `BLV`, float32; `model` is the model's section of the config."""
    x_BLE = params["tokens"]["table_VE"][tokens_BL]
    if model.positions == "learned":
        x_BLE = x_BLE + params["positions"]["table_LE"]
    for layer in range(model.layers):
        x_BLE = _block(jax.tree.map(lambda leaf, i=layer: leaf[i], params["stack"]["blocks"]), x_BLE, model)
    x_BLE = _norm(params["final_norm"], x_BLE)
    return x_BLE @ (params["tokens"]["table_VE"].T if model.tied_head else params["head"]["kernel_EV"])


def loss(params, tokens_BL, targets_BL, model):
    """Mean nats over the targets that are not -1."""
    log_probs_BLV = jax.nn.log_softmax(logits(params, tokens_BL, model))
    counted = targets_BL >= 0
    chosen = jnp.take_along_axis(log_probs_BLV, jnp.where(counted, targets_BL, 0)[..., None], -1)[..., 0]
    return -jnp.where(counted, chosen, 0.0).sum() / counted.sum()


def loss_and_gradient(params, batch, model):
    """On host copies of global arrays, on one device."""
    params, tokens_BL, targets_BL = jax.tree.map(np.asarray, (params, batch.tokens_BL, batch.targets_BL))
    with jax.default_device(jax.devices()[0]):
        return _loss_and_gradient(params, tokens_BL, targets_BL, model)


_loss_and_gradient = jax.jit(jax.value_and_grad(loss), static_argnums=3)


def _norm(p, x):
    centred = x - x.mean(-1, keepdims=True)
    return centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def _block(p, x_BLE, model):
    n = _norm(p["attention_norm"], x_BLE)
    a = p["attention"]
    q = jnp.tensordot(n, a["query"]["kernel"], 1) + a["query"]["bias"]
    k = jnp.tensordot(n, a["key"]["kernel"], 1)
    v = jnp.tensordot(n, a["value"]["kernel"], 1) + a["value"]["bias"]
    if model.positions == "rope":
        q, k = _rope(q), _rope(k)
    o = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    x_BLE = x_BLE + jnp.tensordot(o, a["out"]["kernel"], 2) + a["out"]["bias"]
    h = jax.nn.gelu(_norm(p["mlp_norm"], x_BLE) @ p["mlp"]["up"]["kernel"] + p["mlp"]["up"]["bias"])
    return x_BLE + h @ p["mlp"]["down"]["kernel"] + p["mlp"]["down"]["bias"]


def _rope(x_BLHK):
    """As a product of complex numbers."""
    L, K = x_BLHK.shape[1], x_BLHK.shape[3]
    turn_Lk = jnp.exp(1j * jnp.outer(jnp.arange(L), 10_000.0 ** (-2 * jnp.arange(K // 2) / K)))
    z = (x_BLHK[..., : K // 2] + 1j * x_BLHK[..., K // 2 :]) * turn_Lk[:, None, :]
    return jnp.concatenate((z.real, z.imag), -1)
