"""A loss or a gradient that is not finite updates nothing, is counted and told, and ends the run if it goes on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import sampled, small_config

from lss_jax.config.schema import RunError
from lss_jax.models.losses import LossSum, cross_entropy
from lss_jax.storage.metrics import read_records
from lss_jax.tasks import token_task
from lss_jax.training.trainer import Trainer

POISON = 255  # a target that makes the loss, or its gradient alone, not finite


@jax.custom_vjp
def only_backward(x, factor):
    """`x`, whose gradient is multiplied by `factor`."""
    return x


only_backward.defvjp(lambda x, factor: (x, factor), lambda factor, slope: (slope * factor, jnp.zeros_like(factor)))


def poisoned(gradient_alone: bool):
    def loss(logits_BlV, targets_Bl):
        sums, bad = cross_entropy(logits_BlV, targets_Bl), jnp.any(targets_Bl == POISON)
        if gradient_alone:
            return LossSum(only_backward(sums.nats, jnp.where(bad, jnp.inf, 1.0)), sums.tokens)
        return LossSum(sums.nats * jnp.where(bad, jnp.nan, 1.0), sums.tokens)

    return loss


def config_of(tmp_path, poison_at: list[int], **changes):
    data = np.random.default_rng(0).integers(97, 123, 8000).astype(np.uint8)
    data[poison_at] = POISON
    (tmp_path / "text").write_bytes(data.tobytes())
    rest = {"log_every": 1, "eval_every": 0, "eval_batches": 1, "checkpoint_every": 4, "optim__steps": 10}
    return small_config(
        **rest | changes,
        mesh__data=2,
        mesh__seq=2,
        model__layers=1,
        data__source="text",
        data__path=str(tmp_path / "text"),
    )


def kept(trainer):
    return jax.tree.map(np.asarray, (trainer.state.params, trainer.state.opt_state))


STATE_ON_HOST = {"mesh__shard": "all", "optim__offload": True}


@pytest.mark.parametrize("changes", sampled([{}, STATE_ON_HOST], [{}], rest=pytest.mark.faults))
@pytest.mark.parametrize("gradient_alone", sampled([False, True], [True], rest=pytest.mark.faults))
def test_a_bad_step_changes_nothing_and_the_run_goes_on(tmp_path, monkeypatch, capsys, gradient_alone, changes):
    monkeypatch.setattr(token_task, "cross_entropy", poisoned(gradient_alone))
    trainer = Trainer(config_of(tmp_path, [1000, 3000], **changes), tmp_path / "run", jax.devices()[:4])
    before, skipped = kept(trainer), []
    for record in trainer.fit():
        if record["split"] != "train":
            continue
        after = kept(trainer)
        same = all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))
        bad = not (np.isfinite(record["loss"]) and np.isfinite(record["grad_norm"]))
        assert same == bad
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(after))
        skipped += [record["step"]] * bad
        assert record["skipped"] == len(skipped)
        before = after
    trainer.close()
    assert 1 <= len(skipped) <= 2
    records = [r for r in read_records(tmp_path / "run" / "metrics.jsonl") if r["split"] == "train"]
    assert [r["step"] for r in records if not np.isfinite(r["grad_norm"])] == skipped
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text(), "which is no JSON"


def test_too_many_in_a_row_end_the_run_and_a_restart_counts_on(tmp_path, monkeypatch):
    monkeypatch.setattr(token_task, "cross_entropy", poisoned(False))
    poison = list(range(0, 8000, 16))  # in every window
    config = config_of(tmp_path, poison, optim__max_skipped=6)
    trainer = Trainer(config, tmp_path / "run", jax.devices()[:4])
    fresh = kept(trainer)
    for end in (6, 6):  # the second time from the checkpoint of step 4, with four in a row behind it
        with pytest.raises(RunError) as error:
            list(trainer.fit())
        told = str(error.value)
        assert told.startswith(
            f"loss nan and gradient norm nan at step {end}: not finite for optim.max_skipped=6 steps"
        )
        assert told.endswith("checkpoints/4; look at the data, or lower optim.learning_rate")
        jax.tree.map(np.testing.assert_array_equal, kept(trainer), fresh)
        trainer.close()
        trainer = Trainer(config, tmp_path / "run", jax.devices()[:4])
        assert trainer.step == 4
    trainer.close()
