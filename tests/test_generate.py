"""Generated text: logits as of a full forward pass, a cache that stays cut, and one text whatever the mesh."""

import shutil
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import model_on, random_bytes, relative_error, sampled, small_config

from lss_jax import hlo
from lss_jax.attention.setting import layout_on
from lss_jax.cache import Cache
from lss_jax.config import ConfigError
from lss_jax.decode import Generation, check_request, make_prefill, make_step
from lss_jax.generate import main, show
from lss_jax.mesh import shardings
from lss_jax.sampling import Sampling, sample
from lss_jax.state import kept_specs
from lss_jax.trainer import Trainer

ROOT = Path(__file__).parents[1]
GREEDY = Sampling(0.0, None, 1.0, seed=0)
DRAWN = Sampling(0.9, 50, 0.95, seed=3)
BOUND = 1e-5  # float32; relative to the largest logit


def large_params(model, mesh):
    """Large enough that attention matters, the same on every mesh."""

    def create():
        return jax.tree.map(lambda p: p * 3.0, model.init(jax.random.key(1)))

    return jax.jit(create, out_shardings=shardings(kept_specs(model, mesh), mesh))()


# Logits

STEPS = 7  # tokens behind each prompt, given and not drawn
TEXTS = [random_bytes(length + STEPS, seed=length) for length in (19, 13, 17, 16)]
VARIANTS = {
    "learned": {},
    "rope, grouped, window": {
        **{"model__positions": "rope", "model__kv_heads": 12, "attention__window": 9},
        "data__seq_len": 16,  # they go on beyond the trained length
    },
    "sinusoidal, prefix": {"model__positions": "sinusoidal", "attention__prefix": 12, "data__seq_len": 16},
    "learned, padded, prefix": {"attention__prefix": 13, "data__seq_len": 29},
    "none, untied, remat": {"model__positions": "none", "model__tied_head": False, "model__remat": "block"},
    "ntk, one head, dense": {
        **{"model__positions": "rope", "model__rope_scaling": "ntk", "model__rope_factor": 2.0},
        **{"model__kv_heads": 1, "attention__kernel": "dense"},
    },
    "vocabulary in shares": {"model__vocab_parallel": True, "model__vocab": 264},
    "documents": {"data__separator": "\x00"},
}


def logits_of_steps(model, mesh, params) -> np.ndarray:
    """`[B, STEPS, V]`, of the prompts' last tokens and of those behind them."""
    lengths = [len(text) - STEPS for text in TEXTS]
    padded = layout_on(model.config, mesh).padded(max(lengths))
    tokens_BL = np.stack([np.pad(text[:n], (0, padded - n)) for text, n in zip(TEXTS, lengths, strict=True)])
    cache = jax.jit(make_prefill(model, mesh, STEPS))(params, tokens_BL.astype(np.int32), np.array(lengths))
    step = jax.jit(make_step(model, mesh, padded), donate_argnums=1)
    logits = []
    for number in range(STEPS):
        position_B = np.array(lengths) - 1 + number
        token_B = np.array([text[p] for text, p in zip(TEXTS, position_B, strict=True)], np.int32)
        cache, logits_BV = step(params, cache, token_B, position_B, np.int32(number))
        logits.append(np.asarray(logits_BV))
    assert_every_token_is_there_once(cache, lengths)
    return np.stack(logits, axis=1)


def assert_every_token_is_there_once(cache: Cache, lengths):
    for position_c, length in zip(np.asarray(cache.position_Bc), lengths, strict=True):
        assert sorted(position_c[position_c >= 0]) == list(range(length - 1 + STEPS))


def logits_of_full_pass(config, params) -> np.ndarray:
    """The same by the oracle, a whole text at a time."""
    rows = []
    for text in TEXTS:
        L = config.data.seq_len if config.model.positions == "learned" else max(map(len, TEXTS))
        i, j = np.ogrid[:L, :L]
        seen_LL = (j <= i) | (j < config.attention.prefix)
        if config.attention.window:
            seen_LL = seen_LL & (j > i - config.attention.window)
        tokens_1L = np.pad(text, (0, L - len(text)))[None].astype(np.int32)
        with jax.default_device(jax.devices()[0]):
            logits_LV = np.asarray(FULL_PASS(params, tokens_1L, seen_LL[None], config.model)[0])
        rows.append(logits_LV[len(text) - STEPS - 1 : len(text) - 1])
    return np.stack(rows)


