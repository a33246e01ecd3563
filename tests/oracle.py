"""The oracle: text, model, optimizer and dropout written once more, plainly, for one device.

It shares no code with `lss_jax`, which a test enforces: windows come from the bytes themselves, not from the loader.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Windows(NamedTuple):
    """A batch before any loader: the whole text, and where each row's window of it starts."""

    data: np.ndarray
    starts_B: np.ndarray


class PackedWindows(NamedTuple):
    """The same of documents: lists of tokens, each with the number of those at its start that are given, not learned.

    `data` is all of them, one after the other.
    """

    data: np.ndarray
    starts_B: np.ndarray
    documents: list[tuple[list[int], int]]


def logits(params, tokens_BL, seen_BLL, model, position_BL=None):
    """Logits `BLV`, float32, from the features."""
    x_BLE = features(params, tokens_BL, seen_BLL, model, position_BL)
    return x_BLE @ (params["head"]["kernel_EV"] if "head" in params else params["tokens"]["table_VE"].T)


def features(params, tokens_BL, seen_BLL, model, position_BL=None):
    """What goes into the head, `BLE`, float32.

    `model` is the model's section of the config, `seen_BLL` says which keys a token sees. Positions count from the
    start of the window, unless they are given.
    """
    L = tokens_BL.shape[1]
    position_BL = jnp.arange(L)[None] if position_BL is None else position_BL
    x_BLE = params["tokens"]["table_VE"][tokens_BL]
    if model.positions == "learned":
        x_BLE = x_BLE + params["positions"]["table_LE"][position_BL]
    if model.positions == "sinusoidal":
        waves = jnp.exp(1j * jnp.outer(jnp.arange(L), 10_000.0 ** (-2 * jnp.arange(model.width // 2) / model.width)))
        x_BLE = x_BLE + 0.02 * jnp.concatenate((waves.imag, waves.real), -1)[position_BL]
    for layer in range(model.layers):
        params_of_layer = jax.tree.map(lambda leaf, i=layer: leaf[i], params["stack"]["blocks"])
        x_BLE = _block(params_of_layer, x_BLE, seen_BLL, model, position_BL)
    return _norm(params["final_norm"], x_BLE, model)


def plain(params, lora):
    """Parameters without adapters: a kernel is the sum of what it was and its adapter's matrices, multiplied."""
    if not isinstance(params, dict):
        return params
    if "lora_a" not in params:
        return {name: plain(part, lora) for name, part in params.items()}
    kernel, a, b = params["kernel"], params["lora_a"], params["lora_b"]
    layers, rank = a.shape[0], a.shape[-1]
    product = a.reshape(layers, -1, rank) @ b.reshape(layers, rank, -1)
    bias = {"bias": params["bias"]} if "bias" in params else {}
    return {"kernel": kernel + lora.alpha / lora.rank * product.reshape(kernel.shape), **bias}


def those(tree, wanted, name=""):
    """The leaves of a nested dict whose names, such as `stack/blocks/mlp/up/kernel`, are `wanted`."""
    found = {}
    for key, part in tree.items():
        path = f"{name}/{key}" if name else key
        if not isinstance(part, dict):
            found |= {key: part} if wanted(path) else {}
        elif inner := those(part, wanted, path):
            found[key] = inner
    return found


def loss(params, tokens_BL, targets_BL, seen_BLL, position_BL, model):
    """Mean nats over the targets that are not -1."""
    return nats(params, tokens_BL, targets_BL, seen_BLL, position_BL, model).sum() / (targets_BL >= 0).sum()


def nats(params, tokens_BL, targets_BL, seen_BLL, position_BL, model):
    """`BL`; 0 for the targets that are -1."""
    log_probs_BLV = jax.nn.log_softmax(logits(params, tokens_BL, seen_BLL, model, position_BL))
    counted = targets_BL >= 0
    chosen = jnp.take_along_axis(log_probs_BLV, jnp.where(counted, targets_BL, 0)[..., None], -1)[..., 0]
    return -jnp.where(counted, chosen, 0.0)


def loss_and_gradient(params, windows, config):
    """On host copies of global arrays, on one device."""
    params, inputs = jax.tree.map(np.asarray, params), plain_inputs(windows, config)
    with jax.default_device(jax.devices()[0]):
        return _loss_and_gradient(params, *inputs, config.model, config.lora)


def by_position(params, windows, config):
    """Sums over the batch of nats and of targets that are not -1, `[2, L]`."""
    params, inputs = jax.tree.map(np.asarray, params), plain_inputs(windows, config)
    _, targets_BL, *_ = inputs
    with jax.default_device(jax.devices()[0]):
        nats_BL = _nats(plain(params, config.lora), *inputs, config.model)
    return np.stack((np.asarray(nats_BL, np.float64).sum(0), (targets_BL >= 0).sum(0)))


def plain_inputs(windows, config):
    """Tokens, targets, what each token sees, and its position.

    A target is the next token; -1 where the text has ended, where the next token begins a document or is given in it,
    and in the prefix.
    """
    data, L = windows.data, config.data.seq_len
    place_BM = windows.starts_B[:, None] + np.arange(L + 1)
    there_BM = place_BM < len(data)
    byte_BM = np.where(there_BM, data[np.minimum(place_BM, len(data) - 1)], 0).astype(np.int32)
    tokens_BL, targets_BL = byte_BM[:, :-1], np.where(there_BM[:, 1:], byte_BM[:, 1:], -1)
    i, j = np.ogrid[:L, :L]
    prefix, window = config.attention.prefix, config.attention.window
    seen_BLL = ((j <= i) | (j < prefix))[None]
    if window:
        seen_BLL = seen_BLL & (j > i - window)
    position_BL = np.tile(np.arange(L), (len(tokens_BL), 1))
    if config.data.separator or isinstance(windows, PackedWindows):
        document, given = _document_of_tokens(windows, config.data.separator.encode())
        document_BM, given_BM = (each[np.minimum(place_BM, len(data))] for each in (document, given))
        seen_BLL = seen_BLL & (document_BM[:, :-1, None] == document_BM[:, None, :-1])
        targets_BL = np.where((document_BM[:, 1:] == document_BM[:, :-1]) & ~given_BM[:, 1:], targets_BL, -1)
        if config.data.restart_positions:
            before_BLL = document_BM[:, :-1, None] == document_BM[:, None, :-1]
            position_BL = (before_BLL & (j < i)).sum(-1)
    if prefix:
        targets_BL = np.where(np.arange(L) + 1 < prefix, -1, targets_BL)
    return tokens_BL, targets_BL, seen_BLL, position_BL


def _document_of_tokens(windows, separator):
    """The number of the document of each token, and of the one after the last, and whether each is given."""
    if isinstance(windows, Windows):
        number = document_of_bytes(windows.data.tobytes(), separator)
        return number, np.zeros(len(number), bool)
    number = [n for n, (tokens, _) in enumerate(windows.documents) for _ in tokens]
    given = [place < count for tokens, count in windows.documents for place in range(len(tokens))]
    return np.array([*number, number[-1]]), np.array([*given, False])


def document_of_bytes(text: bytes, separator: bytes) -> np.ndarray:
    """The number of each byte's document, and of the byte after the last: each document ends with the separator."""
    documents = text.split(separator)
    lengths = [len(document) + len(separator) for document in documents[:-1]] + [len(documents[-1]) + 1]
    return np.repeat(np.arange(len(lengths)), lengths)


def learning_rate(step: int, optim) -> float:
    """Linear from 0 up to its peak over the warm-up, then half a cosine down to a tenth of it at the last step."""
    if step < optim.warmup_steps:
        return optim.learning_rate * step / optim.warmup_steps
    done = (step - optim.warmup_steps) / (optim.steps - optim.warmup_steps)
    return optim.learning_rate * (0.1 + 0.9 * (1 + np.cos(np.pi * done)) / 2)


def adamw(params, gradient, moments, step: int, optim) -> tuple[Any, Any]:
    """Parameters and moments after step `step`, the first being 0, in float64.

    Loshchilov & Hutter 2019 (arXiv 1711.05101), algorithm 2, on a gradient no longer than `clip_norm`. Matrices, those
    of adapters too, and tables decay, biases and norms do not.
    """
    first, second = moments
    gradient = _clipped(gradient, optim)
    first = jax.tree.map(lambda m, g: optim.beta1 * m + (1 - optim.beta1) * g, first, gradient)
    second = jax.tree.map(lambda v, g: optim.beta2 * v + (1 - optim.beta2) * g**2, second, gradient)

    def moved(path, p, m, v):
        decay = optim.weight_decay if path[-1].key.startswith(("kernel", "table", "lora")) else 0.0
        m, v = m / (1 - optim.beta1 ** (step + 1)), v / (1 - optim.beta2 ** (step + 1))
        return p - learning_rate(step, optim) * (m / (np.sqrt(v) + 1e-8) + decay * p)

    return jax.tree_util.tree_map_with_path(moved, params, first, second), (first, second)


def muon(params, gradient, moments, step: int, optim) -> tuple[Any, Any]:
    """Parameters and moments after step `step`: Muon (Jordan et al. 2024) for kernels, Adam for the rest, in float64.

    Both with Nesterov momentum. A kernel's update is as large as AdamW's (Liu et al. 2025, arXiv 2502.16982), and it
    alone decays.
    """
    first, second = moments
    gradient, b1, b2 = _clipped(gradient, optim), optim.beta1, optim.beta2
    first = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, first, gradient)
    second = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g**2, second, gradient)
    rate = learning_rate(step, optim)

    def moved(path, p, g, m, v):
        ahead = b1 * m / (1 - b1 ** (step + 2)) + (1 - b1) * g / (1 - b1 ** (step + 1))
        if path[-1].key != "kernel":
            return p - rate * ahead / (np.sqrt(v / (1 - b2 ** (step + 1))) + 1e-8)
        by_heads = path[-2].key in ("query", "key", "value")  # [layers, E, H, K]: a matrix for each layer and head
        ahead = ahead.swapaxes(1, 2) if by_heads else ahead
        update = np.stack([_orthogonal(matrix) for matrix in ahead.reshape(-1, *ahead.shape[-2:])])
        update = 0.2 * max(update.shape[1:]) ** 0.5 * update.reshape(ahead.shape)
        return p - rate * ((update.swapaxes(1, 2) if by_heads else update) + optim.weight_decay * p)

    return jax.tree_util.tree_map_with_path(moved, params, gradient, first, second), (first, second)


def lion(params, gradient, moments, step: int, optim) -> tuple[Any, Any]:
    """Parameters and moments after step `step`: Lion (Chen et al. 2023, arXiv 2302.06675, algorithm 2), in float64."""
    moment, unused = moments
    gradient, b1, b2 = _clipped(gradient, optim), optim.beta1, optim.beta2

    def moved(path, p, m, g):
        decay = optim.weight_decay if path[-1].key.startswith(("kernel", "table")) else 0.0
        return p - learning_rate(step, optim) * (np.sign(b1 * m + (1 - b1) * g) + decay * p)

    params = jax.tree_util.tree_map_with_path(moved, params, moment, gradient)
    return params, (jax.tree.map(lambda m, g: b2 * m + (1 - b2) * g, moment, gradient), unused)


OPTIMIZERS = {"adamw": adamw, "lion": lion, "muon": muon}


def _clipped(gradient, optim):
    """In float64, and no longer than `clip_norm`."""
    gradient = jax.tree.map(lambda g: np.asarray(g, np.float64), gradient)
    length = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(gradient)))
    return jax.tree.map(lambda g: g * min(1.0, optim.clip_norm / length), gradient)


