"""Hugging Face folders in and out, without the library that makes them: keys, shapes, slices and files."""

import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util
from helpers import change, small_config, with_shapes
from hf_folders import MODELS, file_of, make_folder, with_tokenizer
from safetensors.numpy import load_file, save_file

from lss_jax.config.schema import ConfigError, from_dict
from lss_jax.huggingface import exporting
from lss_jax.huggingface.folder import Folder, read_config
from lss_jax.huggingface.keys import our_keys, their_config
from lss_jax.huggingface.run import export_run, import_run
from lss_jax.models import build_model
from lss_jax.parallel.host_memory import to_device
from lss_jax.parallel.mesh import make_mesh
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


def test_an_import_that_was_killed_is_made_anew(tmp_path):
    config = make_folder(tmp_path / "theirs", "llama")
    import_run(tmp_path / "theirs", tmp_path / "run", config)
    (tmp_path / "run" / "config.json").unlink()
    file_of(tmp_path / "run" / "imported").unlink()
    import_run(tmp_path / "theirs", tmp_path / "run", config)
    assert evaluate_run(tmp_path / "run", batches=1)["step"] == 0