FULL_PASS = jax.jit(oracle.logits, static_argnums=3)


def check_logits(sizes, variant, **changes):
    wide = {"model__width": 96, "model__heads": 24}  # 2, 3 and 8 devices divide the heads, for Ulysses
    model, mesh = model_on(*sizes, **wide, **VARIANTS[variant], **changes)
    params = large_params(model, mesh)
    expected = logits_of_full_pass(model.config, jax.tree.map(np.asarray, params))
    assert relative_error(logits_of_steps(model, mesh, params), expected) < BOUND


def cases():
    strategies = {"lss": "zigzag", "ring": "contiguous", "ulysses": "zigzag"}
    sample = [
        ((1, 8), "lss", "zigzag", "learned"),
        ((1, 8), "ring", "contiguous", "rope, grouped, window"),
        ((1, 3), "ulysses", "zigzag", "learned, padded, prefix"),
        ((2, 2, 2), "lss", "zigzag", "vocabulary in shares"),
        ((1, 1), "lss", "zigzag", "rope, grouped, window"),
    ]
    grid = [
        (sizes, strategy, layout, variant)
        for sizes in ((1, 2), (1, 3), (1, 8))
        for strategy in strategies
        for layout in ("contiguous", "zigzag")
        for variant in ("learned", "rope, grouped, window")
    ]
    grid += [((2, 4), "lss", "zigzag", variant) for variant in VARIANTS]
    grid += [((2, 4), s, strategies[s], v) for s in ("ring", "ulysses") for v in VARIANTS if "dense" not in v]
    grid += [((1, 2, 2), "lss", "zigzag", variant) for variant in VARIANTS if "one head" not in variant]
    return sampled(list(dict.fromkeys(sample + grid)), sample)


@pytest.mark.parametrize("case", cases(), ids=str)
def test_steps_give_the_logits_of_a_full_forward_pass(case):
    sizes, strategy, layout, variant = case
    check_logits(sizes, variant, attention__strategy=strategy, attention__layout=layout)


# Texts


def generation(sizes, prompts, tokens, sampling=GREEDY, **changes) -> Generation:
    model, mesh = model_on(
        *sizes, **{"model__tied_head": False, **changes}
    )  # tied, it would say the same byte for ever
    return Generation(model.config, mesh, large_params(model, mesh), prompts, tokens, sampling)


def texts_of(generation) -> list[bytes]:
    return [b"".join(column) for column in zip(*generation, strict=True)]


@pytest.mark.parametrize("layout", sampled(["contiguous", "zigzag"], ["zigzag"]))
def test_greedy_text_is_the_same_on_every_mesh_and_the_cache_is_cut(layout):
    """2, 3 and 8 devices divide 48 prompt tokens, also twice, and 24 more."""
    prompt, found, of_one = random_bytes(48).tobytes(), {}, 0
    for devices in (1, 2, 3, 8):
        text = generation((1, devices), [prompt], 24, attention__layout=layout, model__positions="rope")
        found[devices] = texts_of(text)
        of_one = of_one or text.cache_bytes
        assert text.cache_bytes * devices == of_one
    layers, heads, head_width, slots = 2, 4, 8, 48 + 24
    assert of_one == layers * 2 * heads * slots * head_width * 4 + slots * 4
    assert len(found[1][0]) == 24 and len(set(found[1][0])) > 8, "something is said"
    assert found[1] == found[2] == found[3] == found[8]


PROMPTS = [b"import jax", b"def f(x):", b"import jax", "Zoë".encode(), b"#"]  # no number of devices divides five


@cache
def texts_of_one_device() -> list[bytes]:
    return texts_of(generation((1, 1), PROMPTS, 12, DRAWN))


@pytest.mark.parametrize("sizes", sampled([(2, 2, 2), (1, 8), (1, 3), (2, 1), (1, 1, 4)], [(2, 2, 2)]))
def test_drawn_texts_are_the_same_on_every_mesh(sizes):
    assert texts_of(generation(sizes, PROMPTS, 12, DRAWN)) == texts_of_one_device()


def test_drawn_texts_depend_on_seed_and_prompt_and_not_on_the_others():
    together = texts_of_one_device()
    model, mesh = model_on(1, 1, model__tied_head=False)
    alone = Generation(model.config, mesh, large_params(model, mesh), PROMPTS[4:], 12, DRAWN)
    assert texts_of(alone) == together[4:]
    assert together[0] != together[2], "the same prompt twice gives two texts"
    other_seed = Sampling(DRAWN.temperature, DRAWN.top_k, DRAWN.top_p, seed=4)
    assert set(together).isdisjoint(texts_of(generation((1, 1), PROMPTS, 12, other_seed)))


