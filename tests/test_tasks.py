"""The seams of tasks and families: a toy of each, a few lines here and nowhere else, trains on any mesh."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import small_config
from jax.sharding import PartitionSpec as P

from lss_jax.attention.mask import causal
from lss_jax.config.schema import ConfigError
from lss_jax.data.loader import next_tokens, read_batch
from lss_jax.data.packing import Stream
from lss_jax.data.sources import open_splits
from lss_jax.data.split import WindowSplit
from lss_jax.data.windows import EqualWindows
from lss_jax.inspection.audit import audit_step
from lss_jax.models import FAMILIES, build_model
from lss_jax.models.family import Family
from lss_jax.parallel.layout import layout_on
from lss_jax.parallel.tensor_parallel import own_part
from lss_jax.reports import run_page, summary
from lss_jax.reports.runs import read_runs
from lss_jax.storage.metrics import console_line
from lss_jax.tasks import TASKS, make_task
from lss_jax.tasks.language_model import LanguageModel
from lss_jax.tasks.task import Metric, Task, shown
from lss_jax.training.evaluation import evaluate_run
from lss_jax.training.trainer import Trainer

COUNTED = ord("a")


class CountBatch(NamedTuple):
    """Tokens, and how many of those up to each are counted, as a share of all up to there."""

    tokens: Any
    shares: Any
    positions: Any
    rows: Any


class CountSums(NamedTuple):
    """Squared errors, and how many guesses are nearly right."""

    squared: Any
    near: Any
    positions: Any


class CountAToken(Task):
    """The share of one token among all tokens so far: what attention that looks everywhere alike can tell."""

    needs = "next_token"
    sums = CountSums
    items = "positions"
    metrics = (
        Metric("loss", "squared", "squared error", lambda means: means["loss"]),
        Metric("near", "near", "share of guesses within 0.1", lambda means: means["near"]),
    )
    headline = metrics[1]
    by_position = True

    def batch_specs(self):
        return CountBatch(P("data", "seq"), P("data", "seq"), P("seq"), P("data"))

    def batch_like(self, mesh):
        tokens, _, positions, rows, *_ = LanguageModel(self.config).batch_like(mesh)
        shares = jax.ShapeDtypeStruct(tokens.shape, jnp.float32, sharding=tokens.sharding)
        return CountBatch(tokens, shares, positions, rows)

    def splits(self, mesh):
        def split(part):
            def read(windows, _turn):
                layout = layout_on(self.config, mesh)
                tokens, _, positions, rows, *_ = read_batch(
                    windows, self.config.data.seq_len, mesh, layout, read=next_tokens
                )
                natural_BL = np.asarray(tokens)[:, np.argsort(positions)] == COUNTED
                share_BL = np.cumsum(natural_BL, axis=1) / np.arange(1, natural_BL.shape[1] + 1)
                shares = share_BL[:, np.asarray(positions)].astype(np.float32)
                return CountBatch(tokens, jax.device_put(shares, tokens.sharding), positions, rows)

            return WindowSplit(
                [EqualWindows(Stream(part, None, None), self.config.data.seq_len, ahead=1)], self.config, read
            )

        return {name: split(part) for name, part in open_splits(self.config.data).items()}

    def inputs(self, batch):
        return batch.tokens

    def mask(self, positions_l, batch=None):
        return causal(positions_l)

    def losses(self, outputs, batch, axis):
        error_Bp = outputs - own_part(batch.shares, axis, 1)
        near_Bp = (jnp.abs(error_Bp) < 0.1).astype(jnp.float32)
        return CountSums(error_Bp**2, near_Bp, jnp.ones_like(error_Bp))


class OneAttention(nnx.Module):
    """One head of attention over embedded tokens, and a number at the end."""

    def __init__(self, config, rngs):
        table_VE = jax.random.normal(rngs.params(), (config.model.vocab, config.model.width)) * 0.1
        self.table_VE = nnx.Param(table_VE, spec=P())
        self.out_E = nnx.Param(jnp.ones(config.model.width), spec=P())
        self.rows_LE = nnx.Param(
            jnp.zeros((config.data.seq_len, config.model.width)), spec=P(("seq", "model")), row_per_position=True
        )

    def __call__(self, tokens_Bl, segment):
        x_Bl1E = self.table_VE[...][tokens_Bl][:, :, None]
        o_Bl1E, _ = segment.attend(x_Bl1E, x_Bl1E, x_Bl1E, None, None)
        o_BpE = own_part((o_Bl1E + x_Bl1E)[:, :, 0], segment.model_axis, 1) + self.rows_LE[...]
        return o_BpE @ self.out_E[...]


@pytest.fixture
def toys(monkeypatch, tmp_path):
    monkeypatch.setitem(TASKS, "count", CountAToken)
    monkeypatch.setitem(FAMILIES, "one_attention", Family(OneAttention, frozenset({"next_token"})))
    (tmp_path / "text").write_bytes(np.random.default_rng(0).choice([97, 98, 99], 6000).astype(np.uint8).tobytes())
    return {
        "task": "count",
        "model__family": "one_attention",
        "data__source": "text",
        "data__path": str(tmp_path / "text"),
        "log_every": 5,
        "eval_every": 10,
        "optim__learning_rate": 3e-2,
        "sample_prompt": "a",
    }


def test_a_toy_task_and_a_toy_family_train_on_three_meshes_with_equal_curves(toys, tmp_path):
    curves = {}
    for sizes in [(1, 1, 1), (2, 4, 1), (1, 3, 2)]:
        workdir, devices = tmp_path / f"{sizes}", jax.devices()[: np.prod(sizes)]
        names = dict(zip(("mesh__data", "mesh__seq", "mesh__model"), sizes, strict=True))
        trainer = Trainer(small_config(**toys, **names, attention__layout="zigzag"), workdir, devices)
        records = list(trainer.fit())
        trainer.close()
        assert {"loss", "near"} <= records[0].keys() and "bits_per_byte" not in records[0]
        curves[sizes] = [(r["loss"], r["near"]) for r in records]
        assert console_line(records[0], 20, shown(trainer.task, records[0])).startswith("step  5/20  train loss ")
        learned = "\n".join(summary.learned(trainer))
        assert "share of guesses within 0.1 by positions before" in learned and "no text to generate" in learned
        whole = evaluate_run(workdir, "test", devices=devices)
        curves[sizes].append((whole["loss"], whole["near"]))
    one, *others = curves.values()
    assert one[-1][0] < 0.5 * one[0][0], "it learns"
    page = run_page.report(read_runs([tmp_path / "(2, 4, 1)"]), ["not compiled"])
    assert "share of guesses within 0.1" in page and "bits per byte" not in page
    for other in others:
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-3)  # a guess may be near by rounding alone


def test_a_family_that_declares_no_costs_is_refused_by_what_predicts_them(toys):
    config = small_config(**toys)
    with pytest.raises(ConfigError, match=r"model.family='one_attention' does not say what a step costs; declare"):
        audit_step(config, jax.devices())


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"task='x' is not known; choose one of 'language_model'"):
        make_task(small_config(task="x"))
    with pytest.raises(ConfigError, match=r"model.family='x' is not known; choose one of 'decoder'"):
        build_model(small_config(model__family="x"))
