"""The oracle: the same model written once more, plainly, for one device. It shares no code with `lss_jax`."""

import jax
import jax.numpy as jnp
import numpy as np


def logits(params, tokens_BL, seen_BLL, model):
    """Logits `BLV`, float32; `model` is the model's section of the config, `seen_BLL` says which keys a token sees."""
    L = tokens_BL.shape[1]
    x_BLE = params["tokens"]["table_VE"][tokens_BL]
    if model.positions == "learned":
        x_BLE = x_BLE + params["positions"]["table_LE"]
    if model.positions == "sinusoidal":
        waves = jnp.exp(1j * jnp.outer(jnp.arange(L), 10_000.0 ** (-2 * jnp.arange(model.width // 2) / model.width)))
        x_BLE = x_BLE + 0.02 * jnp.concatenate((waves.imag, waves.real), -1)
    for layer in range(model.layers):
        params_of_layer = jax.tree.map(lambda leaf, i=layer: leaf[i], params["stack"]["blocks"])
        x_BLE = _block(params_of_layer, x_BLE, seen_BLL, model)
    x_BLE = _norm(params["final_norm"], x_BLE)
    return x_BLE @ (params["tokens"]["table_VE"].T if model.tied_head else params["head"]["kernel_EV"])


def loss(params, tokens_BL, targets_BL, seen_BLL, model):
    """Mean nats over the targets that are not -1."""
    return nats(params, tokens_BL, targets_BL, seen_BLL, model).sum() / (targets_BL >= 0).sum()


def nats(params, tokens_BL, targets_BL, seen_BLL, model):
    """`BL`; 0 for the targets that are -1."""
    log_probs_BLV = jax.nn.log_softmax(logits(params, tokens_BL, seen_BLL, model))
    counted = targets_BL >= 0
    chosen = jnp.take_along_axis(log_probs_BLV, jnp.where(counted, targets_BL, 0)[..., None], -1)[..., 0]
    return -jnp.where(counted, chosen, 0.0)


def loss_and_gradient(params, batch, config):
    """On host copies of global arrays, put in natural order and without padding, on one device."""
    params, inputs = jax.tree.map(np.asarray, params), plain_inputs(batch, config)
    with jax.default_device(jax.devices()[0]):
        return _loss_and_gradient(params, *inputs, config.model)


def by_position(params, batch, config):
    """Sums over the batch of nats and of targets that are not -1, `[2, L]`, in natural order."""
    params, (tokens_BL, targets_BL, seen_BLL) = jax.tree.map(np.asarray, params), plain_inputs(batch, config)
    with jax.default_device(jax.devices()[0]):
        nats_BL = _nats(params, tokens_BL, targets_BL, seen_BLL, config.model)
    return np.stack((np.asarray(nats_BL, np.float64).sum(0), (targets_BL >= 0).sum(0)))


def plain_inputs(batch, config):
    """Tokens, targets and what each token sees."""
    batch = jax.tree.map(np.asarray, batch)
    order = np.argsort(batch.positions)[: config.data.seq_len]
    tokens_BL, targets_BL = batch.tokens[:, order], batch.targets[:, order]
    i, j = np.ogrid[: len(order), : len(order)]
    prefix, window = config.attention.prefix, config.attention.window
    seen_BLL = ((j <= i) | (j < prefix))[None]
    if window:
        seen_BLL = seen_BLL & (j > i - window)
    if batch.documents is not None:
        begin_BL = batch.documents[0][:, order]
        seen_BLL = seen_BLL & (begin_BL[:, :, None] == begin_BL[:, None, :])
    if prefix:
        targets_BL = np.where(np.arange(len(order)) + 1 < prefix, -1, targets_BL)
    return tokens_BL, targets_BL, seen_BLL


_loss_and_gradient = jax.jit(jax.value_and_grad(loss), static_argnums=4)
_nats = jax.jit(nats, static_argnums=4)


def _norm(p, x):
    centred = x - x.mean(-1, keepdims=True)
    return centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def _block(p, x_BLE, seen_BLL, model):
    n = _norm(p["attention_norm"], x_BLE)
    a = p["attention"]
    q = jnp.tensordot(n, a["query"]["kernel"], 1) + a["query"]["bias"]
    k = jnp.tensordot(n, a["key"]["kernel"], 1)
    v = jnp.tensordot(n, a["value"]["kernel"], 1) + a["value"]["bias"]
    if model.positions == "rope":
        q, k = _rope(q, model), _rope(k, model)
    o = jax.nn.dot_product_attention(q, k, v, mask=seen_BLL[:, None])
    x_BLE = x_BLE + jnp.tensordot(o, a["out"]["kernel"], 2) + a["out"]["bias"]
    h = jax.nn.gelu(_norm(p["mlp_norm"], x_BLE) @ p["mlp"]["up"]["kernel"] + p["mlp"]["up"]["bias"])
    return x_BLE + h @ p["mlp"]["down"]["kernel"] + p["mlp"]["down"]["bias"]


def _rope(x_BLHK, model):
    """As a product of complex numbers."""
    L, K = x_BLHK.shape[1], x_BLHK.shape[3]
    position_L, base = jnp.arange(L), model.rope_base
    if model.rope_scaling == "linear":
        position_L = position_L / model.rope_factor
    if model.rope_scaling == "ntk":
        base = base * model.rope_factor ** (K / (K - 2))
    turn_Lk = jnp.exp(1j * jnp.outer(position_L, base ** (-2 * jnp.arange(K // 2) / K)))
    z = (x_BLHK[..., : K // 2] + 1j * x_BLHK[..., K // 2 :]) * turn_Lk[:, None, :]
    return jnp.concatenate((z.real, z.imag), -1)
