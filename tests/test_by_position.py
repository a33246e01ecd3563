"""Losses by position: every mesh, layout and strategy against the oracle, and the command against plain evaluation."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import oracle
import pytest
from helpers import (
    TEXT,
    batch_on,
    change,
    model_on,
    perturbed_params,
    relative_error,
    sampled,
    small_config,
    windows_of,
)

from lss_jax.config.schema import ConfigError
from lss_jax.evaluate import check
from lss_jax.models import build_model
from lss_jax.models.losses import LossSum
from lss_jax.parallel.layout import layout_on
from lss_jax.reports import by_position
from lss_jax.reports.by_position import (
    at_length,
    binned,
    evaluate_by_position,
    in_natural_order,
    parse_lengths,
    shortened,
)
from lss_jax.tasks import make_task
from lss_jax.tasks.language_model import LanguageModel
from lss_jax.training.evaluation import evaluate_run
from lss_jax.training.step import make_eval_step, make_position_step
from lss_jax.training.trainer import Trainer

CASES = {
    "one device": ((1, 1), {}),
    "zigzag": ((2, 4), {"attention__layout": "zigzag", "data__seq_len": 41}),
    "contiguous": ((1, 8), {"attention__layout": "contiguous"}),
    "ring, documents": ((2, 3), {"attention__strategy": "ring", "data__separator": "a"}),
    "ulysses, prefix": ((1, 4), {"attention__strategy": "ulysses", "attention__prefix": 11}),
    "hybrid": ((2, 2, 2), {"data__seq_len": 41}),
    "hybrid, odd, rope": ((1, 3, 2), {"model__positions": "rope", "model__vocab_parallel": True}),
    "vocabulary, documents": ((1, 2, 4), {"model__vocab_parallel": True, "data__separator": "a"}),
    "baseline": ((1, 1, 8), {"model__heads": 8, "attention__window": 7}),
    "data alone": ((8, 1), {"model__positions": "sinusoidal"}),
}
SAMPLE = {"zigzag", "ring, documents", "vocabulary, documents"}


@pytest.mark.parametrize("case", sampled(CASES, SAMPLE))
def test_every_position_equals_the_oracle(case):
    """Also where the split ends within the batch; and all positions together are what evaluation says."""
    sizes, changes = CASES[case]
    model, mesh = model_on(*sizes, **changes)
    params, length = perturbed_params(model), model.config.data.seq_len
    windows = oracle.Windows(np.frombuffer(TEXT[:300], np.uint8), np.arange(8) * length)
    batch = batch_on(mesh, model.config, 0, *windows)
    sums = make_position_step(model, mesh)(params, batch)
    layout = layout_on(model.config, mesh)
    part = layout.padded(length) // layout.devices // layout.parts
    assert sums.nats.addressable_shards[0].data.shape == (part,), "no device has more than its own positions"
    found = in_natural_order(sums, layout, length)
    expected = oracle.by_position(params, windows, model.config)
    np.testing.assert_array_equal(found.tokens, expected[1])
    assert relative_error(found.nats, expected[0]) < 1e-5
    plain = make_eval_step(model, mesh)(params, batch)
    assert found.tokens.sum() == float(plain.tokens) > 0
    assert found.nats.sum() == pytest.approx(float(plain.nats), rel=1e-6)


@pytest.mark.parametrize("sizes", sampled([(2, 4), (2, 2, 2), (1, 3)], {(2, 4)}))
def test_shorter_windows_take_the_first_rows_of_the_table(sizes):
    """20 tokens of a table of 48; 8 chunks divide 48 and not 20, so that it is kept in another way."""
    model, mesh = model_on(*sizes)
    params, short = perturbed_params(model), build_model(at_length(model.config, 20))
    cut = shortened(params, short, mesh)
    batch = batch_on(mesh, short.config)
    found = in_natural_order(make_position_step(short, mesh)(cut, batch), layout_on(short.config, mesh), 20)
    table_LE = params["positions"]["table_LE"]
    shorter = {**params, "positions": {"table_LE": table_LE[:20]}}
    expected = oracle.by_position(shorter, windows_of(short.config), short.config)
    assert relative_error(found.nats, expected[0]) < 1e-5


def test_bins_are_powers_of_two_and_end_at_the_length():
    task = make_task(small_config())
    sums = LossSum(np.arange(11.0), np.array([0.0] + [2.0] * 10))
    bins = binned(task, sums)
    assert [of_bin["before"] for of_bin in bins] == [[2, 2], [3, 4], [5, 8], [9, 11]], "where nothing counts, no bin"
    assert [of_bin["bytes"] for of_bin in bins] == [2, 4, 8, 6]
    assert bins[1]["loss"] == (2 + 3) / 4
    assert sum(of_bin["bytes"] * of_bin["loss"] for of_bin in bins) == pytest.approx(sums.nats.sum())
    assert binned(task, LossSum(np.ones(1), np.ones(1)))[0]["before"] == [1, 1]


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A run with rope, whose windows can be of any length, before its first step."""
    folder = tmp_path_factory.mktemp("by_position")
    (folder / "text").write_bytes(TEXT)
    path = str(folder / "text")
    config = small_config(mesh__seq=4, data__source="text", data__path=path, model__positions="rope", model__layers=1)
    trainer = Trainer(config, folder / "run")
    trainer.save()
    trainer.close()
    return folder / "run", config


