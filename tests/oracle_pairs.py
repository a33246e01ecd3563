"""The oracle of encoder-decoders: pairs of token lists, and the model written once more, plainly, for one device."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle


def loss_and_gradient(params, pairs, config):
    """Mean nats over all tokens of all targets, and its gradient; `pairs` are lists of tokens, of source and target."""
    params, inputs = jax.tree.map(np.asarray, params), plain_inputs(pairs, config)
    with jax.default_device(jax.devices()[0]):
        return _loss_and_gradient(params, *inputs, config.model)


def plain_inputs(pairs, config):
    """Sources, tokens and targets, and what each token sees: `BSS` of the source, `BLL` of the target, `BLS` across."""
    B, S, L = len(pairs), config.data.source_len, config.data.seq_len
    source_BS, tokens_BL, targets_BL = np.zeros((B, S), int), np.zeros((B, L), int), np.full((B, L), -1)
    seen_BSS, seen_BLL, seen_BLS = np.zeros((B, S, S), bool), np.zeros((B, L, L), bool), np.zeros((B, L, S), bool)
    for row, (source, target) in enumerate(pairs):
        source, target = source[:S], target[:L]
        s, t = len(source), len(target)
        source_BS[row, :s], targets_BL[row, :t] = source, target
        tokens_BL[row, :t] = [config.model.vocab - 1, *target][:t]
        seen_BSS[row, :s, :s] = seen_BLS[row, :t, :s] = True
        seen_BLL[row, :t, :t] = np.tri(t)
    return source_BS, tokens_BL, targets_BL, seen_BSS, seen_BLL, seen_BLS


def logits(params, source_BS, tokens_BL, seen_BSS, seen_BLL, seen_BLS, model):
    """`BLV`, float32"""
    position_S, position_L = jnp.arange(source_BS.shape[1])[None], jnp.arange(tokens_BL.shape[1])[None]
    y_BSE = oracle.embedded(params, "source_positions", source_BS, model, position_S)
    for p in oracle.layers(params["encoder"]["blocks"]):
        y_BSE = oracle.mlp(p, y_BSE + oracle.attention(p, y_BSE, seen_BSS, model, position_S), model)
    y_BSE = oracle.norm(params["encoder_norm"], y_BSE, model)
    x_BLE = oracle.embedded(params, "positions", tokens_BL, model, position_L)
    for p in oracle.layers(params["stack"]["blocks"]):
        x_BLE = x_BLE + oracle.attention(p, x_BLE, seen_BLL, model, position_L)
        n_BLE = oracle.norm(p["cross_norm"], x_BLE, model)
        attended = oracle.attended(p["cross_attention"], n_BLE, y_BSE, seen_BLS, model, position_L, position_S)
        x_BLE = oracle.mlp(p, x_BLE + attended, model)
    x_BLE = oracle.norm(params["final_norm"], x_BLE, model)
    return x_BLE @ (params["head"]["kernel_EV"] if "head" in params else params["tokens"]["table_VE"].T)


def _loss(params, source_BS, tokens_BL, targets_BL, seen_BSS, seen_BLL, seen_BLS, model):
    log_probs_BLV = jax.nn.log_softmax(logits(params, source_BS, tokens_BL, seen_BSS, seen_BLL, seen_BLS, model))
    counted = targets_BL >= 0
    chosen = jnp.take_along_axis(log_probs_BLV, jnp.where(counted, targets_BL, 0)[..., None], -1)[..., 0]
    return -jnp.where(counted, chosen, 0.0).sum() / counted.sum()


_loss_and_gradient = jax.jit(jax.value_and_grad(_loss), static_argnums=7)
