"""Documents from token files: which tokens count, where splits end, and gradients that equal the oracle's."""

import jax
import numpy as np
import oracle
import pytest
from helpers import (
    assert_close,
    make_loss_and_gradient,
    mesh_of,
    model_on,
    perturbed_params,
    sampled,
    small_config,
    with_shapes,
)
from token_files import GIVEN, LENGTHS, VOCAB, documents_of, whole, write_tokenizer, write_tokens

from lss_jax.config.schema import ConfigError
from lss_jax.data.batch import IGNORED
from lss_jax.data.kinds import is_packed, open_corpus
from lss_jax.data.packing import documents_between, split_ends
from lss_jax.data.sources import SPLITS
from lss_jax.data.token_file import TokenFile
from lss_jax.data.tokenizer import load_tokenizer
from lss_jax.generation.decode import Generation
from lss_jax.generation.sampling import Sampling
from lss_jax.tasks import make_task
from lss_jax.training.state import param_shardings
from lss_jax.training.step import make_eval_step

MORE = [20] * 30  # short documents, so that splits end between two


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A tokenizer, a token file of many documents, some with prompts, and these documents."""
    folder = tmp_path_factory.mktemp("corpus")
    tokenizer, documents = write_tokenizer(folder), documents_of(LENGTHS + MORE, GIVEN + [0] * len(MORE))
    file = write_tokens(folder / "tokens", documents, load_tokenizer(str(tokenizer)).token_bytes, tokenizer)
    return {"tokenizer": tokenizer, "file": file, "documents": documents}


def data_of(corpus):
    return {"data__source": "text", "data__path": str(corpus["file"]), "data__tokenizer": str(corpus["tokenizer"])}


def first_windows(corpus, config, stop):
    """The first windows of the training split for the oracle, from the documents themselves."""
    count = np.searchsorted(np.cumsum([len(tokens) for tokens, _ in corpus["documents"]]), stop) + 1
    documents = corpus["documents"][:count]
    assert len(whole(documents)) == stop, "the split ends between two documents"
    return oracle.PackedWindows(whole(documents), np.arange(8) * config.data.seq_len, documents)


def check_documents_against_oracle(corpus, data, seq, model=1, **changes):
    """Loss, bits per byte and each gradient by name, of windows of packed documents; two of them count no target."""
    changes = {"model__vocab": VOCAB + 4, **data_of(corpus), **changes}
    family, mesh = model_on(data, seq, model, **changes)
    config, params = family.config, perturbed_params(family)
    split = make_task(config).splits(mesh)["train"]
    batch, windows = split.evaluation_batch(0), first_windows(corpus, config, len(split))
    loss, gradient = jax.jit(make_loss_and_gradient(family, mesh))(params, batch, 0)
    expected_loss, expected = oracle.loss_and_gradient(params, windows, config)
    assert_close({"loss": loss, "gradient": gradient}, {"loss": expected_loss, "gradient": expected}, 1e-5)
    _, targets_BL, *_ = oracle.plain_inputs(windows, config)
    assert not np.all(np.any(targets_BL >= 0, axis=1)), "a window without any target"
    sums = make_eval_step(family, mesh)(with_shapes(params, family.shapes), batch)
    text = load_tokenizer(config.data.tokenizer)
    counted = targets_BL[targets_BL >= 0]
    assert (sums.bytes, sums.tokens) == (sum(len(text.bytes_of(int(t))) for t in counted), len(counted))


CASES = [
    ((1, 8, 1), "rope"),
    ((2, 3, 1), "sinusoidal"),
    ((2, 2, 2), "learned"),
    ((1, 1, 1), "none"),
    ((2, 2, 2), "rope"),
]


@pytest.mark.parametrize("case", sampled(CASES, CASES[:2]), ids=str)
def test_gradient_equals_the_oracle_for_documents_with_prompts(corpus, case):
    mesh, positions = case
    check_documents_against_oracle(corpus, *mesh, model__positions=positions)


RESTARTED = {
    "rope": {"model__positions": "rope"},
    "sinusoidal": {"model__positions": "sinusoidal"},
    "learned": {},
    "rope in tiles": {"model__positions": "rope", "model__tile": 4},
    "learned, sharded": {"mesh__shard": "all"},
    "rope in microbatches": {"model__positions": "rope", "optim__accumulate": 2, "model__remat": "block"},
    "rope in head groups": {"model__positions": "rope", "attention__head_groups": 2, "model__remat": "input"},
    "vocabulary": {"model__vocab_parallel": True, "model__positions": "rope"},
}
OF_RESTARTED = [(mesh, variant) for variant in RESTARTED for mesh in ((1, 8, 1), (2, 3, 1), (2, 2, 2))]
SAMPLE = [((1, 8, 1), "learned"), ((2, 2, 2), "rope in tiles")]


@pytest.mark.parametrize("case", sampled(OF_RESTARTED, SAMPLE, quick=SAMPLE[1:2]), ids=str)
def test_gradient_equals_the_oracle_where_positions_restart(corpus, case):
    mesh, variant = case
    heads = {"model__heads": 8} if "groups" in variant else {}
    check_documents_against_oracle(corpus, *mesh, data__restart_positions=True, **RESTARTED[variant], **heads)


def test_a_text_goes_on_alike_where_positions_restart():
    """A text is one document: a replicated table of positions gives what a sharded one gives."""
    texts = []
    for restarts in (False, True):
        changes = {"model__layers": 1, "data__separator": "|", "data__restart_positions": restarts}
        model, mesh = model_on(1, 2, 2, **changes)
        placed = jax.device_put(perturbed_params(model), param_shardings(model, mesh))
        prompts, sampling = [b"ab", b"a longer one"], Sampling(temperature=0.0, top_k=None, top_p=1.0, seed=0)
        texts.append(list(Generation(model.config, mesh, placed, prompts=prompts, tokens=6, sampling=sampling)))
    assert texts[0] == texts[1]


def test_positions_that_do_not_restart_are_seen(corpus, monkeypatch):
    """The mutation: the comparison can fail."""
    monkeypatch.setattr("lss_jax.tasks.language_model.LanguageModel.positions", lambda task, batch: batch.positions)
    with pytest.raises(AssertionError, match="relative error"):
        check_documents_against_oracle(corpus, 1, 8, data__restart_positions=True, model__positions="sinusoidal")


def test_a_prompt_that_counts_is_seen(corpus, monkeypatch):
    """Another mutation: only the first token of a document is left out."""
    monkeypatch.setattr(
        "lss_jax.data.packing.Packing.are_targets", lambda self, offsets: offsets > self.bounds(offsets)[0]
    )
    with pytest.raises(AssertionError, match="relative error"):
        check_documents_against_oracle(corpus, 1, 8, model__positions="rope")


@pytest.mark.parametrize(("data", "seq"), [(1, 1), (2, 4)])
def test_each_split_has_its_documents(corpus, data, seq):
    """Every split, token by token: bounds, targets and bytes, from the documents themselves."""
    config, mesh = (
        small_config(**data_of(corpus), model__vocab=VOCAB, attention__layout="contiguous"),
        mesh_of(data, seq),
    )
    text, splits = load_tokenizer(str(corpus["tokenizer"])), make_task(config).splits(mesh)
    documents = list(corpus["documents"])
    for name in SPLITS:
        batches = [splits[name].evaluation_batch(number) for number in range(splits[name].batches)]
        found = {
            field: np.concatenate([np.asarray(getattr(batch, field)) for batch in batches], axis=-2)
            for field in ("tokens", "targets", "documents", "target_bytes")
        }
        mine = []
        while sum(len(tokens) for tokens, _ in mine) < len(splits[name]):
            mine.append(documents.pop(0))
        assert splits[name].documents == len(mine)
        edges = np.cumsum([0, *(len(tokens) for tokens, _ in mine)]).tolist()
        expected = [
            (token, start, end, given)
            for (tokens, given), start, end in zip(mine, edges, edges[1:], strict=False)
            for token in tokens
        ]
        for place, (token, start, end, given) in enumerate(expected):
            row, column = divmod(place, 48)
            assert found["tokens"][row, column] == token
            if end < edges[-1]:
                bounds = (max(start - 48 * row, 0), min(end - 48 * row, 48))
                assert tuple(found["documents"][:, row, column]) == bounds
            if place:
                row, column = divmod(place - 1, 48)
                counts = place - start >= max(given, 1)
                assert found["targets"][row, column] == (token if counts else IGNORED)
                assert found["target_bytes"][row, column] == (len(text.bytes_of(token)) if counts else 0)
    assert not documents, "all of them are in a split"


@pytest.mark.parametrize(
    ("lengths", "given", "ends"),
    [
        ([10] * 100, [0] * 100, [900, 950, 1000]),
        ([30] * 33 + [10], [0] * 34, [900, 960, 1000]),  # 950 is nearer to 960 than to 930
        ([1000], [0], [900, 950, 1000]),  # one long document: where they are
        ([880, 55, 65], [0, 0, 0], [880, 935, 1000]),  # less than 2.5% away
        ([870, 65, 65], [0, 0, 0], [900, 935, 1000]),  # more
        ([870, 65, 65], [0, 5, 5], [870, 935, 1000]),  # but not between a prompt and its answer
        ([870, 65, 65], [0, 1, 0], [900, 935, 1000]),  # what is given anyway is no prompt
        ([125] * 8, [5] * 8, [750, 875, 1000]),  # each split has a document
    ],
)
def test_splits_end_between_documents_that_are_short(tmp_path, lengths, given, ends):
    file = write_tokens(tmp_path / "tokens", documents_of(lengths, given, 256), np.ones(256), None)
    assert split_ends(TokenFile(file)) == ends


def test_two_documents_with_prompts_are_too_few_for_three_splits(tmp_path):
    file = write_tokens(tmp_path / "tokens", documents_of([500, 500], [5, 5], 256), np.ones(256), None)
    with pytest.raises(ConfigError, match=r"2 documents are too few for three splits that cut no prompt from its answ"):
        split_ends(TokenFile(file))


def test_a_part_of_a_document_keeps_its_prompt(tmp_path):
    """A split that begins in a long prompt has no target before the answer."""
    file = TokenFile(write_tokens(tmp_path / "tokens", documents_of([10, 100], [0, 90], 256), np.ones(256), None))
    documents = documents_between(file, 50, 110)
    assert len(documents) == 1
    np.testing.assert_array_equal(documents.are_targets(np.arange(60)), np.arange(60) >= 50)
    assert documents.bounds(np.array([0, 59])).tolist()[0] == [0, 0]


def test_bytes_in_a_token_file_are_bytes(tmp_path):
    """With data.tokenizer="bytes" there is nothing to count but tokens."""
    documents = documents_of(LENGTHS, GIVEN, 256)
    file = write_tokens(tmp_path / "tokens", documents, np.ones(256), None)
    config = small_config(data__source="text", data__path=str(file))
    assert is_packed(config.data) and make_task(config).items == "bytes"
    batch = make_task(config).splits(mesh_of(1, 4))["train"].training_batch(0)
    assert batch.target_bytes is None and batch.documents.shape == (2, 8, 48)


def test_the_tokenizer_of_a_token_file_must_be_the_configs(corpus, tmp_path):
    config = small_config(**data_of(corpus) | {"data__tokenizer": "bytes"})
    with pytest.raises(
        ConfigError, match=r"was encoded by the tokenizer with SHA-256 \w{12}, but data.tokenizer is 'by"
    ):
        open_corpus(config.data)
    file = write_tokens(tmp_path / "tokens", documents_of(LENGTHS, GIVEN, 256), np.ones(256), None)
    config = small_config(**data_of(corpus) | {"data__path": str(file)})
    with pytest.raises(
        ConfigError, match=r"was encoded by bytes, but data.tokenizer is '.*', whose SHA-256 is \w{12}; gi"
    ):
        open_corpus(config.data)


def test_a_vocabulary_too_small_is_refused(corpus):
    config = small_config(**data_of(corpus), model__vocab=VOCAB - 1)
    with pytest.raises(
        ConfigError, match=rf"model.vocab={VOCAB - 1} is less than the {VOCAB} tokens of .*use model.voc"
    ):
        make_task(config).splits(mesh_of(1, 1))


def test_a_token_beyond_the_vocabulary_is_found(corpus, tmp_path):
    documents = documents_of([2000], [0])
    documents[0][0][500] = VOCAB + 7
    token_bytes = load_tokenizer(str(corpus["tokenizer"])).token_bytes
    file = write_tokens(tmp_path / "tokens", documents, token_bytes, corpus["tokenizer"])
    config = small_config(**data_of(corpus) | {"data__path": str(file)}, model__vocab=VOCAB)
    with pytest.raises(ConfigError, match=f"there is a token {VOCAB + 7}, of a vocabulary of {VOCAB}; encode it again"):
        make_task(config).splits(mesh_of(1, 1))


def test_restarting_without_documents_is_refused(tmp_path):
    (tmp_path / "text").write_bytes(b"x" * 5000)
    config = small_config(data__source="text", data__path=str(tmp_path / "text"), data__restart_positions=True)
    (problem,) = make_task(config).problems()
    assert "data.restart_positions=True has no use with data.source='text'" in problem and "is one document" in problem


def test_means_of_a_batch_without_text_have_no_bits():
    task = make_task(small_config(data__tokenizer="tokenizer.json"))
    bits = task.headline.of({"loss": 2.0, "bytes": 0.0})
    assert np.isnan(bits) and task.headline.of({"loss": np.log(2), "bytes": 4.0}) == 0.25