def test_a_text_ends_with_its_document():
    prompts = [b"abcdef", b"xyz"]
    endless = texts_of(generation((1, 1), prompts, 40, DRAWN))
    separator = next(bytes([byte]) for byte in endless[1] if byte < 128 and byte not in b"".join(prompts))
    ended = texts_of(generation((1, 1), prompts, 40, DRAWN, data__separator=separator.decode()))
    for whole, part in zip(endless, ended, strict=True):
        assert part == whole[: (whole + separator).index(separator) + 1]


# The compiled step


def test_a_step_takes_one_small_collective_per_layer_and_leaves_the_cache_in_its_place():
    layers, rows, devices = 3, 2, 4
    text = generation(
        (1, devices),
        [b"x" * 4096] * rows,
        32,
        **{"model__layers": layers, "model__kv_heads": 2, "model__positions": "rope", "model__scan_layers": False},
    )
    found = [one for one in hlo.collectives(text._step.as_text()) if one.elements > 2]
    assert Counter((one.kind, one.times) for one in found) == {("all-gather", layers): 1}
    assert found[0].elements == devices * rows * 4 * (8 + 1), "a row of each head and its log-sum-exp"
    assert text._step.memory_analysis().temp_size_in_bytes < text.cache_bytes, "not even one copy"


# Sampling

COUNT = 4_000
LOGITS = np.random.default_rng(0).normal(0, 2, 256).astype(np.float32)


def drawn(sampling: Sampling, count: int = COUNT) -> np.ndarray:
    """How often each byte comes."""
    logits_BV = jnp.broadcast_to(LOGITS, (count, 256))
    bytes_B = sample(logits_BV, sampling, jnp.zeros(count, jnp.uint32), jnp.arange(count))
    return np.bincount(np.asarray(bytes_B), minlength=256) / count


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, None, 1.0), (0.5, None, 1.0), (1.5, 5, 1.0), (1.0, None, 0.4), (2, 9, 0.7)],
)
def test_bytes_come_as_often_as_they_should(temperature, top_k, top_p):
    p = np.exp(LOGITS.astype(np.float64) / temperature)
    order = np.argsort(-p)
    p[order[top_k or 256 :]] = 0
    p /= p.sum()
    enough = np.searchsorted(np.cumsum(p[order]), top_p) + 1
    p[order[enough:]] = 0
    p /= p.sum()
    found = drawn(Sampling(temperature, top_k, top_p, seed=1))
    assert not found[p == 0].any()
    assert np.abs(found - p).sum() < 6 * np.sqrt(p * (1 - p) / COUNT).sum()


def test_greedy_top_k_1_and_a_tiny_top_p_take_the_likeliest_byte():
    for sampling in (GREEDY, Sampling(1.0, 1, 1.0, 0), Sampling(1.0, None, 1e-6, 0), Sampling(1e-30, None, 1.0, 0)):
        assert drawn(sampling, 10)[LOGITS.argmax()] == 1


def test_only_bytes_are_drawn_from_a_larger_vocabulary():
    logits_BV = jnp.concatenate((jnp.zeros((50, 256)), jnp.full((50, 44), 9.0)), axis=1)
    for sampling in (GREEDY, Sampling(1.0, None, 1.0, 0)):
        assert sample(logits_BV, sampling, jnp.zeros(50, jnp.uint32), jnp.arange(50)).max() < 256


# Bad input, and the command

