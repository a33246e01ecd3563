"""Hugging Face folders in and out, without the library that makes them: shapes, slices, files, and what is refused."""

import errno
import json
import re
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util
from helpers import change, small_config, with_shapes
from hf_folders import LLAMA, MODELS, file_of, make_folder
from safetensors.numpy import load_file, save_file
from tokenizer_cases import trained

from lss_jax import cli, convert
from lss_jax.config.schema import ConfigError, from_dict
from lss_jax.huggingface import exporting
from lss_jax.huggingface import run as run_module
from lss_jax.huggingface.folder import Folder, read_config
from lss_jax.huggingface.keys import expressing, our_keys, their_config
from lss_jax.huggingface.run import export_run, import_run
from lss_jax.models import build_model
from lss_jax.parallel.host_memory import to_device
from lss_jax.parallel.mesh import make_mesh
from lss_jax.runtime.peers import Alone
from lss_jax.storage import checkpoint
from lss_jax.storage.workdir import saved_config
from lss_jax.training.evaluation import evaluate_run, restore_params
from lss_jax.training.trainer import Trainer


def params_on(workdir, config, mesh=(1, 1, 1)):
    """The run's parameters on a mesh, without padding, on the host."""
    sizes = dict(zip(("mesh__data", "mesh__seq", "mesh__model"), mesh, strict=True))
    devices = make_mesh(mesh, jax.devices()[: int(np.prod(mesh))])
    model = build_model(change(config, **sizes), devices)
    _, params = restore_params(model, devices, workdir)
    return jax.tree.map(np.asarray, with_shapes(jax.tree.map(to_device, params), model.natural_shapes))


@pytest.mark.parametrize("family", MODELS)
def test_keys_come_back_as_they_went_out(family, tmp_path):
    config = small_config(**MODELS[family])
    keys = our_keys(their_config(config, family, None), tmp_path)
    values = traverse_util.flatten_dict(
        {"model": vars(config.model), "attention": vars(config.attention), "data": vars(config.data)}, sep="."
    )
    assert {"model.heads", "model.vocab", "model.norm", "attention.window"} <= keys.keys()
    assert {key: values[key] for key in keys} == keys


def test_kernels_have_inputs_first_and_heads_apart(tmp_path):
    config = make_folder(tmp_path / "theirs", "llama")
    import_run(tmp_path / "theirs", tmp_path / "run", config)
    params, theirs = params_on(tmp_path / "run", config), load_file(file_of(tmp_path / "theirs"))
    blocks = params["stack"]["blocks"]
    for layer in range(2):
        q = theirs[f"model.layers.{layer}.self_attn.q_proj.weight"]
        out = theirs[f"model.layers.{layer}.self_attn.o_proj.weight"]
        np.testing.assert_array_equal(blocks["attention"]["query"]["kernel"][layer], q.T.reshape(32, 8, 4))
        np.testing.assert_array_equal(blocks["attention"]["out"]["kernel"][layer], out.T.reshape(8, 4, 32))
    np.testing.assert_array_equal(params["head"]["kernel_EV"], theirs["lm_head.weight"].T)


def test_fused_queries_keys_and_values_are_taken_apart(tmp_path):
    config = make_folder(tmp_path / "theirs", "gpt2")
    import_run(tmp_path / "theirs", tmp_path / "run", config)
    attention = params_on(tmp_path / "run", config)["stack"]["blocks"]["attention"]
    theirs = load_file(file_of(tmp_path / "theirs"))
    fused, bias = (theirs[f"transformer.h.1.attn.c_attn.{what}"] for what in ("weight", "bias"))
    for third, name in enumerate(("query", "key", "value")):
        np.testing.assert_array_equal(attention[name]["kernel"][1], fused.reshape(32, 3, 4, 8)[:, third])
        np.testing.assert_array_equal(attention[name]["bias"][1], bias.reshape(3, 4, 8)[third])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_mesh_reads_the_same_parameters_and_only_its_part(family, tmp_path, monkeypatch):
    config = make_folder(tmp_path / "theirs", family)
    import_run(tmp_path / "theirs", tmp_path / "run", config)
    expected, read = params_on(tmp_path / "run", config), []
    monkeypatch.setattr(
        Folder,
        "read",
        lambda self, name, cut, read_whole=Folder.read: read.append(found := read_whole(self, name, cut)) or found,
    )
    for mesh, changes in (
        ((1, 8, 1), {"mesh__shard": "all"}),
        ((2, 2, 2), {"mesh__shard": "all", "model__vocab_parallel": True}),
        ((2, 2, 2), {"mesh__shard": "all", "model__vocab_parallel": True, "optim__offload": True}),
        ((1, 3, 1), {"mesh__shard": "all"}),  # which divides little
        ((1, 2, 4), {}),
    ):
        read.clear()
        found = params_on(tmp_path / "run", change(config, **changes), mesh)
        jax.tree.map(np.testing.assert_array_equal, found, expected)
        if mesh in ((1, 8, 1), (2, 2, 2)):
            mlp = 32 * (88 if family == "llama" else 128)
            assert not any(array.size >= mlp for array in read if array.ndim == 2), "a shard needs no whole matrix"