def test_a_whole_split_on_other_meshes_and_lengths(kept):
    """Windows may be longer than those that the model was trained on."""
    workdir, config = kept
    plain = evaluate_run(workdir, config=config)
    other = change(config, mesh__data=1, mesh__seq=8)
    one, same = (evaluate_by_position(c, workdir, "valid", [48, 60], None)["windows"] for c in (config, other))
    whole_split = len(TEXT) * 5 // 100 - 1  # each byte but the first, at every length
    assert [window["bytes"] for window in one + same] == [whole_split] * 4
    assert [window["loss"] for window in one] == pytest.approx([window["loss"] for window in same], rel=1e-6)
    assert one[0]["loss"] == pytest.approx(plain["loss"], rel=1e-6)
    assert [of_bin["before"][1] for of_bin in one[1]["bins"]] == [1, 2, 4, 8, 16, 32, 60]


def test_lengths_beyond_a_learned_table_are_refused():
    with pytest.raises(ConfigError, match=r"60 is beyond .*which has data.seq_len=48 rows; use lengths up to"):
        at_length(small_config(), 60)


def test_the_command_prints_and_keeps_what_it_found(kept):
    workdir, _ = kept
    done = subprocess.run(
        [sys.executable, "-m", "lss_jax.evaluate", "--workdir", workdir, "--by-position", "--lengths", "48,16"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((workdir / "by_position_valid.json").read_text())
    assert done.stdout.strip() == by_position.table_of(make_task(small_config()), found)
    assert done.stdout.splitlines()[1].split() == ["before", "16", "48"]
    assert (workdir / "by_position_valid.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((False, "16", None), "--lengths=16 has no use without --by-position; add that"),
        ((True, "16,x", None), "--lengths=16,x is no list of lengths; write different numbers"),
        ((True, "8,16", 1), "--batches=1 with --lengths=8,16 would compare different bytes; leave out --batches"),
        ((False, None, 0), "--batches=0 must be at least 1; leave it out"),
        ((False, None, None, 0), "--pictures=0 must be at least 1"),
        ((True, None, None, 3), "--pictures goes with --split alone; leave out --by-position, --rouge and --batches"),
    ],
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(ConfigError, match=message):
        by_position, lengths, batches, *pictures = options
        given = {"by_position": by_position, "lengths": lengths, "batches": batches}
        check(
            argparse.Namespace(**given, rouge=False, beams=None, pictures=pictures[0] if pictures else None),
            LanguageModel(small_config()),
        )


def test_lists_of_lengths():
    assert parse_lengths("512,128, 256") == [128, 256, 512]
    for bad in ("", "0", "-1", "128,", "1.5", "16,16"):
        with pytest.raises(ConfigError, match="is no list of lengths; write different numbers, as in 128,256,512"):
            parse_lengths(bad)
