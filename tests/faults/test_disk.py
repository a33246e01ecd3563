"""A disk that fills up, and a folder that turns read-only: one clear error, and the last sound checkpoint intact."""

import resource
import subprocess
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import command, finish, saved, start, write_text

from lss_jax.config.schema import RunError
from lss_jax.storage.checkpoint import CheckpointWriter


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount; the test with a limit on files does not")
    yield disk
    subprocess.run(["umount", disk], check=True)


def assert_ends_clearly(process, err: str) -> None:
    assert process.returncode == 3, err
    assert "Traceback" not in err, err
    told = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(told) == 1, err
    assert "cannot be written to" in told[0] and "goes on from there" in told[0]
    assert (
        "the last sound checkpoint is" in told[0]
        and told[0].split("sound checkpoint is ")[1].split(";")[0][-2:] == "/5"
    )


def train(workdir, text, steps, **changes):
    process = start(command(workdir, text, optim__steps=steps, checkpoint_every=5, **changes), 2)
    return process, finish(process)[1]


@pytest.mark.faults
def test_a_disk_that_fills_up(tmp_path, small_disk):
    text = write_text(tmp_path)
    process, err = train(small_disk / "run", text, 5)
    assert process.returncode == 0, err
    before = saved(small_disk / "run", 5)
    filler = small_disk / "filler"
    free = 4096 * int(subprocess.check_output(["stat", "-f", "-c", "%a", small_disk]))
    filler.write_bytes(bytes(free - 100_000))
    process, err = train(small_disk / "run", text, 20)
    assert_ends_clearly(process, err)
    jax.tree.map(np.testing.assert_array_equal, saved(small_disk / "run", 5), before)
    assert not list((small_disk / "run" / "checkpoints").glob("*tmp*")), "half a checkpoint would be in the way"
    filler.unlink()
    process, err = train(small_disk / "run", text, 10)
    assert process.returncode == 0, err


@pytest.mark.faults
def test_a_folder_that_turns_read_only(tmp_path, small_disk):
    text = write_text(tmp_path)
    train(small_disk / "run", text, 5)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    process, err = train(small_disk / "run", text, 20)
    assert process.returncode == 2 and err.count("\n") == 1, err
    assert "is not a folder that can be written to; choose another" in err


@pytest.mark.faults
def test_a_limit_on_files(tmp_path):
    """The kernel refuses every write past 40 kB of a file (EFBIG), in Python, in C++, wherever it comes from."""
    text = write_text(tmp_path)
    _, err = train(tmp_path / "run", text, 5)
    before = saved(tmp_path / "run", 5)
    run = command(tmp_path / "run", text, optim__steps=20, checkpoint_every=5)
    limited = ["prlimit", f"--fsize={40_000}", *run]
    process = start(limited, 2, JAX_ENABLE_COMPILATION_CACHE="false")
    _, err = finish(process)
    assert_ends_clearly(process, err)
    jax.tree.map(np.testing.assert_array_equal, saved(tmp_path / "run", 5), before)


@pytest.fixture
def small_files():
    """In this process no file may grow past 40 kB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.filterwarnings("ignore:Error writing persistent compilation cache")  # which cannot grow either
def test_a_save_that_fails_in_the_background_is_told_at_the_next_look(tmp_path, small_files):
    placed = jax.NamedSharding(jax.make_mesh((2,), ("data",), devices=jax.devices()[:2]), jax.P("data"))
    values = np.random.default_rng(0).standard_normal((40, 64, 64), np.float32)
    arrays = {str(i): jax.device_put(value, placed) for i, value in enumerate(values)}
    writer = CheckpointWriter(tmp_path, kept=2, resumed_step=0)
    writer.save(5, {}, params=arrays, opt_state=jax.tree.map(jnp.square, arrays))
    with pytest.raises(RunError, match=r"cannot be written to .*; there is no checkpoint yet; make room"):
        for _ in range(600):
            writer.check()
            time.sleep(0.1)
    assert not list(tmp_path.iterdir()), "half a checkpoint would be in the way"