@pytest.mark.parametrize("family", MODELS)
def test_a_folder_goes_out_as_it_came_in(family, tmp_path):
    config = make_folder(tmp_path / "theirs", family)
    import_run(tmp_path / "theirs", tmp_path / "run", config)
    assert export_run(config, tmp_path / "run", tmp_path / "out", None, "float32") == family
    before, after = (load_file(file_of(tmp_path / name)) for name in ("theirs", "out"))
    assert before.keys() == after.keys()
    jax.tree.map(np.testing.assert_array_equal, before, after)
    again = our_keys(read_config(tmp_path / "out"), tmp_path)
    assert again == our_keys(read_config(tmp_path / "theirs"), tmp_path)


def test_bfloat16_goes_out_as_it_came_in(tmp_path):
    config = make_folder(tmp_path / "theirs", "llama")
    rounded = {
        name: array.astype(ml_dtypes.bfloat16) for name, array in load_file(file_of(tmp_path / "theirs")).items()
    }
    save_file(rounded, file_of(tmp_path / "theirs"))
    import_run(tmp_path / "theirs", tmp_path / "run", config)
    export_run(config, tmp_path / "run", tmp_path / "out", None, "bfloat16")
    assert read_config(tmp_path / "out")["torch_dtype"] == "bfloat16"
    jax.tree.map(np.testing.assert_array_equal, load_file(file_of(tmp_path / "out")), rounded)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params_on(tmp_path / "run", config)))


def test_what_a_config_of_theirs_says_besides_is_kept(tmp_path):
    config = make_folder(tmp_path / "theirs", "llama")
    file = tmp_path / "theirs" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": 7, "max_position_embeddings": 4096}))
    import_run(tmp_path / "theirs", tmp_path / "run", config)
    export_run(config, tmp_path / "run", tmp_path / "out", None, "float32")
    theirs = read_config(tmp_path / "out")
    assert (theirs["eos_token_id"], theirs["max_position_embeddings"]) == (7, 4096)


def test_many_files_with_an_index(tmp_path, monkeypatch):
    config = make_folder(tmp_path / "theirs", "llama")
    import_run(tmp_path / "theirs", tmp_path / "run", config)
    monkeypatch.setattr(exporting, "LARGEST_FILE", 30_000)
    export_run(config, tmp_path / "run", tmp_path / "many", None, "float32")
    names = sorted(file.name for file in (tmp_path / "many").glob("*.safetensors"))
    assert len(names) > 2 and names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(4 * a.size for a in load_file(file_of(tmp_path / "theirs")).values())
    import_run(tmp_path / "many", tmp_path / "again", config)
    jax.tree.map(
        np.testing.assert_array_equal, params_on(tmp_path / "again", config), params_on(tmp_path / "run", config)
    )


def test_a_model_without_its_head_has_shorter_names(tmp_path):
    config = make_folder(tmp_path / "theirs", "gpt2")
    tensors = load_file(file_of(tmp_path / "theirs"))
    save_file(
        {name.removeprefix("transformer."): array for name, array in tensors.items()}, file_of(tmp_path / "theirs")
    )
    import_run(tmp_path / "theirs", tmp_path / "run", config)
    found = params_on(tmp_path / "run", config)["tokens"]["table_VE"]
    np.testing.assert_array_equal(found, tensors["transformer.wte.weight"])


