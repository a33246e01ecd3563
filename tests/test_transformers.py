"""Models of the library `transformers` come in and go out: logits, gradients, curves and files are theirs."""

from functools import cache

import jax
import numpy as np
import pytest
from flax import traverse_util
from helpers import batch_on, mesh_of, small_config, windows_of
from oracle import learning_rate, plain_inputs
from tokenizer_cases import CORPUS, trained

from lss_jax.config.schema import flat_keys
from lss_jax.data.batch import Batch
from lss_jax.generation.generate import generate_text
from lss_jax.huggingface.exporting import groups_of
from lss_jax.huggingface.families import FAMILIES
from lss_jax.huggingface.folder import CONFIG, read_config
from lss_jax.huggingface.importing import shapes_by_name
from lss_jax.huggingface.keys import family_of, our_keys
from lss_jax.huggingface.run import export_run, import_run
from lss_jax.huggingface.tensors import their_part
from lss_jax.models import build_model
from lss_jax.parallel.layout import layout_on
from lss_jax.training.evaluation import restore_params
from lss_jax.training.setup import validate
from lss_jax.training.step import make_means_and_gradient, make_prediction_step
from lss_jax.training.trainer import Trainer

pytestmark = pytest.mark.transformers

SIZES = {
    "vocab_size": 259,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
THEIRS = {  # the class of the config, and its arguments
    "llama": ("LlamaConfig", {**SIZES, "rms_norm_eps": 1e-5}),
    "llama 3": ("LlamaConfig", {**SIZES, "rope_parameters": {**LLAMA3, "original_max_position_embeddings": 16}}),
    "llama, yarn, tied": ("LlamaConfig", {**SIZES, "tie_word_embeddings": True, "rope_parameters": YARN}),
    "mistral": ("MistralConfig", {**SIZES, "head_dim": 16, "sliding_window": 11}),
    "qwen 2": ("Qwen2Config", SIZES),
    "qwen 2, sliding": (
        "Qwen2Config",
        {**SIZES, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0},
    ),
    "qwen 3": ("Qwen3Config", {**SIZES, "head_dim": 24}),
    "gpt-2": ("GPT2Config", {"vocab_size": 259, "n_positions": 48, "n_embd": 64, "n_layer": 2, "n_head": 8}),
}
OURS = {"model__norm": "rms", "model__mlp": "swiglu", "model__bias": False, "model__positions": "rope"}
MESHES = [(1, 1, 1), (1, 8, 1), (2, 2, 2)]
WAYS = [(mesh, "lss") for mesh in MESHES] + [((1, 4, 1), "ring"), ((1, 4, 1), "ulysses")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Makes the folder of a family, once, with tensors in which nothing is zero or one."""

    @cache
    def folder(name):
        import torch
        import transformers

        kind, values = THEIRS[name]
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**values))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        path = tmp_path_factory.mktemp("theirs") / "model"
        model.save_pretrained(path)
        return path

    return folder


def loaded(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def config_for(folder, mesh=(1, 1, 1), **changes):
    """The folder's keys in a small config."""
    keys = our_keys(read_config(folder), folder / CONFIG)
    sizes = dict(zip(("mesh__data", "mesh__seq", "mesh__model"), mesh, strict=True))
    return small_config(**{key.replace(".", "__"): value for key, value in keys.items()}, **sizes, **changes)


def run_of(folder, workdir, mesh=(1, 1, 1), **changes):
    """A run at step 0 made of a folder: its config, model, mesh and parameters."""
    config = config_for(folder, mesh, **changes)
    validate(config, int(np.prod(mesh)))
    import_run(folder, workdir, config)
    devices = mesh_of(*mesh)
    model = build_model(config, devices)
    step, params = restore_params(model, devices, workdir)
    assert step == 0
    return config, model, devices, params


def our_logits(model, mesh, params, tokens_BL):
    """Logits `BLV` of a forward pass with the config's strategy, natural order."""
    positions_L = layout_on(model.config, mesh).positions(tokens_BL.shape[1])
    ordered_BL = tokens_BL[:, positions_L]
    batch = Batch(ordered_BL, ordered_BL, positions_L, np.arange(len(tokens_BL), dtype=np.int32), None, None)
    logits_BLV = make_prediction_step(model, mesh, lambda logits: logits)(params, batch)
    return np.asarray(logits_BLV)[:, np.argsort(positions_L)]


def their_logits(model, tokens_BL):
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens_BL)).logits.numpy()


