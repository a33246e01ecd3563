"""Answers of encoder-decoders: logits and beam search as of a dense oracle, and the same texts on every mesh."""

import argparse
import itertools
from collections import Counter

import jax
import numpy as np
import oracle_pairs
import pytest
from helpers import model_on, random_bytes, relative_error, sampled, with_shapes

from lss_jax.config.schema import ConfigError
from lss_jax.generate import choice_of
from lss_jax.generation.beam_search import BeamSearch
from lss_jax.generation.beams import Beams, Candidate, Search
from lss_jax.generation.decode import Generation
from lss_jax.generation.programs import make_source_prefill, make_step
from lss_jax.generation.request import check_request
from lss_jax.generation.sampling import Sampling
from lss_jax.inspection import hlo
from lss_jax.parallel.layout import SOURCE, layout_on
from lss_jax.training.state import param_shardings

GREEDY = Sampling(0.0, None, 1.0, seed=0)
BOUND = 1e-5  # float32; relative to the largest logit
PAIRS = {
    **{"task": "sequence_to_sequence", "model__family": "encoder_decoder", "model__vocab": 258, "model__heads": 8},
    **{"data__source": "text", "data__path": "p.jsonl", "data__prompt_field": "p", "data__answer_field": "a"},
    **{"data__source_len": 29, "data__seq_len": 9, "model__encoder_layers": 1},
}
START = 257  # and the end of a text of bytes; token 256 stands for nothing
SOURCES = [random_bytes(length, seed=length) for length in (29, 13, 17, 4)]
ROPE = {"model__positions": "rope", "model__kv_heads": 4}
VARIANTS = {
    "learned": {},
    "rope, grouped, zigzag": {**ROPE, "attention__source_layout": "zigzag"},
    "sinusoidal, untied": {"model__positions": "sinusoidal", "model__tied_head": False},
    "vocabulary in shares": {"model__vocab_parallel": True},
    "weights in shares": {"mesh__shard": "all", "attention__head_groups": 2, "model__remat": "input", "model__tile": 4},
}


def large_params(model, mesh):
    """Large enough that attention matters, the same on every mesh."""

    def create():
        return jax.tree.map(lambda p: p * 3.0, model.init(jax.random.key(1)))

    return jax.jit(create, out_shardings=param_shardings(model, mesh))()


def natural(model, params):
    return with_shapes(jax.tree.map(np.asarray, params), model.natural_shapes)


def logits_of_steps(model, mesh, params, targets) -> np.ndarray:
    """`[B, T, V]`, of the start token and of all but the last of these targets, `[B, T]`."""
    steps, lengths = targets.shape[1], np.array(list(map(len, SOURCES)))
    padded = layout_on(model.config, mesh, SOURCE).padded(max(lengths))
    source_BS = np.stack([np.pad(row, (0, padded - len(row))) for row in SOURCES]).astype(np.int32)
    cache = jax.jit(make_source_prefill(model, mesh, steps, rows=1))(params, source_BS, lengths)
    step = jax.jit(make_step(model, mesh, length=0), donate_argnums=1)
    tokens = np.concatenate((np.full((len(SOURCES), 1), START), targets[:, :-1]), axis=1).astype(np.int32)
    logits = []
    for number in range(steps):
        position_B = np.full(len(SOURCES), number)
        cache, logits_BV = step(params, cache, tokens[:, number], position_B, np.int32(number))
        logits.append(np.asarray(logits_BV))
    return np.stack(logits, axis=1)


def dense_logits(config, params, sources, targets) -> np.ndarray:
    """`BLV`, by the oracle, all of a target at once."""
    inputs = oracle_pairs.plain_inputs([*zip(map(list, sources), map(list, targets), strict=True)], config)
    source_BS, tokens_BL, _, *seen = inputs
    with jax.default_device(jax.devices()[0]):
        return np.asarray(DENSE(params, source_BS, tokens_BL, *seen, config.model))


DENSE = jax.jit(oracle_pairs.logits, static_argnums=6)
CASES = [
    ((1, 8, 1), "lss", "learned"),
    ((2, 2, 2), "lss", "vocabulary in shares"),
    ((1, 3, 1), "ring", "rope, grouped, zigzag"),
    ((2, 4, 1), "ulysses", "rope, grouped, zigzag"),
    ((1, 2, 2), "lss", "sinusoidal, untied"),
    ((2, 3, 1), "lss", "weights in shares"),
    ((1, 1, 1), "lss", "learned"),
]


