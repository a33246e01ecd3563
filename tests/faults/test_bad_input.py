"""Bad configs and bad files: an error of our own wording and exit code 2, or a config that traces; nothing else.

The command line runs in this process: it takes milliseconds, and any exception but its own exit would be seen.
"""

import sys

import jax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import ROOT, SMALL, write_text

from configs import base
from lss_jax import cli, train
from lss_jax.config.schema import ConfigError, flat, from_dict
from lss_jax.models import build_model
from lss_jax.parallel.mesh import make_mesh
from lss_jax.runtime.peers import Alone
from lss_jax.tasks import make_task
from lss_jax.training.optimizer import make_optimizer
from lss_jax.training.setup import validate
from lss_jax.training.state import init_state
from lss_jax.training.step import make_train_step

BAD = {  # arguments, and what the errors say: a part of each, in order
    "optim.steps=0": ["optim.steps=0 must be at least 1"],
    "optim.steps=-5": ["optim.steps=-5 must be at least 1"],
    "optim.steps=many": ["optim.steps"],
    "optim.steps=1.5": ["optim.steps"],
    "optim.learning_rate=0": ["optim.learning_rate=0.0 must be greater than 0"],
    "optim.learning_rate=nan": ["optim.learning_rate=nan must be greater than 0"],
    "optim.learning_rate=inf": ["optim.learning_rate=inf must be greater than 0"],
    "optim.clip_norm=-1": ["optim.clip_norm=-1.0 must be greater than 0"],
    "optim.beta1=1": ["optim.beta1=1.0 must be at least 0 and less than 1"],
    "optim.beta2=nan": ["optim.beta2=nan must be"],
    "optim.weight_decay=-0.1": ["optim.weight_decay=-0.1 must be at least 0"],
    "optim.warmup_steps=50": ["optim.warmup_steps=50 is more than optim.steps=20"],
    "optim.accumulate=0": ["optim.accumulate=0 must be at least 1"],
    "optim.accumulate=3": ["times optim.accumulate=3"],
    "optim.max_skipped=0": ["optim.max_skipped=0 must be at least 1"],
    "heartbeat_timeout=1": ["heartbeat_timeout=1 must be at least 10"],
    "seed=-1": ["seed=-1 must be at least 0"],
    "seed=4294967296": ["seed=4294967296 must be less than 2**32"],
    "log_every=0": ["log_every=0 must be at least 1"],
    "checkpoint_every=0": ["checkpoint_every=0 must be at least 1"],
    "checkpoints_kept=0": ["checkpoints_kept=0 must be at least 1"],
    "eval_every=-1": ["eval_every=-1 must be at least 0"],
    "mesh.seq=0": ["each size must be at least 1"],
    "mesh.seq=16": ["needs 16 devices, but 8 are found"],
    "mesh.data=-1 mesh.seq=-1": ["at most one may be -1"],
    "model.vocab=100": ["model.vocab=100 is less than 256"],
    "model.width=33": ["model.width=33 is not divisible by model.heads=4"],
    "model.heads=0": ["model.heads=0 must be at least 1", "model.kv_heads=0 must be at least 1"],
    "model.kv_heads=3": ["is not divisible by model.kv_heads=3"],
    "model.layers=-1": ["model.layers=-1 must be at least 1"],
    "model.dropout=1": ["model.dropout=1.0 must be at least 0 and less than 1"],
    "model.dtype=float16": ["model.dtype='float16' is not known; choose one of 'float32', 'bfloat16'"],
    "model.positions=absolute": ["model.positions='absolute' is not known"],
    "model.rope_factor=2": ["model.rope_factor=2.0 has no use"],
    "model.rope_columns=-8": ["model.rope_columns=-8 must be at least 0"],
    "attention.strategy=flash": ["attention.strategy='flash' is not known"],
    "attention.window=-1": ["attention.window=-1 must be at least 0"],
    "attention.prefix=64": ["attention.prefix=64 leaves nothing to predict"],
    "attention.block_keys=0": ["attention.block_keys=0 must be at least 1"],
    "attention.head_groups=3": ["is not divisible by attention.head_groups=3"],
    "data.seq_len=0": ["data.seq_len=0 must be at least 1"],
    "data.batch_size=0": ["data.batch_size=0 must be at least 1"],
    "data.path=": ['data.source="text" needs a file'],
    "data.source=stdlib": ["has no use with data.source"],
    "data.source=web": ["data.source='web' is not known"],
    "model=3": ["is a group of keys; set model.NAME instead"],
    "modle.heads=3": ["did you mean 'model.heads'?"],
    "optim.lr=1": ["unknown config key 'optim.lr'"],
    "optim.steps=x optim.beta1=y modle.heads=3 data.batch_size=": ["steps", "beta1", "modle.heads", "batch_size"],
    "optim.steps=0 optim.beta1=1 mesh.seq=3 data.path=/nowhere": ["mesh.seq=3", "optim.steps=0", "beta1", "/nowhere"],
}
BAD_FILES = {  # a file's content, and what the error says
    "missing": (None, "is not a file; give the path of a text file"),
    "empty": (b"", "is empty (0 bytes)"),
    "one byte": (b"x", "1 bytes give 0 for training (90%)"),
    "a byte too short": (b"x" * 72, "72 bytes give 64 for training (90%)"),
    "a folder": ("folder", "matches no file"),
    "a dangling link": ("link", "is not a file"),
}