def _orthogonal(matrix):
    """The quintic Newton-Schulz iteration of Jordan et al. 2024."""
    x = matrix / np.linalg.norm(matrix)
    x = x.T if matrix.shape[0] > matrix.shape[1] else x
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def dropout_factors(rate: float, key: int, rows: int, heads: int, length: int) -> np.ndarray:
    """What dropout multiplies each attention weight by, `[B, H, L, L]`: 0, or a bit more than 1.

    A weight is dropped if the hash of its row, query, head and key, in this order, is among the lowest.
    """
    row, head, query, of_key = np.ogrid[:rows, :heads, :length, :length]
    kept = hashed(key, row, query, head, of_key) >= np.uint32(np.float32(rate) * 2.0**32)
    return np.where(kept, np.float32(1) / (np.float32(1) - np.float32(rate)), np.float32(0))


def hashed(key: int, *coordinates) -> np.ndarray:
    """32 bits: each coordinate in turn through the finalizer of MurmurHash3."""

    def mixed(x):
        x = np.asarray(x).astype(np.uint32) + np.uint32(0x9E3779B9)
        x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
        x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
        return x ^ (x >> np.uint32(16))

    found = np.full(1, key, np.uint32)  # an array, which overflows in silence
    for coordinate in coordinates:
        found = mixed(found ^ mixed(np.atleast_1d(coordinate)))
    return found


