"""Generation with a tokenizer: its tokens go in, its text comes out, and it ends where the tokenizer says."""

import json
from pathlib import Path

import jax
import numpy as np
import oracle
import pytest
from helpers import model_on, sampled, small_config, with_shapes
from tokenizer_cases import like_llama2, like_llama3, trained
from tokenizers import Tokenizer

from lss_jax.config.schema import ConfigError
from lss_jax.generation.decode import Generation
from lss_jax.generation.request import check_request
from lss_jax.generation.sampling import Sampling
from lss_jax.generation.streaming import streamed
from lss_jax.tasks import make_task
from lss_jax.training.state import param_shardings

GREEDY = Sampling(0.0, None, 1.0, seed=0)
PROMPTS = ["The cat", "Zoë sat on"]
TOKENS = 10
ROPE = {"model__positions": "rope", "model__tied_head": False, "model__vocab": 512, "model__layers": 1}


def generation(path: str, sizes=(1, 1), prompts=PROMPTS, **changes) -> tuple[Generation, list[np.ndarray]]:
    """A generation from large random weights, and the tokens that the oracle finds: greedily, by whole texts."""
    model, mesh = model_on(*sizes, data__tokenizer=path, **ROPE, **changes)
    make = jax.jit(
        lambda: jax.tree.map(lambda p: p * 3.0, model.init(jax.random.key(1))),
        out_shardings=param_shardings(model, mesh),
    )
    params = make()
    found = Generation(model.config, mesh, params, [prompt.encode() for prompt in prompts], TOKENS, GREEDY)
    natural = with_shapes(jax.tree.map(np.asarray, params), model.natural_shapes)
    return found, [greedy(natural, model.config, Tokenizer.from_file(path), prompt) for prompt in prompts]


def greedy(params, config, library, prompt) -> list[int]:
    tokens, L = library.encode(prompt).ids, 40
    seen_1LL, first = np.tril(np.ones((1, L, L), bool)), len(tokens)
    while len(tokens) < first + TOKENS:
        padded_1L = np.pad(np.array(tokens, np.int32), (0, L - len(tokens)))[None]
        logits_V = np.asarray(FULL_PASS(params, padded_1L, seen_1LL, config.model)[0, len(tokens) - 1])
        tokens.append(int(np.argmax(logits_V[: library.get_vocab_size()])))
    return tokens[first:]


FULL_PASS = jax.jit(oracle.logits, static_argnums=3)


def texts_of(generation) -> list[bytes]:
    return [b"".join(column) for column in zip(*generation, strict=True)]


@pytest.mark.parametrize("make", sampled([trained, like_llama2, like_llama3], [trained, like_llama2]))
def test_the_text_is_what_the_library_decodes(tmp_path, make):
    path = make(tmp_path)
    library = Tokenizer.from_file(path)
    text, tokens = generation(path)
    for prompt, ids, found in zip(PROMPTS, tokens, texts_of(text), strict=True):
        whole = library.decode(library.encode(prompt).ids + ids)
        ours = (prompt.encode() + found).decode(errors="replace")
        assert len(set(ids)) > 3, "something is said"
        if make is like_llama2:  # its decoder replaces whole characters that have a broken one beside them
            whole, _, _ = whole.partition("\ufffd")
            ours = ours[: len(whole)]
        assert ours == whole and len(whole) > len(prompt) + 1


def test_streamed_text_breaks_no_character(tmp_path):
    """Tokens of single bytes, with which characters grow over several steps."""
    path = trained(tmp_path, size=257)
    pieces = list(streamed(generation(path, prompts=["日本"])[0], ["日本".encode()]))
    assert pieces[0] == "日本" and len(pieces) == TOKENS + 2


def test_another_mesh_gives_the_same_text(tmp_path):
    path = trained(tmp_path)
    assert texts_of(generation(path, (1, 2, 2))[0]) == texts_of(generation(path)[0])


def test_a_text_ends_with_the_end_token(tmp_path):
    path = trained(tmp_path)
    text, (tokens, other) = generation(path)
    whole = texts_of(text)
    tokenizer = make_task(small_config(data__tokenizer=path)).text
    place, ending = next((p, t) for p, t in enumerate(tokens) if t not in (*tokens[:p], *other) and p > 1)
    name = Tokenizer.from_file(path).id_to_token(ending)
    (Path(path).parent / "tokenizer_config.json").write_text(json.dumps({"eos_token": name}))
    ended = texts_of(generation(path)[0])
    assert ended == [b"".join(map(tokenizer.bytes_of, tokens[: place + 1])), whole[1]]


def test_a_text_ends_at_a_separator_within_a_token(tmp_path):
    path = trained(tmp_path)
    text, (tokens, _) = generation(path)
    (whole, _), tokenizer = texts_of(text), make_task(small_config(data__tokenizer=path)).text
    long = next(piece for piece in map(tokenizer.bytes_of, tokens) if len(piece) > 2 and piece.strip().isalpha())
    separator = long.strip()[:2]
    ended = texts_of(generation(path, data__separator=separator.decode(), prompts=[PROMPTS[0]])[0])
    assert ended == [whole[: whole.index(separator) + 2]]


def test_prompts_and_tokenizers_that_cannot_be_are_refused(tmp_path):
    config = small_config(data__tokenizer=trained(tmp_path), **ROPE)
    check_request(config, [b"The cat"], 9, GREEDY)
    with pytest.raises(ConfigError, match=r"prompt 2: the text is not UTF-8 \(invalid start byte, byte 1: ff\)"):
        check_request(config, [b"The cat", b"a\xff"], 9, GREEDY)
    with pytest.raises(ConfigError, match=r"has \d+ tokens, but the model model.vocab=256; give the tokenizer that"):
        check_request(small_config(data__tokenizer=trained(tmp_path)), [b"The cat"], 9, GREEDY)
    with pytest.raises(ConfigError, match=r"none.json' cannot be read \(No such file"):
        check_request(small_config(data__tokenizer="none.json", **ROPE), [b"The cat"], 9, GREEDY)


def test_lengths_are_those_of_tokens(tmp_path):
    config = small_config(data__tokenizer=trained(tmp_path), model__vocab=512)  # 48 learned positions
    check_request(config, [b" the cat sat" * 16], 1, GREEDY)
    with pytest.raises(ConfigError, match=r"more than data.seq_len=48 learned positions"):
        check_request(config, [b" the cat sat" * 17], 1, GREEDY)
