"""Hugging Face folders and runs that do not come in or go out: one line that says why, and nothing half-written."""

import errno
import json
import re

import numpy as np
import pytest
from helpers import change, small_config
from hf_folders import LLAMA, file_of, make_folder, with_tokenizer
from safetensors.numpy import load_file, save_file

from lss_jax import cli, convert
from lss_jax.config.schema import ConfigError, from_dict
from lss_jax.huggingface import run as run_module
from lss_jax.huggingface.folder import read_config
from lss_jax.huggingface.keys import expressing
from lss_jax.huggingface.run import export_run, import_run
from lss_jax.runtime.peers import Alone
from lss_jax.storage import checkpoint
from lss_jax.storage.workdir import saved_config
from lss_jax.training.trainer import Trainer


def test_a_damaged_checkpoint_does_not_go_out(tmp_path):
    config = small_config(**LLAMA, optim__steps=2)
    trainer = Trainer(config, tmp_path / "run")
    list(trainer.fit())
    trainer.save()
    trainer.close()
    file = tmp_path / "run" / "checkpoints" / "2" / "manifest" / "metadata"
    manifest = json.loads(file.read_text())
    manifest["checksums"]["params/head/kernel_EV"] = "0" * 16
    for seal, message in (
        (manifest["seal"], r"checkpoints/2 is damaged \(manifest: not what was saved\); put it back from a copy"),
        (
            checkpoint._seal(manifest),
            r"params/head/kernel_EV is not what was saved \(its checksum is another\); put",
        ),
    ):
        file.write_text(json.dumps(manifest | {"seal": seal}))
        with pytest.raises(ConfigError, match=message):
            export_run(config, tmp_path / "run", tmp_path / "out", None, "float32")
        assert [entry.name for entry in tmp_path.iterdir()] == ["run"], "nothing half-written"


def without(name):
    def damage(folder):
        tensors = load_file(file_of(folder))
        del tensors[name]
        save_file(tensors, file_of(folder))

    return damage


def with_tensor(name, array):
    def damage(folder):
        save_file(load_file(file_of(folder)) | {name: array}, file_of(folder))

    return damage


def with_config(**values):
    def damage(folder):
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return damage


def truncated(folder):
    file_of(folder).write_bytes(file_of(folder).read_bytes()[:-7])


def pickled(folder):
    file_of(folder).rename(folder / "pytorch_model.bin")


def indexed(folder):
    places = {"model.norm.weight": "model-00001-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


Q = "model.layers.1.self_attn.q_proj.weight"


REFUSED = {
    "no file": (lambda folder: file_of(folder).unlink(), r"has neither model.safetensors nor model.safetensors.index"),
    "a pickle": (pickled, r"pytorch_model.bin is a pickle, .* save the model again as safetensors"),
    "a missing file": (indexed, r"model-00001-of-00002.safetensors is missing; fetch it"),
    "a truncated file": (truncated, r"model.safetensors \(\d+ bytes\) is truncated or not a safetensors file"),
    "no config": (lambda folder: (folder / "config.json").unlink(), r"config.json cannot be read \(No such file"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), r"config.json is not valid JSON \(Expecting"),
    "a missing tensor": (without(Q), rf"has no tensor '{Q}', which is stack/blocks/attention/query/kernel here"),
    "another shape": (
        with_tensor(Q, np.zeros((32, 31), np.float32)),
        rf"'{Q}' in .* has shape \[32, 31\], and as stack/blocks/attention/query/kernel it needs \[32, 32\]",
    ),
    "integers": (with_tensor(Q, np.zeros((32, 32), np.int8)), rf"'{Q}' in .* is I8, .* must be one of F64, F32"),
    "a tensor too many": (
        with_tensor("model.layers.0.self_attn.q_proj.bias", np.zeros(32, np.float32)),
        r"'model.layers.0.self_attn.q_proj.bias' in .* is no parameter of LlamaForCausalLM",
    ),
    "an unknown architecture": (
        with_config(architectures=["BertModel"], model_type="bert"),
        r"architecture 'BertModel' is not known; known are LlamaForCausalLM \(llama\), .*GPT2LMHeadModel \(gpt2\)",
    ),
    "another activation": (
        with_config(hidden_act="gelu"),
        r"hidden_act='gelu' is not built here for llama, only 'silu'",
    ),
    "a bias": (with_config(attention_bias=True), r"attention_bias=True is not built here for llama"),
    "dynamic rope": (
        with_config(rope_parameters={"rope_type": "dynamic", "factor": 2.0}),
        r"rope_type='dynamic' is not known; known are 'default', 'linear', 'yarn', 'llama3'",
    ),
    "half of rope": (
        with_config(rope_parameters={"rope_type": "llama3", "factor": 2.0}),
        r"rope_type='llama3' has no 'original_max_position_embeddings'; add it",
    ),
    "part of the head": (
        with_config(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}),
        r"partial_rotary_factor=0.5 of rope_type='default' is not built here, only 1.0",
    ),
}


