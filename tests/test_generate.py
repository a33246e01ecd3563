"""Generated text: logits as of a full forward pass, a cache that stays cut, and one text whatever the mesh."""

from collections import Counter
from functools import cache

import jax
import numpy as np
import oracle
import pytest
from helpers import model_on, random_bytes, relative_error, sampled, with_shapes

from lss_jax.generation.cache import Cache
from lss_jax.generation.decode import Generation
from lss_jax.generation.programs import make_prefill, make_step
from lss_jax.generation.sampling import Sampling
from lss_jax.inspection import hlo
from lss_jax.parallel.layout import layout_on
from lss_jax.training.state import param_shardings

GREEDY = Sampling(0.0, None, 1.0, seed=0)
DRAWN = Sampling(0.9, 50, 0.95, seed=3)
BOUND = 1e-5  # float32; relative to the largest logit


def large_params(model, mesh):
    """Large enough that attention matters, the same on every mesh."""

    def create():
        return jax.tree.map(lambda p: p * 3.0, model.init(jax.random.key(1)))

    return jax.jit(create, out_shardings=param_shardings(model, mesh))()


# Logits

STEPS = 7  # tokens behind each prompt, given and not drawn
TEXTS = [random_bytes(length + STEPS, seed=length) for length in (19, 13, 17, 16)]
VARIANTS = {
    "learned": {},
    "rope, grouped, window": {
        **{"model__positions": "rope", "model__kv_heads": 12, "attention__window": 9},
        "data__seq_len": 16,  # they go on beyond the trained length
    },
    "sinusoidal, prefix": {"model__positions": "sinusoidal", "attention__prefix": 12, "data__seq_len": 16},
    "learned, padded, prefix": {"attention__prefix": 13, "data__seq_len": 29},
    "none, untied, remat": {"model__positions": "none", "model__tied_head": False, "model__remat": "block"},
    "ntk, one head, dense": {
        **{"model__positions": "rope", "model__rope_scaling": "ntk", "model__rope_factor": 2.0},
        **{"model__kv_heads": 1, "attention__kernel": "dense"},
    },
    "vocabulary in shares": {"model__vocab_parallel": True, "model__vocab": 263},
    "documents": {"data__separator": "\x00"},
    "weights in shares": {
        **{"mesh__shard": "all", "attention__head_groups": 2, "model__remat": "offload", "model__tile": 4},
        **{"model__positions": "rope", "model__mlp_width": 50},
    },
}


def logits_of_steps(model, mesh, params) -> np.ndarray:
    """`[B, STEPS, V]`, of the prompts' last tokens and of those behind them."""
    lengths = [len(text) - STEPS for text in TEXTS]
    padded = layout_on(model.config, mesh).padded(max(lengths))
    tokens_BL = np.stack([np.pad(text[:n], (0, padded - n)) for text, n in zip(TEXTS, lengths, strict=True)])
    cache = jax.jit(make_prefill(model, mesh, STEPS))(params, tokens_BL.astype(np.int32), np.array(lengths))
    step = jax.jit(make_step(model, mesh, padded), donate_argnums=1)
    logits = []
    for number in range(STEPS):
        position_B = np.array(lengths) - 1 + number
        token_B = np.array([text[p] for text, p in zip(TEXTS, position_B, strict=True)], np.int32)
        cache, logits_BV = step(params, cache, token_B, position_B, np.int32(number))
        logits.append(np.asarray(logits_BV))
    assert_every_token_is_there_once(cache, lengths)
    return np.stack(logits, axis=1)


def assert_every_token_is_there_once(cache: Cache, lengths):
    for position_c, length in zip(np.asarray(cache.position_Bc), lengths, strict=True):
        assert sorted(position_c[position_c >= 0]) == list(range(length - 1 + STEPS))


def logits_of_full_pass(config, params) -> np.ndarray:
    """The same by the oracle, a whole text at a time."""
    rows = []
    for text in TEXTS:
        L = config.data.seq_len if config.model.positions == "learned" else max(map(len, TEXTS))
        i, j = np.ogrid[:L, :L]
        seen_LL = (j <= i) | (j < config.attention.prefix)
        if config.attention.window:
            seen_LL = seen_LL & (j > i - config.attention.window)
        tokens_1L = np.pad(text, (0, L - len(text)))[None].astype(np.int32)
        with jax.default_device(jax.devices()[0]):
            logits_LV = np.asarray(FULL_PASS(params, tokens_1L, seen_LL[None], config.model)[0])
        rows.append(logits_LV[len(text) - STEPS - 1 : len(text) - 1])
    return np.stack(rows)


FULL_PASS = jax.jit(oracle.logits, static_argnums=3)


def check_logits(sizes, variant, **changes):
    wide = {"model__width": 96, "model__heads": 24}  # 2, 3 and 8 devices divide the heads, for Ulysses
    model, mesh = model_on(*sizes, **wide, **VARIANTS[variant], **changes)
    params = large_params(model, mesh)
    expected = logits_of_full_pass(model.config, with_shapes(jax.tree.map(np.asarray, params), model.natural_shapes))
    assert relative_error(logits_of_steps(model, mesh, params), expected) < BOUND


