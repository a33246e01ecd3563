"""What strategies that are not exact cannot do, a line each; and where nobody takes them for exact ones."""

import dataclasses

import numpy as np
import pytest
from alternative_cases import LINEAR, LONGFORMER, PERFORMER
from helpers import mesh_of, small_config

import lss_jax
from lss_jax.attention.strategies import EXACT
from lss_jax.config.schema import ConfigError
from lss_jax.generation.request import task_and_text
from lss_jax.inspection import planner
from lss_jax.tasks.language_model import LanguageModel
from lss_jax.training import compatibility
from lss_jax.training.compatibility import check_workdir
from lss_jax.training.setup import validate

BAD = {
    "attention.window=4 makes a mask that attention.strategy='linear' cannot express; use attention.window=0": {
        **LINEAR,
        "attention__window": 4,
    },
    "attention.prefix=4 makes a mask that attention.strategy='performer' cannot express; use attention.prefix=0": {
        **PERFORMER,
        "attention__prefix": 4,
    },
    "of several documents that do not see one another, a mask that attention.strategy='longformer' cannot express": {
        **LONGFORMER,
        "data__separator": "a",
    },
    "model.dropout=0.1 drops attention weights too, which attention.strategy='linear' never has; use": {
        **LINEAR,
        "model__dropout": 0.1,
    },
    "attention.kernel='dense' is not for attention.strategy='linear', which is computed in blocks of its own": {
        **LINEAR,
        "attention__kernel": "dense",
    },
    'attention.features=0 leaves attention.strategy="performer" nothing to compute with; use': {
        "attention__strategy": "performer"
    },
    "attention.features=16 has no use with attention.strategy='lss', which has no random features": {
        "attention__features": 16
    },
    "attention.global_tokens=2 has no use with attention.strategy='linear', whose tokens see what": {
        **LINEAR,
        "attention__global_tokens": 2,
    },
    "attention.regather=True has no use with attention.strategy='linear'": {**LINEAR, "attention__regather": True},
    'attention.window=0 is no window, which attention.strategy="longformer" needs': {
        **LONGFORMER,
        "attention__window": 0,
    },
    "attention.layout='zigzag' puts tokens apart that attention.strategy=\"longformer\" keeps": {
        **LONGFORMER,
        "attention__layout": "zigzag",
    },
    "attention.global_tokens=7 are more than the 6 tokens of a segment (data.seq_len=48 over mesh.seq=8)": {
        **LONGFORMER,
        "attention__global_tokens": 7,
        "mesh__seq": 8,
    },
    "attention.features=-1 must be at least 0": {**PERFORMER, "attention__features": -1},
}


@pytest.mark.parametrize("message", BAD)
def test_what_they_cannot_do_is_one_line(message):
    with pytest.raises(ConfigError) as error:
        validate(small_config(**BAD[message]), 8)
    (line,) = [line for line in str(error.value).splitlines() if message in line]
    assert "; use " in line or "must be" in line


def test_a_task_that_does_not_say_its_mask_is_refused(monkeypatch):
    monkeypatch.setattr(LanguageModel, "mask_kind", None)
    validate(small_config(), 8)
    with pytest.raises(
        ConfigError,
        match=r"task='language_model' has a mask of which attention.strategy='linear' knows nothing; use one",
    ):
        validate(small_config(**LINEAR), 8)


def test_documents_in_windows_of_their_own_are_no_mask():
    text = {"data__separator": "a", "data__pack": False}
    for strategy in (LINEAR, PERFORMER, LONGFORMER):
        validate(small_config(**strategy, **text), 8)
    with pytest.raises(
        ConfigError, match=r"data.pack=False has no use with data.source='stdlib', which is one document"
    ):
        validate(small_config(data__pack=False), 8)


@pytest.mark.parametrize("strategy", [LINEAR, PERFORMER, LONGFORMER], ids=lambda config: config["attention__strategy"])
def test_they_generate_nothing(strategy):
    with pytest.raises(ConfigError, match=r"cannot generate: a step attends exactly .*; give a run of .*'lss', 'ring'"):
        task_and_text(small_config(**strategy))


def test_they_are_not_taken_for_exact_attention():
    x = np.zeros((1, 16, 2, 8), np.float32)
    with pytest.raises(ConfigError, match=r"strategy='linear' is not exact, which .*; use one of 'lss', 'ring', 'ulys"):
        lss_jax.dot_product_attention(x, x, x, mesh=mesh_of(1, 2), strategy="linear")


def test_a_plan_changes_no_model(monkeypatch):
    """Exact strategies stand in for one another; one that is not exact stands for itself alone."""

    def nothing(config, sizes, strategy, room):
        raise ConfigError(strategy)

    monkeypatch.setattr(planner, "roomiest", nothing)
    for config, names in ((small_config(), set(EXACT)), (small_config(**LINEAR), {"linear"})):
        _, impossible = planner.plan(config, 2, planner.Room(2**30, None))
        assert {one.strategy for one in impossible} == names


@pytest.mark.parametrize(
    ("saved", "changes", "key"),
    [
        (LINEAR, {"attention__strategy": "lss"}, "attention.strategy"),
        ({}, LINEAR, "attention.strategy"),
        (PERFORMER, {"attention__features": 32}, "attention.features"),
        (PERFORMER, {"seed": 1}, "seed"),
        (LONGFORMER, {"attention__window": 9}, "attention.window"),
    ],
)
def test_a_run_does_not_go_on_as_another_model(saved, changes, key, monkeypatch, tmp_path):
    config = small_config(**saved)
    monkeypatch.setattr(compatibility, "saved_config", lambda workdir: dataclasses.asdict(config))
    check_workdir(config, tmp_path)
    with pytest.raises(
        ConfigError, match=rf"with {key}=.*, which is another model; choose another --workdir, or go on"
    ):
        check_workdir(small_config(**{**saved, **changes}), tmp_path)


def test_a_run_goes_on_with_what_does_not_change_its_model(monkeypatch, tmp_path):
    monkeypatch.setattr(compatibility, "saved_config", lambda workdir: dataclasses.asdict(small_config(**LINEAR)))
    assert check_workdir(small_config(**LINEAR, seed=1), tmp_path) == {"seed": (0, 1)}
    monkeypatch.setattr(compatibility, "saved_config", lambda workdir: dataclasses.asdict(small_config()))
    assert check_workdir(small_config(attention__strategy="ring"), tmp_path)