@pytest.mark.grid
@pytest.mark.parametrize("case", CASES, ids=str)
def test_steps_give_the_logits_of_the_dense_model(case):
    sizes, strategy, variant = case
    model, mesh = model_on(*sizes, **PAIRS, **VARIANTS[variant], attention__strategy=strategy)
    params, targets = large_params(model, mesh), np.stack([random_bytes(9, seed=99 + row) for row in range(4)])
    expected = dense_logits(model.config, natural(model, params), SOURCES, targets)
    assert relative_error(logits_of_steps(model, mesh, params, targets), expected) < BOUND


# Texts

TOKENS = 6
BEAMS = Beams(3, penalty=0.6)


def plain_beam_search(config, params, source, beams: Beams) -> bytes:
    """Every beam's text is computed anew at each step; none stops before the last, and all that end are compared."""
    live, ended = [(0.0, [])], []
    for number in range(TOKENS):
        texts = [text for _, text in live]
        padded = [[*text, *[0] * (TOKENS - number)] for text in texts]
        logits_BV = dense_logits(config, params, [source] * len(texts), padded)[:, number].astype(np.float64)
        logits_BV[:, 256] = -np.inf
        log_probabilities_BV = logits_BV - np.logaddexp.reduce(logits_BV, axis=1, keepdims=True)
        found = [
            (past + log_probability, [*text, token])
            for (past, text), row in zip(live, log_probabilities_BV, strict=True)
            for token, log_probability in enumerate(row)
        ]
        best = sorted(found, key=lambda one: -one[0])[: 2 * beams.beams]
        last = number == TOKENS - 1
        ended += [(past / ((5 + len(text)) / 6) ** 0.6, text) for past, text in best if last or text[-1] == START]
        live = [(past, text) for past, text in best if text[-1] != START][: beams.beams]
    return bytes(token for token in max(ended)[1] if token != START)


def with_early_ends(params):
    """The end token is as likely as another one, or more, so that some texts end before the last step."""
    kernel_EV = np.array(params["head"]["kernel_EV"])
    kernel_EV[:, START] = 1.5 * kernel_EV[:, 97]
    return {**params, "head": {"kernel_EV": kernel_EV}}


def searched(sizes, beams, **changes):
    model, mesh = model_on(*sizes, **PAIRS, **changes)
    params = with_early_ends(jax.tree.map(np.asarray, large_params(model, mesh)))
    placed = jax.device_put(params, param_shardings(model, mesh))
    search = BeamSearch(model.config, mesh, placed, rows=4, length=29, tokens=TOKENS, beams=beams)
    return model, params, search.texts([source.astype(np.int32) for source in SOURCES])


@pytest.mark.parametrize("sizes", sampled([(2, 2, 2), (1, 3, 1), (1, 8, 1), (1, 1, 1)], [(2, 2, 2)]), ids=str)
def test_beam_search_finds_what_a_plain_one_finds(sizes):
    model, params, found = searched(sizes, BEAMS, model__tied_head=False, **VARIANTS["rope, grouped, zigzag"])
    assert found == [plain_beam_search(model.config, natural(model, params), source, BEAMS) for source in SOURCES]
    assert len(set(map(len, found))) > 1, "they end at different lengths"


@pytest.mark.grid
def test_greedy_texts_are_those_of_one_beam_and_the_same_on_every_mesh():
    prompts, found = [source.tobytes() for source in SOURCES[:3]], []
    for sizes in ((1, 1, 1), (2, 2, 2), (1, 3, 1)):
        model, mesh = model_on(*sizes, **PAIRS)
        params = large_params(model, mesh)
        texts = Generation(model.config, mesh, params, prompts, TOKENS, GREEDY)
        found.append([b"".join(column) for column in zip(*texts, strict=True)])
        search = BeamSearch(model.config, mesh, params, rows=3, length=29, tokens=TOKENS, beams=Beams(1, 0.6))
        assert search.texts([source.astype(np.int32) for source in SOURCES[:3]]) == found[-1]
    assert found[0] == found[1] == found[2]