def tokens(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (8, 48), np.int32)


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("name", THEIRS)
def test_logits_are_theirs_after_import(name, way, folders, tmp_path):
    mesh, strategy = way
    _, model, devices, params = run_of(folders(name), tmp_path / "run", mesh, attention__strategy=strategy)
    expected = their_logits(loaded(folders(name)), tokens())
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(our_logits(model, devices, params, tokens()), expected, atol=1e-4)


def under_their_names(tree, model, family):
    """A tree like our parameters as their tensors."""
    flat = {name: np.asarray(leaf) for name, leaf in traverse_util.flatten_dict(tree, sep="/").items()}
    found = {}
    for group in groups_of(FAMILIES[family].tensors, shapes_by_name(model)):
        for layer, tensor in enumerate(group.tensors):
            parts = [flat[name] if tensor == group.theirs.name else flat[name][layer] for name in group.names]
            found[tensor] = np.concatenate([their_part(group.theirs, part) for part in parts], -1)
    return found


@pytest.mark.parametrize("name", THEIRS)
def test_gradients_by_name_are_those_of_pytorch(name, folders, tmp_path):
    folder = folders(name)
    config, model, mesh, params = run_of(folder, tmp_path / "run", (2, 2, 2))
    means, gradient = jax.jit(make_means_and_gradient(model, mesh))(params, batch_on(mesh, config), 0)
    ours = under_their_names(gradient, model, family_of(read_config(folder), folder))

    theirs = loaded(folder)
    loss = their_loss(theirs, windows_of(config), config)
    loss.backward()
    assert float(means["loss"]) == pytest.approx(loss.item(), abs=1e-5)
    expected = {key: value.grad.numpy() for key, value in theirs.named_parameters()}
    assert ours.keys() == expected.keys()
    largest = max(np.abs(value).max() for value in expected.values())
    for key, value in expected.items():  # a bias of keys that are not rotated has no gradient but rounding
        np.testing.assert_allclose(ours[key], value, rtol=1e-4, atol=1e-6 * largest, err_msg=key)


def their_loss(model, windows, config):
    """Mean nats of the windows' targets."""
    import torch

    tokens_BL, targets_BL, *_ = plain_inputs(windows, config)
    logits_BLV = model(torch.tensor(tokens_BL)).logits
    targets = torch.tensor(targets_BL, dtype=torch.long)
    return torch.nn.functional.cross_entropy(logits_BLV.flatten(0, 1), targets.flatten(), ignore_index=-1)


@pytest.mark.parametrize("name", ["llama 3", "mistral", "qwen 2", "qwen 3", "gpt-2"])
def test_ten_steps_of_adamw_are_those_of_pytorch(name, folders, tmp_path):
    import torch

    config, workdir = config_for(folders(name), (2, 2, 2), optim__steps=10, log_every=1), tmp_path / "run"
    import_run(folders(name), workdir, config)
    trainer = Trainer(config, workdir, jax.devices()[:8])
    batches = [windows_of(config, seed=step) for step in range(10)]
    trainer.training_batch = lambda step: batch_on(trainer.mesh, config, seed=step)
    ours = [record["loss"] for record in trainer.fit() if record["split"] == "train"]
    trainer.close()

    model, optim, theirs = loaded(folders(name)), config.optim, []
    by_decay = [[p for p in model.parameters() if (p.ndim > 1) == decays] for decays in (True, False)]
    groups = [{"params": p, "weight_decay": d} for p, d in zip(by_decay, (optim.weight_decay, 0.0), strict=True)]
    optimizer = torch.optim.AdamW(groups, betas=(optim.beta1, optim.beta2))
    for step, windows in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, optim)
        optimizer.zero_grad()
        loss = their_loss(model, windows, config)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm, foreach=False)
        optimizer.step()
        theirs.append(loss.item())
    assert theirs[-1] < theirs[0]
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


