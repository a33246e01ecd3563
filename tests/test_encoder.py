"""Encoder-only models and their tasks against a dense oracle: masked tokens, classes of tokens and of sequences."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import (
    assert_close,
    make_loss_and_gradient,
    model_on,
    perturbed_params,
    placed,
    sampled,
)

from lss_jax.data.batch import IGNORED
from lss_jax.inspection import audit
from lss_jax.models import outputs
from lss_jax.tasks import make_task

ENCODER = {"model__family": "encoder", "model__heads": 8, "data__seq_len": 47}
TASKS = {
    "masked_language_model": {"model__vocab": 257},
    "token_labels": {
        **{"model__classes": 3, "labels__names": "no,yes,maybe", "labels__weights": (1.0, 2.0, 0.5)},
        **{"model__vocab": 256, "model__positions": "rope"},
    },
    "sequence_label": {
        **{"model__classes": 3, "labels__names": "no,yes,maybe", "model__pooling": "mean"},
        **{"data__prompt_field": "text", "data__answer_field": "label", "model__vocab": 256},
    },
}
MESHES = [(1, 8, 1), (2, 4, 1), (2, 2, 2), (1, 3, 1)]  # data x seq x model; no number of segments divides 47 tokens
LAYOUTS = ["contiguous", "zigzag"]
STRATEGIES = ["lss", "ring", "ulysses"]


@pytest.fixture(autouse=True)
def labelled_text(monkeypatch):
    """Text counts as a source with labels, so that these tests need no file."""
    from lss_jax.data import corpus, kinds

    labelled = kinds.Kind(corpus.open_texts, True, ("no", "yes", "maybe"), "bytes", corpus.check_texts)
    monkeypatch.setitem(kinds.KINDS, "stdlib", labelled)


def changes_of(task, **changes):
    return {"task": task, **ENCODER, **TASKS[task], **changes}


def arrays_of(config, seed=0):
    """Tokens, what each may attend to (two documents and padding), and labels of all kinds; some count for nothing."""
    random, B, L = np.random.default_rng(seed), config.data.batch_size, config.data.seq_len
    tokens_BL = random.integers(0, 256, (B, L))
    length_B, border_B = random.integers(L // 2, L + 1, B), random.integers(1, L // 2, B)
    if config.task == "sequence_label":
        border_B = 0 * border_B
        length_B[0] = 0  # a row behind the end of the data
    p, length_B1, border_B1 = np.arange(L), length_B[:, None], border_B[:, None]
    start_BL, end_BL = np.where(p < border_B1, 0, border_B1), np.where(p < border_B1, border_B1, length_B1)
    there_BL = p < length_B1
    documents = np.where(there_BL, np.stack((start_BL, end_BL)), 0)
    classes = config.model.classes or 256
    targets_BL = np.where(there_BL & (random.random((B, L)) < 0.6), random.integers(0, classes, (B, L)), IGNORED)
    labels_B = np.where(length_B > 0, random.integers(0, classes, B), IGNORED)
    return {"tokens": tokens_BL, "documents": documents, "targets": targets_BL, "labels": labels_B}


def expected_loss(params, arrays, config):
    """The dense loss on one device."""
    L, window = config.data.seq_len, config.attention.window
    i, j = np.ogrid[:L, :L]
    start_BL, end_BL = arrays["documents"]
    seen_BLL = (start_BL[..., None] <= j) & (j < end_BL[..., None])
    if window:
        seen_BLL &= (j >= i - window // 2) & (j <= i + (window - 1) // 2)
    there_BL = start_BL < end_BL
    # a row without keys has no softmax: let padding see itself, which nobody sees
    dense_BLL = seen_BLL | (~there_BL[..., None] & (i == j))
    if config.task == "sequence_label":
        x_BLE = oracle.features(params, arrays["tokens"], dense_BLL, config.model)
        mean_BE = jnp.where(there_BL[..., None], x_BLE, 0).sum(1) / np.maximum(there_BL.sum(1), 1)[:, None]
        logits, targets = mean_BE @ params["head"]["kernel_EV"], arrays["labels"]
    else:
        logits, targets = oracle.logits(params, arrays["tokens"], dense_BLL, config.model), arrays["targets"]
    weights = np.array(config.labels.weights or (1.0,) * logits.shape[-1])
    weight = np.where(targets >= 0, weights[targets], 0.0)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), np.maximum(targets, 0)[..., None], -1)[..., 0]
    return -(weight * chosen).sum() / weight.sum()


def check(task, sizes, bound=2e-5, **changes):
    model, mesh = model_on(*sizes, **changes_of(task, **changes))
    params, arrays = perturbed_params(model), arrays_of(model.config)
    batch = placed(mesh, model.config, make_task(model.config).batch_like(mesh), **arrays)
    loss, gradient = jax.jit(make_loss_and_gradient(model, mesh))(params, batch, 0)
    with jax.default_device(jax.devices()[0]):
        expected = jax.jit(jax.value_and_grad(lambda params: expected_loss(params, arrays, model.config)))(params)
    assert_close({"loss": loss, "gradient": gradient}, dict(zip(("loss", "gradient"), expected, strict=True)), bound)


SAMPLE = [
    ("masked_language_model", (1, 3, 1), "lss", "zigzag"),
    ("token_labels", (2, 2, 2), "ring", "contiguous"),
    ("sequence_label", (2, 2, 2), "lss", "contiguous"),
    ("sequence_label", (1, 8, 1), "ulysses", "zigzag"),
]
CASES = [
    (t, m, s, o) for t in TASKS for m in MESHES for s in STRATEGIES for o in LAYOUTS if s != "ulysses" or 3 not in m
]


@pytest.mark.parametrize("case", sampled(CASES, SAMPLE), ids=str)
def test_loss_and_gradient_equal_the_oracle(case):
    task, sizes, strategy, layout = case
    check(task, sizes, attention__strategy=strategy, attention__layout=layout)


VARIANTS = {
    "window": {"attention__window": 8},
    "untied": {"model__tied_head": False},
    "tiles": {"model__tile": 4},
    "remat": {"model__remat": "input"},
    "head groups": {"attention__head_groups": 2},
    "sharded weights": {"mesh__shard": "all", "model__vocab_parallel": True, "model__width": 128},
    "offload": {"mesh__shard": "all", "optim__offload": True, "model__remat": "offload"},
    "microbatches": {"optim__accumulate": 2},
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("variant", sampled(VARIANTS, ["window"]))
def test_every_variant(task, variant):
    check(task, (2, 2, 2), **VARIANTS[variant])


def test_dropout_is_the_same_on_every_mesh():
    found = []
    for sizes in [(1, 1, 1), (2, 2, 2)]:
        model, mesh = model_on(*sizes, **changes_of("sequence_label", model__dropout=0.3))
        params, arrays = perturbed_params(model), arrays_of(model.config)
        batch = placed(mesh, model.config, make_task(model.config).batch_like(mesh), **arrays)
        found.append(jax.jit(make_loss_and_gradient(model, mesh))(params, batch, 3))
    one, other = found
    assert_close(other[1], one[1], 2e-5)


def test_the_comparison_fails_without_the_sum_over_the_sequence(monkeypatch):
    def own_mean(x_BpE, is_token_p, axes):
        return real(x_BpE, is_token_p, ())

    real = outputs.mean_over_sequence
    monkeypatch.setattr("lss_jax.models.encoder.mean_over_sequence", own_mean)
    with pytest.raises(AssertionError, match="relative error not under"):
        check("sequence_label", (1, 8, 1))


PROGRAMS = [
    *((task, sizes, "plain") for task in TASKS for sizes in [(1, 8, 1), (2, 2, 2)]),
    *((task, (2, 2, 2), variant) for task in TASKS for variant in VARIANTS if variant not in ("window", "offload")),
]


@pytest.mark.parametrize("program", sampled(PROGRAMS, [("sequence_label", (2, 2, 2), "plain")]), ids=str)
def test_the_compiled_step_is_as_predicted(program):
    task, sizes, variant = program
    model, mesh = model_on(*sizes, **changes_of(task, **VARIANTS.get(variant, {})))
    assert audit.problems(audit.audited(model, mesh), None) == []