def test_a_run_starts_from_it_trains_on_and_goes_out(tmp_path):
    """Evaluated at step 0, trained, resumed; what goes out is then what was trained."""
    data = {"data__source": "text", "data__path": str(tmp_path / "text"), "optim__steps": 4, "eval_batches": 1}
    (tmp_path / "text").write_bytes(bytes(np.random.default_rng(0).choice(list(b"abc \n"), 6000)))
    config = make_folder(
        tmp_path / "theirs", "llama", mesh__seq=4, mesh__data=2, checkpoint_every=2, log_every=1, **data
    )
    import_run(tmp_path / "theirs", tmp_path / "run", config)
    shutil.rmtree(tmp_path / "theirs")  # the run has what it needs
    before = evaluate_run(tmp_path / "run", batches=1)
    assert before["step"] == 0 and before["loss"] > 6, "weights as large as these are sure, and wrong"
    trainer = Trainer(from_dict(saved_config(tmp_path / "run")), tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, trainer.state.params, params_on(tmp_path / "run", config))
    for record in trainer.fit():
        if record["step"] >= 2:
            break
    trainer.close()
    resumed = Trainer(config, tmp_path / "run")
    assert resumed.step == 2
    *_, last = resumed.fit()
    resumed.save()
    resumed.close()
    assert last["loss"] < before["loss"]
    export_run(config, tmp_path / "run", tmp_path / "out", None, "float32")
    trained = np.asarray(resumed.state.params["head"]["kernel_EV"])
    np.testing.assert_array_equal(load_file(file_of(tmp_path / "out"))["lm_head.weight"], trained.T)


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


# What is refused


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


def test_adapters_on_what_was_imported_are_merged_on_the_way_out(tmp_path):
    """They start anew, so that at step 0 nothing changes; what is frozen stays bit by bit."""
    data = {"data__source": "text", "data__path": str(tmp_path / "text"), "optim__steps": 3, "eval_batches": 1}
    (tmp_path / "text").write_bytes(bytes(np.random.default_rng(0).choice(list(b"abc \n"), 6000)))
    config = make_folder(tmp_path / "theirs", "llama", mesh__seq=4, mesh__data=1, **data)
    import_run(tmp_path / "theirs", tmp_path / "run", config)
    adapted = change(config, lora__rank=2, lora__targets="query,down")
    plain = evaluate_run(tmp_path / "run", batches=1, config=config, devices=jax.devices()[:4])["loss"]
    trainer = Trainer(adapted, tmp_path / "run", jax.devices()[:4])
    assert trainer.evaluate("valid", 1)["loss"] == pytest.approx(plain, rel=1e-6)
    list(trainer.fit())
    trainer.save()
    trainer.close()
    export_run(adapted, tmp_path / "run", tmp_path / "out", None, "float32")
    before, after = (load_file(file_of(tmp_path / name)) for name in ("theirs", "out"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    adapted_names = ("self_attn.q_proj.weight", "mlp.down_proj.weight")
    assert changed == {f"model.layers.{layer}.{name}" for layer in range(2) for name in adapted_names}
    blocks = jax.tree.map(np.asarray, trainer.state.params)["stack"]["blocks"]
    down = blocks["mlp"]["down"]
    expected = down["kernel"][1] + 16.0 / 2 * down["lora_a"][1] @ down["lora_b"][1]
    np.testing.assert_allclose(after["model.layers.1.mlp.down_proj.weight"], expected.T, rtol=1e-5, atol=1e-6)


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


def with_tokenizer(folder, vocab=263):
    """A tokenizer, with what lies beside it."""
    trained(folder, size=vocab)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "generation_config.json").write_text("{}")


def test_a_tokenizer_comes_in_and_goes_out_and_moves_with_the_run(tmp_path):
    config = make_folder(tmp_path / "theirs", "llama")
    with_tokenizer(tmp_path / "theirs")
    import_run(tmp_path / "theirs", tmp_path / "run", config)
    (tmp_path / "run").rename(tmp_path / "moved")
    moved = from_dict(saved_config(tmp_path / "moved"))
    assert moved.data.tokenizer == str(tmp_path / "moved" / "imported" / "tokenizer.json")
    export_run(moved, tmp_path / "moved", tmp_path / "out", None, "float32")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    (tmp_path / "theirs" / "tokenizer.json").unlink()
    (tmp_path / "theirs" / "tokenizer.model").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"has tokenizer.model, but no tokenizer.json; save the tokenizer by transf"):
        import_run(tmp_path / "theirs", tmp_path / "other", config)
    (tmp_path / "moved" / "imported" / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"data.tokenizer='.*imported/tokenizer.json' is not a file; put it back"):
        export_run(moved, tmp_path / "moved", tmp_path / "again", None, "float32")
    assert not list(tmp_path.glob("*.unfinished")) and not (tmp_path / "other").exists()


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


def test_an_import_that_was_killed_is_made_anew(tmp_path):
    config = make_folder(tmp_path / "theirs", "llama")
    import_run(tmp_path / "theirs", tmp_path / "run", config)
    (tmp_path / "run" / "config.json").unlink()
    file_of(tmp_path / "run" / "imported").unlink()
    import_run(tmp_path / "theirs", tmp_path / "run", config)
    assert evaluate_run(tmp_path / "run", batches=1)["step"] == 0
