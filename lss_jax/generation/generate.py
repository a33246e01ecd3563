"""Continues prompts with a run's newest checkpoint."""

from collections.abc import Sequence
from pathlib import Path

import jax
from jax.sharding import Mesh

from lss_jax.config.schema import Config, from_dict, gather_problems
from lss_jax.generation.decode import Generation, check_request
from lss_jax.generation.sampling import Sampling
from lss_jax.models import build_model
from lss_jax.storage.workdir import check_workdir, saved_config
from lss_jax.training.evaluation import restore_params
from lss_jax.training.setup import mesh_of


def generate_text(
    workdir: Path | str,
    prompt: str,
    tokens: int = 100,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    config: Config | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> str:
    """The prompt, and how a run's newest sound checkpoint goes on from it.

    Every call compiles two programs; `lss_jax.generation.decode.Generation` keeps them, and takes many prompts at a
    time.

    Args:
      workdir: of a training run.
      prompt: one byte of UTF-8 at least.
      tokens: bytes to add; fewer if the document ends (`data.separator`). What is no UTF-8 reads as U+FFFD.
      temperature: 0 takes the likeliest byte.
      top_k: draw from so many of the likeliest bytes; None for all.
      top_p: draw from those that make up this probability.
      seed: of what is drawn.
      config: the run's own, unless given, as for `lss_jax.evaluate_run`; another mesh gives the same text.
      devices: what the mesh is made of; all there are, unless given.

    Raises:
      ConfigError: there is no run or no checkpoint, the config does not fit it or the devices, or the prompt or the
        sampling cannot work.
    """
    workdir, devices = Path(workdir), jax.devices() if devices is None else devices
    config = config or from_dict(saved_config(workdir))
    prompts, sampling = [prompt.encode()], Sampling(temperature, top_k, top_p, seed)
    check(config, workdir, prompts, tokens, sampling)
    mesh = mesh_of(config, devices)
    _, generation = generation_of(config, workdir, mesh, prompts, tokens, sampling)
    return b"".join([*prompts, *(new for (new,) in generation)]).decode(errors="replace")


def check(config: Config, workdir: Path, prompts: Sequence[bytes], tokens: int, sampling: Sampling) -> None:
    """Refuses what cannot work, before anything is compiled."""
    gather_problems(lambda: check_request(config, prompts, tokens, sampling), lambda: check_workdir(config, workdir))


def generation_of(
    config: Config, workdir: Path, mesh: Mesh, prompts: Sequence[bytes], tokens: int, sampling: Sampling
) -> tuple[int, Generation]:
    """The step of the run's newest sound checkpoint, and the texts that it gives."""
    step, params = restore_params(build_model(config), mesh, workdir)
    return step, Generation(config, mesh, params, prompts, tokens, sampling)
