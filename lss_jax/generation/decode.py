"""Text generation, token by token: prompts that go on, or sources that are answered."""

import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lss_jax.config.schema import Config
from lss_jax.data.text import bytes_of
from lss_jax.generation.cache import Cache
from lss_jax.generation.programs import (
    cache_specs,
    forward_model,
    make_prefill,
    make_source_prefill,
    make_step,
    reads_source,
)
from lss_jax.generation.request import check_request, task_and_text
from lss_jax.generation.sampling import Sampling, sample, spoken
from lss_jax.models import Params
from lss_jax.parallel.layout import SEQUENCE, SOURCE, layout_on
from lss_jax.parallel.mesh import DATA, MODEL, like, shardings
from lss_jax.tasks.task import Task


class Opening(NamedTuple):
    """What the first step of a generation starts from, of each row."""

    prompt_BL: np.ndarray  # padded, for the prefill
    length_B: np.ndarray
    token_B: np.ndarray
    position_B: np.ndarray
    written: int  # slots of the cache that the prefill fills, over all devices


def opening_of(task: Task, mesh: Mesh, prompts: Sequence[np.ndarray], length: int) -> Opening:
    """The opening after these tokens, padded to at least `length`."""
    sequence = SEQUENCE if task.start_token is None else SOURCE
    length_B = np.array([len(row) for row in prompts], np.int32)
    L = layout_on(task.config, mesh, sequence).padded(length)
    prompt_BL = np.stack([np.pad(row, (0, L - len(row))) for row in prompts]).astype(np.int32)
    if task.start_token is None:
        last_B = prompt_BL[np.arange(len(prompts)), length_B - 1]
        return Opening(prompt_BL, length_B, last_B, length_B - 1, written=L)
    start_B = np.full_like(length_B, task.start_token)
    return Opening(prompt_BL, length_B, start_B, np.zeros_like(length_B), written=0)


def surplus(rows: int, mesh: Mesh) -> int:
    """How many rows are missing for the mesh to divide them."""
    return -rows % (mesh.shape[DATA] * mesh.shape[MODEL])


class Generation:
    """Continues prompts, or answers sources, by programs compiled for this mesh; iterating runs them.

    Each iteration yields the bytes of one token per prompt, or `b""` after the end of its document, and for a token
    that stands for no text. Texts are the same on every mesh, except where two tokens are so close that rounding
    decides; and a text does not depend on the other prompts.

    Raises:
      ConfigError: the prompts, the number of tokens or the sampling cannot work; nothing has been compiled.
    """

    def __init__(
        self, config: Config, mesh: Mesh, params: Params, prompts: Sequence[bytes], tokens: int, sampling: Sampling
    ):
        check_request(config, prompts, tokens, sampling)
        task, text = task_and_text(config)
        self._text, self._end = text, task.end_token
        self._begun, self._tokens, self._params = [] if reads_source(config) else list(prompts), tokens, params
        self._count, self._separator = len(prompts), config.data.separator.encode()
        rows = [*prompts, *[prompts[0]] * surplus(len(prompts), mesh)]  # the texts of the latter are dropped
        tokenized = [text.tokens_of(row) for row in rows]
        opening = opening_of(task, mesh, tokenized, max(map(len, tokenized)))
        stream_B = np.array([zlib.crc32(row, rows[:number].count(row)) for number, row in enumerate(rows)], np.uint32)
        replicated = NamedSharding(mesh, P())
        self._opening = opening._replace(**jax.device_put(_arrays(opening), replicated))

        model = forward_model(config, mesh)
        step = make_step(model, mesh, opening.written)
        if reads_source(config):
            prefill = make_source_prefill(model, mesh, tokens, rows=1)
        else:
            prefill = make_prefill(model, mesh, tokens)

        def next_token(
            params: Params, cache: Cache, token_B: jax.Array, first_B: jax.Array, number: jax.Array
        ) -> tuple[Cache, jax.Array]:
            position_B = first_B + number
            cache, logits_BV = step(params, cache, token_B, position_B, number)
            logits_BV = spoken(logits_BV, text.vocab, task.end_token)
            return cache, sample(logits_BV, sampling, jnp.asarray(stream_B), position_B)

        cache_shardings = shardings(cache_specs(config), mesh)
        prompt, first = (self._opening.prompt_BL, self._opening.length_B), self._opening.position_B
        self._prefill = jax.jit(prefill, out_shardings=cache_shardings).lower(params, *prompt).compile()
        cache = like(jax.eval_shape(prefill, params, *prompt), cache_shardings)
        stepping = jax.jit(next_token, donate_argnums=1, out_shardings=(cache_shardings, replicated))
        self._step = stepping.lower(params, cache, self._opening.token_B, first, np.int32(0)).compile()

    @property
    def cache_bytes(self) -> int:
        """Bytes per device that the compiled step updates in place."""
        analysis = self._step.memory_analysis()
        assert analysis is not None, "every backend has one"
        return analysis.alias_size_in_bytes

    def __iter__(self) -> Iterator[list[bytes]]:
        tails, ended = self._begun or [b""] * self._count, [False] * self._count
        prompt_BL, length_B, token_B, first_B, _ = self._opening
        cache = jax.block_until_ready(self._prefill(self._params, prompt_BL, length_B))
        for number in range(self._tokens):
            step = self._step(self._params, cache, token_B, first_B, np.int32(number))
            cache, token_B = jax.block_until_ready(step)  # queued steps of simulated devices would block one another
            found = np.asarray(token_B)
            new = [b"" if end else bytes_of(self._text, int(found[row])) for row, end in enumerate(ended)]
            ended = [end or found[row] == self._end for row, end in enumerate(ended)]
            if self._separator:
                cut = [self._to_separator(tail, piece) for tail, piece in zip(tails, new, strict=True)]
                new = [piece for piece, _ in cut]
                tails = [(tail + piece)[-len(self._separator) :] for tail, piece in zip(tails, new, strict=True)]
                ended = [end or here for end, (_, here) in zip(ended, cut, strict=True)]
            yield new
            if all(ended):
                return

    def _to_separator(self, tail: bytes, new: bytes) -> tuple[bytes, bool]:
        """New bytes behind a text's last ones, as far as the end of its document, and whether that is there."""
        before, found, _ = (tail + new).partition(self._separator)
        return (tail + new)[len(tail) : len(before) + len(found)], bool(found)


def _arrays(opening: Opening) -> dict[str, np.ndarray]:
    return {name: value for name, value in opening._asdict().items() if isinstance(value, np.ndarray)}