@pytest.fixture
def command_line(tmp_path, monkeypatch, capsys):
    """Runs `lss_jax.train` with changes to a small config; returns exit code and lines of stderr."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(cli.distributed, "start", lambda launch: Alone())  # this process has its devices
    text = write_text(tmp_path)

    def run(*changes: str) -> tuple[int, list[str]]:
        values = SMALL | {"optim.steps": 20, "data.path": text}
        arguments = [f"--config.{key}={value}" for key, value in values.items()]
        arguments += [f"--config.{change}" for change in changes]
        workdir = ["--workdir", str(tmp_path / "run")]
        monkeypatch.setattr(sys, "argv", ["train", "--config", "configs/default.py", *workdir, *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.run(train.main)
        assert not (tmp_path / "run").exists(), "nothing half-written"
        return ended.value.code, capsys.readouterr().err.splitlines()

    return run


@pytest.mark.parametrize("changes", BAD)
def test_a_bad_config_is_told_whole_with_exit_code_2(command_line, changes):
    code, told = command_line(*changes.split())
    assert code == 2
    assert all(line.startswith("error: ") for line in told), told
    assert len(told) == len(BAD[changes]), told
    for line, part in zip(told, BAD[changes], strict=True):
        assert part in line


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named_with_exit_code_2(command_line, tmp_path, name):
    content, message = BAD_FILES[name]
    file = tmp_path / "bad"
    if content == "folder":
        file.mkdir()
    elif content == "link":
        file.symlink_to(tmp_path / "nothing")
    elif content is not None:
        file.write_bytes(content)
    code, told = command_line(f"data.path={file}")
    assert code == 2 and len(told) == 1
    assert told[0].startswith("error: data.") and message in told[0]


NUMBERS = st.sampled_from([-1, 0, 1, 2, 3, 4, 6, 8, 12, 16, 48, 64, 2**31, 2**32, 10**30])
FRACTIONS = st.sampled_from([-1.0, 0.0, 1e-300, 1e-3, 0.5, 0.999, 1.0, 1e38, float("nan"), float("inf")])
ODDITIES = st.sampled_from([None, "", "x", True, [], {}, {"a": 1}, b"x", 1.5, "\x00", "nan"])
SMALL_SIZES = {"model.layers": 1, "model.width": 16, "model.heads": 4, "data.seq_len": 16, "data.batch_size": 8}
HUGE = 10**5  # what passes the rules and is larger is a matter of memory, not of sense


def a_value(key: str, default) -> st.SearchStrategy:
    """Mostly values of the right type, near the edges; or another choice; now and then something else entirely."""
    kinds = {bool: st.booleans(), int: NUMBERS, float: FRACTIONS}
    choices = st.sampled_from(["lss", "ring", "ulysses", "contiguous", "zigzag", "dense", "blockwise", "rope", "none"])
    likely = kinds.get(type(default), choices)
    return st.one_of(likely, likely, likely, ODDITIES)


DEFAULTS = flat(base.get_config())
CHANGES = st.lists(st.sampled_from(sorted(DEFAULTS)), max_size=4, unique=True).flatmap(
    lambda keys: st.fixed_dictionaries({key: a_value(key, DEFAULTS[key]) for key in keys})
)


def nested(leaves: dict) -> dict:
    values: dict = {}
    for key, value in leaves.items():
        section, _, name = key.rpartition(".")
        (values.setdefault(section, {}) if section else values)[name] = value
    return values


def check_traces_or_is_refused(changes: dict) -> None:
    try:
        config = from_dict(nested(DEFAULTS | SMALL_SIZES | {"model.kv_heads": 4, "model.mlp_width": 16} | changes))
        sizes = validate(config, 8)
    except ConfigError as error:
        assert all(line.strip() for line in str(error).split("\n"))
        return
    if any(isinstance(value, int) and value > HUGE for value in changes.values()):
        return
    mesh = make_mesh(sizes, jax.devices()[:8])
    model, optimizer = build_model(config), make_optimizer(config.optim)
    state = jax.eval_shape(lambda: init_state(model, optimizer, mesh, config.seed))
    task = make_task(config)
    _, metrics = make_train_step(model, optimizer, mesh).eval_shape(state, task.batch_like(mesh))
    assert set(metrics) == {"loss", *task.sums._fields[1:-1], "grad_norm"}


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(CHANGES)
def test_any_config_is_refused_or_traces(changes):
    check_traces_or_is_refused(changes)


@pytest.mark.faults
@settings(max_examples=600, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(CHANGES)
def test_any_of_many_configs_is_refused_or_traces(changes):
    check_traces_or_is_refused(changes)