def _loss_of_all(params, tokens_BL, targets_BL, seen_BLL, position_BL, model, lora):
    return loss(plain(params, lora), tokens_BL, targets_BL, seen_BLL, position_BL, model)


_loss_and_gradient = jax.jit(jax.value_and_grad(_loss_of_all), static_argnums=(5, 6))
_nats = jax.jit(nats, static_argnums=5)


def _norm(p, x, model):
    if model.norm == "layer":
        x = x - x.mean(-1, keepdims=True)
    return _biased(x / jnp.sqrt((x**2).mean(-1, keepdims=True) + model.norm_epsilon) * p["scale"], p)


def _biased(x, p):
    return x + p["bias"] if "bias" in p else x


def _linear(p, x, axes=1):
    return _biased(jnp.tensordot(x, p["kernel"], axes), p)


def _block(p, x_BLE, seen_BLL, model, position_BL):
    n = _norm(p["attention_norm"], x_BLE, model)
    q, k, v = (_linear(p["attention"][name], n) for name in ("query", "key", "value"))
    if model.qk_norm:
        q, k = (
            x / jnp.sqrt((x**2).mean(-1, keepdims=True) + model.norm_epsilon) * p["attention"][f"{name}_norm"]["scale"]
            for x, name in ((q, "query"), (k, "key"))
        )
    if model.positions == "rope":
        q, k = _rope(q, model, position_BL), _rope(k, model, position_BL)
    o = jax.nn.dot_product_attention(q, k, v, mask=seen_BLL[:, None])
    x_BLE = x_BLE + _linear(p["attention"]["out"], o, 2)
    n, mlp = _norm(p["mlp_norm"], x_BLE, model), p["mlp"]
    up = _linear(mlp["up"], n)
    h = up * _linear(mlp["gate"], n) * jax.nn.sigmoid(_linear(mlp["gate"], n)) if "gate" in mlp else jax.nn.gelu(up)
    return x_BLE + _linear(mlp["down"], h)