def cases():
    strategies = {"lss": "zigzag", "ring": "contiguous", "ulysses": "zigzag"}
    sample = [
        ((1, 8), "lss", "zigzag", "learned"),
        ((1, 8), "ring", "contiguous", "rope, grouped, window"),
        ((1, 3), "ulysses", "zigzag", "learned, padded, prefix"),
        ((2, 2, 2), "lss", "zigzag", "vocabulary in shares"),
        ((1, 3), "lss", "zigzag", "weights in shares"),
    ]
    grid = [((1, 1), "lss", "zigzag", "rope, grouped, window")]
    grid += [
        (sizes, strategy, layout, variant)
        for sizes in ((1, 2), (1, 3), (1, 8))
        for strategy in strategies
        for layout in ("contiguous", "zigzag")
        for variant in ("learned", "rope, grouped, window")
    ]
    grid += [((2, 4), "lss", "zigzag", variant) for variant in VARIANTS]
    grid += [((2, 4), s, strategies[s], v) for s in ("ring", "ulysses") for v in VARIANTS if "dense" not in v]
    grid += [((1, 2, 2), "lss", "zigzag", variant) for variant in VARIANTS if "one head" not in variant]
    return sampled(list(dict.fromkeys(sample + grid)), sample)


@pytest.mark.parametrize("case", cases(), ids=str)
def test_steps_give_the_logits_of_a_full_forward_pass(case):
    sizes, strategy, layout, variant = case
    check_logits(sizes, variant, attention__strategy=strategy, attention__layout=layout)


# Texts


def generation(sizes, prompts, tokens, sampling=GREEDY, **changes) -> Generation:
    model, mesh = model_on(
        *sizes, **{"model__tied_head": False, **changes}
    )  # tied, it would say the same byte for ever
    return Generation(model.config, mesh, large_params(model, mesh), prompts, tokens, sampling)


def texts_of(generation) -> list[bytes]:
    return [b"".join(column) for column in zip(*generation, strict=True)]


@pytest.mark.parametrize("layout", sampled(["contiguous", "zigzag"], ["zigzag"]))
@pytest.mark.parametrize("meshes", sampled([(1, 2, 3, 8), (1, 8)], [(1, 8)]), ids=str)
def test_greedy_text_is_the_same_on_every_mesh_and_the_cache_is_cut(layout, meshes):
    """2, 3 and 8 devices divide 48 prompt tokens, also twice, and 24 more."""
    prompt, found, of_one = random_bytes(48).tobytes(), {}, 0
    for devices in meshes:
        text = generation((1, devices), [prompt], 24, attention__layout=layout, model__positions="rope")
        found[devices] = texts_of(text)
        of_one = of_one or text.cache_bytes
        assert text.cache_bytes * devices == of_one
    layers, heads, head_width, slots = 2, 4, 8, 48 + 24
    assert of_one == layers * 2 * heads * slots * head_width * 4 + slots * 4
    assert len(found[1][0]) == 24 and len(set(found[1][0])) > 8, "something is said"
    assert all(texts == found[1] for texts in found.values())


PROMPTS = [b"import jax", b"def f(x):", b"import jax", "Zoë".encode(), b"#"]  # no number of devices divides five


@cache
def texts_of_one_device() -> list[bytes]:
    return texts_of(generation((1, 1), PROMPTS, 12, DRAWN))


@pytest.mark.parametrize("sizes", sampled([(2, 2, 2), (1, 8), (1, 3), (2, 1), (1, 1, 4)], [(2, 2, 2)]))
def test_drawn_texts_are_the_same_on_every_mesh(sizes):
    assert texts_of(generation(sizes, PROMPTS, 12, DRAWN)) == texts_of_one_device()


def test_drawn_texts_depend_on_seed_and_prompt_and_not_on_the_others():
    together = texts_of_one_device()
    model, mesh = model_on(1, 1, model__tied_head=False)
    alone = Generation(model.config, mesh, large_params(model, mesh), PROMPTS[4:], 12, DRAWN)
    assert texts_of(alone) == together[4:]
    assert together[0] != together[2], "the same prompt twice gives two texts"
    other_seed = Sampling(DRAWN.temperature, DRAWN.top_k, DRAWN.top_p, seed=4)
    assert set(together).isdisjoint(texts_of(generation((1, 1), PROMPTS, 12, other_seed)))


def test_a_text_ends_with_its_document():
    prompts = [b"abcdef", b"xyz"]
    endless = texts_of(generation((1, 1), prompts, 40, DRAWN))
    separator = next(bytes([byte]) for byte in endless[1] if byte < 128 and byte not in b"".join(prompts))
    ended = texts_of(generation((1, 1), prompts, 40, DRAWN, data__separator=separator.decode()))
    for whole, part in zip(endless, ended, strict=True):
        assert part == whole[: (whole + separator).index(separator) + 1]


# The compiled step


def test_a_step_takes_one_small_collective_per_layer_and_leaves_the_cache_in_its_place():
    layers, rows, devices = 3, 2, 4
    text = generation(
        (1, devices),
        [b"x" * 4096] * rows,
        32,
        **{"model__layers": layers, "model__kv_heads": 2, "model__positions": "rope", "model__scan_layers": False},
    )
    found = [one for one in hlo.collectives(text._step.as_text()) if one.elements > 2]
    assert Counter((one.kind, one.times) for one in found) == {("all-gather", layers): 1}
    assert found[0].elements == devices * rows * 4 * (8 + 1), "a row of each head and its log-sum-exp"
    assert text._step.memory_analysis().temp_size_in_bytes < text.cache_bytes, "not even one copy"