REFUSED = {
    "learned, long prompt": (
        {},
        b"x" * 50,
        1,
        "has 50 bytes, more than data.seq_len=48 learned positions; cut it, or train",
    ),
    "learned, many tokens": ({}, b"x" * 40, 20, "leave room for --tokens=9, not 20; ask for less, or train with a"),
    "within the prefix": ({"attention__prefix": 9}, b"x", 1, "has 1 bytes, less than attention.prefix=9"),
    "documents": ({"data__separator": "||"}, b"a||b", 1, "has data.separator='||' in it"),
    "empty": ({}, b"", 1, "is empty"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_text_can_come_from_is_refused(case):
    changes, prompt, tokens, told = REFUSED[case]
    with pytest.raises(ConfigError) as refused:
        check_request(small_config(**changes), [prompt], tokens, GREEDY)
    assert told in str(refused.value) and "\n" not in str(refused.value)


def test_what_just_fits_is_not_refused():
    check_request(small_config(), [b"x" * 48], 1, GREEDY)
    check_request(small_config(), [b"x" * 40, b"y"], 9, GREEDY)
    check_request(small_config(model__positions="rope"), [b"x" * 400], 900, GREEDY)


def test_texts_are_shown_as_they_grow_and_broken_characters_as_such(capsys):
    accent, euro = "é".encode(), "€".encode()
    shown = []

    def bytes_of_two_rows():
        for first, second in zip(accent[1:] + euro + b"\xff.", b"abcde" + accent[:1], strict=True):
            shown.append(capsys.readouterr().out)
            yield [bytes([first]), bytes([second])]
        shown.append(capsys.readouterr().out)

    show(bytes_of_two_rows(), [b"1:" + accent[:1], b"2:"])
    assert shown == ["--- 1 of 2\n1:", "é", "", "", "€", "\ufffd", "."]
    assert capsys.readouterr().out == "\n--- 2 of 2\n2:abcde\ufffd\n"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    (folder / "text").write_bytes(random_bytes().tobytes())
    source = {"data__source": "text", "data__path": str(folder / "text")}
    config = small_config(mesh__data=1, mesh__seq=-1, model__layers=1, optim__steps=2, eval_batches=1, **source)
    trainer = Trainer(config, folder / "run", jax.devices()[:1])
    assert list(trainer.fit())
    trainer.close()
    return folder / "run"


def command(*arguments):
    line = [sys.executable, "-m", "lss_jax.generate", *map(str, arguments)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, timeout=300)


def test_the_command_prints_the_same_text_on_every_mesh(workdir):
    (workdir.parent / "prompt").write_bytes(b"from \xff file")
    asked = ["--workdir", workdir, "--prompt", "Zoë", "--prompt-file", workdir.parent / "prompt", "--tokens", 9]
    shown = command(*asked, "--top-k", 40)
    assert shown.returncode == 0, shown.stderr
    assert (
        shown.stdout.startswith("--- 1 of 2\nZoë".encode()) and "--- 2 of 2\nfrom \ufffd file".encode() in shown.stdout
    )
    assert b"devices  8 cpu, mesh data=1 x seq=8 x model=1" in shown.stderr and b"MiB per device" in shown.stderr
    other = command(*asked, "--top-k", 40, "--config.mesh.data=2", "--config.mesh.seq=2", "--config.mesh.model=2")
    assert (other.returncode, other.stdout) == (0, shown.stdout), other.stderr


def errors_of(*arguments) -> list[str]:
    failed = command(*arguments)
    lines = failed.stderr.decode().splitlines()
    assert failed.returncode == 2 and failed.stdout == b"" and all(line.startswith("error: ") for line in lines), lines
    return lines


def test_all_that_is_wrong_is_told_at_once(workdir):
    wrong = {
        "--temperature=-1": "must be at least 0",
        "--top-k=0": "leaves no byte; use at least 1",
        "--top-p=1.5": "must be greater than 0 and at most 1",
        "--tokens=0": "must be at least 1",
        "--prompt=": "the prompt is empty",
    }
    lines = errors_of("--workdir", workdir, *wrong)
    assert len(lines) == len(wrong)
    for told in wrong.values():
        assert any(told in line for line in lines), told


def test_a_mesh_unlike_the_devices_is_refused(workdir):
    (line,) = errors_of("--workdir", workdir, "--prompt=a", "--tokens=9", "--config.mesh.data=1", "--config.mesh.seq=3")
    assert "needs 3 devices, but 8 are found" in line


def test_missing_and_foreign_runs_are_refused(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"name": "of another program"}')
    for workdir, told in (
        (tmp_path / "no", "config.json cannot be read"),
        (tmp_path, "is not a config of this program"),
    ):
        monkeypatch.setattr(sys, "argv", ["generate", "--workdir", str(workdir), "--prompt=a"])
        with pytest.raises(ConfigError, match=told):
            main()


def test_a_damaged_checkpoint_is_refused(workdir, tmp_path):
    shutil.copytree(workdir, tmp_path / "run")
    for file in (tmp_path / "run" / "checkpoints" / "2" / "params").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    (line,) = errors_of("--workdir", tmp_path / "run", "--prompt=a", "--tokens=9")
    assert "no sound checkpoint is left" in line