@pytest.mark.grid
def test_a_step_takes_two_small_collectives_per_layer():
    model, mesh = model_on(1, 4, 1, **PAIRS, model__layers=3)
    params = large_params(model, mesh)
    search = BeamSearch(model.config, mesh, params, rows=2, length=29, tokens=TOKENS, beams=Beams(2, 0.6))
    found = [one for one in hlo.collectives(search._advance.as_text()) if one.elements > 2]
    assert Counter((one.kind, one.times) for one in found) == {("all-gather", 3): 2}
    assert {one.elements for one in found} == {4 * 2 * 2 * 8 * (4 + 1)}, "a row of each head and its log-sum-exp"


# The search alone


def best_of_all(log_probabilities_VV, beams, tokens, end):
    """The best of all texts there are: those that end, and those cut off."""
    V, scored = len(log_probabilities_VV), []
    for length in range(1, tokens + 1):
        for text in itertools.product(range(V), repeat=length):
            if end in text[:-1] or (text[-1] != end and length < tokens):
                continue
            total = sum(log_probabilities_VV[a, b] for a, b in itertools.pairwise((end, *text)))
            scored.append((beams.score(total, length), list(text)))
    return max(scored)[1]


def by_search(log_probabilities_VV, beams, tokens, end):
    """The same by `Search`, from a table of how likely a token is behind another one; and the steps that it took."""
    search, steps, V = Search(beams, end, end, tokens), 0, len(log_probabilities_VV)
    while not search.over:
        total_bV = np.array(search.log_probabilities)[:, None] + log_probabilities_VV[search.tokens]
        best = np.argsort(-total_bV.ravel(), kind="stable")[: 2 * beams.beams]
        search.advance([Candidate(total_bV.ravel()[at], *divmod(int(at), V)) for at in best])
        steps += 1
    return search.best, steps


@pytest.mark.parametrize("penalty", [0.0, 0.6, 2.0])
def test_with_enough_beams_it_is_the_best_text_of_all_and_found_early(penalty):
    early = 0
    for seed in range(30):
        logits_VV = np.random.default_rng(seed).normal(0, 1.5, (4, 4))
        log_probabilities_VV = logits_VV - np.logaddexp.reduce(logits_VV, axis=1, keepdims=True)
        beams = Beams(3**4, penalty)
        text, steps = by_search(log_probabilities_VV, beams, tokens=5, end=0)
        assert text == best_of_all(log_probabilities_VV, beams, tokens=5, end=0)
        early += steps < 5
    assert early, "the search need not go on to the last token"


# What is refused


REFUSED = {
    "long source": (PAIRS, b"x" * 30, 5, GREEDY, "has 30 tokens, more than data.source_len=29 learned positions; cut"),
    "long answer": (PAIRS, b"x", 10, GREEDY, "--tokens=10 is more than data.seq_len=9 learned positions; ask for less"),
    "no source": (PAIRS, b"", 5, GREEDY, "the prompt is empty"),
    "no beams": (PAIRS, b"x", 5, Beams(0, 0.6), "--beams=0 leaves no text; use at least 1"),
    "no penalty": (PAIRS, b"x", 5, Beams(2, -1.0), "--length-penalty=-1.0 must be at least 0 and finite"),
    "a decoder": ({}, b"x", 5, Beams(2, 0.6), "model.family='decoder' goes on with its prompt; leave it out, or give"),
    "symbols": ({**PAIRS, "data__source": "copy", "data__path": ""}, b"x", 5, GREEDY, "has no text to generate"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_answered_is_refused(case):
    changes, prompt, tokens, choice, told = REFUSED[case]
    model, _ = model_on(1, 1, **changes)
    with pytest.raises(ConfigError) as refused:
        check_request(model.config, [prompt], tokens, choice)
    assert told in str(refused.value) and "\n" not in str(refused.value)


def asked(**options) -> argparse.Namespace:
    usual = {"temperature": 1.0, "top_k": None, "top_p": 1.0, "seed": 0, "beams": None, "length_penalty": None}
    return argparse.Namespace(**{**usual, **options})


def test_the_command_searches_with_beams_or_samples():
    assert choice_of(asked(temperature=0.5)) == Sampling(0.5, None, 1.0, 0)
    assert choice_of(asked(beams=4)) == Beams(4, 0.6) and choice_of(asked(beams=4, length_penalty=1.0)) == Beams(4, 1.0)
    with pytest.raises(ConfigError, match=r"--beams=4 searches for the likeliest text, and samples nothing; leave out"):
        choice_of(asked(beams=4, top_k=9))
    with pytest.raises(ConfigError, match=r"--length-penalty=1.0 has no use without --beams"):
        choice_of(asked(length_penalty=1.0))