@pytest.fixture
def command_line(tmp_path, monkeypatch, capsys):
    """Runs `lss_jax.convert`; returns exit code and lines of stderr."""
    monkeypatch.setattr(cli.distributed, "start", lambda launch: Alone())  # this process has its devices

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["convert", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.run(convert.main)
        return ended.value.code, capsys.readouterr().err.splitlines()

    return run


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_come_in_is_one_line_and_exit_code_2(name, tmp_path, command_line):
    damage, message = REFUSED[name]
    make_folder(tmp_path / "theirs", "llama")
    damage(tmp_path / "theirs")
    code, told = command_line("--from-hf", tmp_path / "theirs", "--workdir", tmp_path / "run")
    assert code == 2 and len(told) == 1 and told[0].startswith("error: ")
    assert re.search(message, told[0]), told[0]
    assert not (tmp_path / "run").exists()


def test_layers_with_and_without_a_window_do_not_come_in(tmp_path, command_line):
    make_folder(tmp_path / "theirs", "qwen2")
    with_config(use_sliding_window=True, sliding_window=8, max_window_layers=1)(tmp_path / "theirs")
    code, told = command_line("--from-hf", tmp_path / "theirs", "--workdir", tmp_path / "run")
    assert code == 2
    assert re.search(r"1 of 2 layers have sliding_window=8, and the others do not; here attention.window is", told[0])


def test_the_command_makes_a_run_and_a_folder(tmp_path, command_line):
    make_folder(tmp_path / "theirs", "qwen3")
    extended = ("--config.model.rope_scaling=yarn", "--config.model.rope_factor=8.0", "--config.data.seq_len=384")
    ours = ("--workdir", tmp_path / "run")
    assert command_line("--from-hf", tmp_path / "theirs", *ours, *extended)[0] == 2, "nothing says the old length"
    known = "--config.model.rope_original=48"
    assert command_line("--from-hf", tmp_path / "theirs", *ours, *extended, known) == (0, [])
    config = from_dict(saved_config(tmp_path / "run"))
    assert (config.model.qk_norm, config.model.rope_scaling, config.model.rope_original) == (True, "yarn", 48)
    assert command_line("--from-hf", tmp_path / "theirs", *ours)[1] == [
        f"error: workdir {tmp_path / 'run'} holds a run already; choose another --workdir"
    ]
    assert command_line("--to-hf", tmp_path / "out", *ours) == (0, [])
    assert read_config(tmp_path / "out")["rope_parameters"]["rope_type"] == "yarn"
    code, told = command_line("--to-hf", tmp_path / "out", *ours)
    assert code == 2 and f"--to-hf={tmp_path / 'out'} is there already" in told[0]
    code, told = command_line("--to-hf", tmp_path / "other", *ours, "--family", "llama")
    assert code == 2 and "is not one of llama: model.qk_norm=True, and llama has False" in told[0]


def test_a_model_that_no_family_has_does_not_go_out(tmp_path):
    config = small_config(model__positions="sinusoidal", attention__prefix=3)
    nearest = "gpt2 comes nearest: model.qkv_bias=False, and gpt2 has True; model.positions='sinusoidal', and gpt2 has "
    with pytest.raises(ConfigError, match=nearest):
        export_run(config, tmp_path / "run", tmp_path / "out", None, "float32")
    with pytest.raises(
        ConfigError, match=r"one of any of .*; llama comes nearest: model.family='own', and llama has 'dec"
    ):
        expressing(small_config(**LLAMA, model__family="own"), None)
    with pytest.raises(ConfigError, match=r"attention.strategy='linear', and llama has softmax attention"):
        expressing(small_config(**LLAMA, attention__strategy="linear"), None)
    with pytest.raises(ConfigError, match="has no checkpoint yet; train there first"):
        export_run(small_config(**LLAMA), tmp_path / "run", tmp_path / "out", None, "float32")
    assert not list(tmp_path.iterdir())


def test_a_config_that_does_not_fit_what_a_run_starts_from(tmp_path):
    config = make_folder(tmp_path / "theirs", "llama")
    import_run(tmp_path / "theirs", tmp_path / "run", config)
    with pytest.raises(
        ConfigError, match=r"holds a run with model.mlp_width=88, not 96, and its parameters do not fit"
    ):
        Trainer(change(config, model__mlp_width=96), tmp_path / "run")


def test_a_scaling_extends_the_one_that_there_is(tmp_path, command_line):
    """A config that extends eight times does so to what came in, also if that was extended before."""
    make_folder(tmp_path / "theirs", "llama")
    extend = ("--config", "configs/extend.py", "--config.data.seq_len=64", "--config.model.remat=none")
    for source, name, factor in (("theirs", "first", 8.0), ("out", "second", 64.0)):
        run = ("--workdir", tmp_path / name)
        assert command_line("--from-hf", tmp_path / source, *run, *extend) == (0, [])
        model = from_dict(saved_config(tmp_path / name)).model
        assert (model.rope_scaling, model.rope_factor, model.rope_original) == ("yarn", factor, 48)
        if name == "first":
            assert command_line("--to-hf", tmp_path / "out", *run) == (0, [])
            assert read_config(tmp_path / "out")["max_position_embeddings"] == 384
    llama3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    with_config(rope_parameters={**llama3, "original_max_position_embeddings": 8192})(tmp_path / "theirs")
    code, told = command_line("--from-hf", tmp_path / "theirs", "--workdir", tmp_path / "third", *extend)
    assert (
        code == 2 and "--from-hf is scaled by 'llama3' with a factor of 32.0 already; use a --config without" in told[0]
    )


def test_a_tokenizer_with_more_tokens_than_the_model_does_not_come_in(tmp_path):
    config = make_folder(tmp_path / "theirs", "llama")
    with_tokenizer(tmp_path / "theirs", vocab=270)
    with pytest.raises(ConfigError, match=r"has 270 tokens, more than the model's model.vocab=263; give the tokenizer"):
        import_run(tmp_path / "theirs", tmp_path / "run", config)


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    config = make_folder(tmp_path / "theirs", "llama")
    import_run(tmp_path / "theirs", tmp_path / "run", config)

    def full(path, *_):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_module, "write_file", full)
    with pytest.raises(ConfigError, match=r"out cannot be written \(No space left on device\); make room, or choose"):
        export_run(config, tmp_path / "run", tmp_path / "out", None, "float32")
    monkeypatch.setattr(run_module, "_link_or_copy", lambda _, to: full(to))
    with pytest.raises(ConfigError, match=r"other/imported cannot be written \(No space left on device\)"):
        import_run(tmp_path / "theirs", tmp_path / "other", config)
    assert not list(tmp_path.rglob("*.unfinished"))
