"""Continues prompts with a run's newest checkpoint."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from lss_jax.config.schema import Config, from_dict, gather_problems, with_value
from lss_jax.generation.beam_search import BeamSearch
from lss_jax.generation.beams import PENALTY, Beams
from lss_jax.generation.decode import Generation
from lss_jax.generation.programs import reads_source
from lss_jax.generation.request import check_request, task_and_text
from lss_jax.generation.sampling import Sampling
from lss_jax.models import build_model
from lss_jax.storage.workdir import saved_config
from lss_jax.training.compatibility import check_workdir
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
    beams: int | None = None,
    length_penalty: float = PENALTY,
    config: Config | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> str:
    """The prompt and its continuation by a run's newest sound checkpoint; of an encoder-decoder, its answer alone.

    Every call compiles two programs; `lss_jax.generation.decode.Generation` holds on to them, and continues many
    prompts at a time.

    Args:
      workdir: the folder of a training run.
      prompt: at least one byte of UTF-8.
      tokens: how many to add; fewer if the document ends, by its end token or with `data.separator`. What is not UTF-8
        becomes U+FFFD.
      temperature: the logits are divided by it; 0 takes the likeliest token.
      top_k: sample from the k likeliest tokens; None for all.
      top_p: sample from the fewest tokens with this total probability (nucleus).
      seed: of the sampling.
      beams: of an encoder-decoder, and instead of all sampling: the likeliest text of a search with so many beams.
      length_penalty: of that search; see `Beams`.
      config: the run's own by default, as for `lss_jax.evaluate_run`; another mesh gives the same text.
      devices: the devices of the mesh; all there are by default.

    Raises:
      ConfigError: there is no run or no checkpoint, the config does not fit it or the devices, or the prompt or the
        sampling cannot work.
    """
    workdir, devices = Path(workdir), jax.devices() if devices is None else devices
    config = config or from_dict(saved_config(workdir))
    prompts, sampling = [prompt.encode()], Sampling(temperature, top_k, top_p, seed)
    choice = sampling if beams is None else Beams(beams, length_penalty)
    check(config, workdir, prompts, tokens, choice)
    mesh = mesh_of(config, devices, trains=False)
    _, generation = generation_of(config, workdir, mesh, prompts=prompts, tokens=tokens, choice=choice)
    return b"".join([*beginnings(config, prompts), *(new for (new,) in generation)]).decode(errors="replace")


def beginnings(config: Config, prompts: Sequence[bytes]) -> list[bytes]:
    """What the texts after these prompts begin with: the prompts, but nothing of a source that is answered."""
    return [b""] * len(prompts) if reads_source(config) else list(prompts)


def check(config: Config, workdir: Path, prompts: Sequence[bytes], tokens: int, choice: Sampling | Beams) -> None:
    """Raises a ConfigError, before anything is compiled, for what cannot work."""
    gather_problems(
        lambda: check_request(config, prompts, tokens, choice), lambda: check_workdir(config, workdir, trains=False)
    )


class BeamTexts:
    """The answers to sources by beam search; iterating yields them token by token, once all are found."""

    def __init__(self, search: BeamSearch, sources: list[np.ndarray]):
        self._search, self._sources, self.cache_bytes = search, sources, search.cache_bytes

    def __iter__(self) -> Iterator[list[bytes]]:
        yield from map(list, itertools.zip_longest(*self._search.pieces(self._sources), fillvalue=b""))


def generation_of(
    config: Config, workdir: Path, mesh: Mesh, prompts: Sequence[bytes], tokens: int, choice: Sampling | Beams
) -> tuple[int, Generation | BeamTexts]:
    """The step of the run's newest sound checkpoint, and the texts from its parameters."""
    config = with_value(config, "optim.offload", False)  # or all weights would come from the host for every token
    step, params = restore_params(build_model(config, mesh), mesh, workdir)
    if isinstance(choice, Sampling):
        return step, Generation(config, mesh, params, prompts=prompts, tokens=tokens, sampling=choice)
    sources = [task_and_text(config)[1].tokens_of(prompt) for prompt in prompts]
    longest = max(map(len, sources))
    search = BeamSearch(config, mesh, params, rows=len(sources), length=longest, tokens=tokens, beams=choice)
    return step, BeamTexts(search, sources)