@pytest.mark.parametrize("name", THEIRS)
def test_what_goes_out_is_what_came_in(name, folders, tmp_path):
    """Bit by bit; and `transformers` finds nothing missing, and its logits are the same."""
    from safetensors.numpy import load_file

    config, *_ = run_of(folders(name), tmp_path / "run")
    family = export_run(config, tmp_path / "run", tmp_path / "out", None, "float32")
    assert family == family_of(read_config(folders(name)), folders(name))
    before, after = (load_file(folder / "model.safetensors") for folder in (folders(name), tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[key], after[key]) for key in before)
    expected = their_logits(loaded(folders(name)), tokens())
    np.testing.assert_allclose(their_logits(loaded(tmp_path / "out"), tokens()), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["llama, yarn, tied", "mistral", "qwen 2", "qwen 3", "gpt-2"])
def test_a_trained_run_goes_out_with_our_logits(name, folders, tmp_path):
    config, workdir = config_for(folders(name), (1, 4, 2), optim__steps=3, log_every=1), tmp_path / "run"
    import_run(folders(name), workdir, config)
    trainer = Trainer(config, workdir, jax.devices()[:8])
    trainer.training_batch = lambda step: batch_on(trainer.mesh, config, seed=step)
    list(trainer.fit())
    trainer.save()
    trainer.close()
    ours = our_logits(trainer.model, trainer.mesh, trainer.state.params, tokens())
    assert np.abs(ours - their_logits(loaded(folders(name)), tokens())).max() > 1e-2
    export_run(config, workdir, tmp_path / "out", None, "float32")
    np.testing.assert_allclose(their_logits(loaded(tmp_path / "out"), tokens()), ours, atol=1e-4)


def test_a_run_that_was_never_theirs_goes_out(tmp_path):
    """A fresh Llama-class model of ours, with a larger base for longer contexts, which is a base to them."""
    ntk = {"model__rope_scaling": "ntk", "model__rope_factor": 4.0}
    config = small_config(**OURS, **ntk, optim__steps=2, mesh__seq=4, mesh__data=1)
    trainer = Trainer(config, tmp_path / "run", jax.devices()[:4])
    list(trainer.fit())
    trainer.save()
    trainer.close()
    assert export_run(config, tmp_path / "run", tmp_path / "out", None, "float32") == "llama"
    ours = our_logits(trainer.model, trainer.mesh, trainer.state.params, tokens())
    np.testing.assert_allclose(their_logits(loaded(tmp_path / "out"), tokens()), ours, atol=1e-4)
    assert flat_keys(config)["model.rope_scaling"] == "ntk"


def test_a_run_with_a_tokenizer_writes_the_same_text_there(tmp_path):
    """Greedily, token by token, and up to the same end token."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (tmp_path / "text").write_text(CORPUS * 20)
    data = {"data__source": "text", "data__path": str(tmp_path / "text"), "data__tokenizer": trained(tmp_path)}
    sizes = {"model__vocab": 401, "optim__steps": 40, "optim__learning_rate": 1e-2, "mesh__seq": 4, "mesh__data": 2}
    trainer = Trainer(small_config(**OURS, **data, **sizes), tmp_path / "run")
    list(trainer.fit())
    trainer.save()
    trainer.close()
    export_run(trainer.config, tmp_path / "run", tmp_path / "out", None, "float32")
    ours = generate_text(tmp_path / "run", "one ", tokens=24, temperature=0)
    model, tokenizer = (kind.from_pretrained(tmp_path / "out") for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert model.config.eos_token_id == tokenizer.eos_token_id == 0
    found = model.generate(tokenizer("one ", return_tensors="pt").input_ids, max_new_tokens=24, do_sample=False)
    assert tokenizer.decode(found[0], skip_special_tokens=True) == ours and len(ours) > 20