def _rope(x_BLHK, model, position_BL):
    """As a product of complex numbers."""
    L, K = x_BLHK.shape[1], x_BLHK.shape[3]
    turn_Lk = jnp.exp(1j * jnp.outer(jnp.arange(L), rope_frequencies(model, K))) * rope_length(model)
    z = (x_BLHK[..., : K // 2] + 1j * x_BLHK[..., K // 2 :]) * turn_Lk[position_BL][:, :, None, :]
    return jnp.concatenate((z.real, z.imag), -1)


def rope_frequencies(model, K):
    """Radians per token, pair by pair."""
    return np.array([_rope_frequency(model, K, pair) for pair in range(K // 2)])


def _rope_frequency(model, K, pair):
    base, factor, original = model.rope_base, model.rope_factor, model.rope_original
    frequency = base ** (-2 * pair / K)
    if model.rope_scaling == "linear":
        return frequency / factor
    if model.rope_scaling == "ntk":
        return (base * factor ** (K / (K - 2))) ** (-2 * pair / K)
    if model.rope_scaling == "yarn":  # pairs from the one that rotates `high` times to that which rotates `low` times

        def pair_with(rotations):
            return K / 2 * np.log(original / (2 * np.pi * rotations)) / np.log(base)

        first = max(np.floor(pair_with(model.rope_high)), 0)
        last = min(np.ceil(pair_with(model.rope_low)), K - 1)
        kept = 1 - min(max((pair - first) / max(last - first, 1e-3), 0), 1)
        return frequency * kept + frequency / factor * (1 - kept)
    if model.rope_scaling == "llama3":
        rotations = original * frequency / (2 * np.pi)
        if rotations < model.rope_low:
            return frequency / factor
        if rotations > model.rope_high:
            return frequency
        kept = (rotations - model.rope_low) / (model.rope_high - model.rope_low)
        return frequency * kept + frequency / factor * (1 - kept)
    return frequency


def rope_length(model):
    if model.rope_attention_factor:
        return model.rope_attention_factor
    return 0.1 * np.log(model.rope_factor) + 1 if model.rope_scaling == "yarn" else 1.0
