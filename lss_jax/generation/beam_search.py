"""Beam search: the beams of a source are rows of one batch, which share what is cached of the source.

A step reorders the rows of the cache, each device its own slots, and gives the likeliest next tokens of all beams of a
source together; which of them go on is decided on the host (`beams`).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lss_jax.config.schema import Config
from lss_jax.data.text import bytes_of
from lss_jax.generation.beams import Beams, Candidate, Search
from lss_jax.generation.cache import SPECS_WITH_SOURCE, Cache
from lss_jax.generation.decode import Opening, opening_of, surplus
from lss_jax.generation.programs import forward_model, make_reorder, make_source_prefill, make_step
from lss_jax.generation.request import task_and_text
from lss_jax.generation.sampling import spoken
from lss_jax.models import Params
from lss_jax.parallel.mesh import like, shardings


class BeamSearch:
    """Answers sources by programs compiled once, for `rows` sources of up to `length` tokens at a time.

    The caller has checked the request. Texts are the same on every mesh, except where rounding decides.
    """

    def __init__(
        self, config: Config, mesh: Mesh, params: Params, *, rows: int, length: int, tokens: int, beams: Beams
    ):
        self._task, self._text = task_and_text(config)
        self._mesh, self._params, self._tokens, self._beams = mesh, params, tokens, beams
        self._rows, self._length = rows + surplus(rows, mesh), length
        model, end, width = forward_model(config, mesh), self._task.end_token, beams.beams
        prefill, step = make_source_prefill(model, mesh, tokens, rows=width), make_step(model, mesh, length=0)
        reorder = make_reorder(config, mesh, width)

        def advance(
            params: Params, cache: Cache, token_B: jax.Array, parent_B: jax.Array, past_B: jax.Array, number: jax.Array
        ) -> tuple[Cache, jax.Array, jax.Array]:
            cache = reorder(cache, parent_B) if width > 1 else cache
            cache, logits_BV = step(params, cache, token_B, jnp.full_like(token_B, number), number)
            total_BV = past_B[:, None] + jax.nn.log_softmax(spoken(logits_BV, self._text.vocab, end))
            total_Dc = total_BV.reshape(len(total_BV) // width, -1)
            best_Dc, choice_Dc = jax.lax.top_k(total_Dc, min(2 * width, total_Dc.shape[1]))
            return cache, best_Dc, jnp.stack(jnp.divmod(choice_Dc, total_BV.shape[1]), axis=-1)

        self._replicated = NamedSharding(mesh, P())
        placed, opening = shardings(SPECS_WITH_SOURCE, mesh), self._opening([np.zeros(1, np.int32)])
        prompt = opening.prompt_BL, opening.length_B
        self._prefill = jax.jit(prefill, out_shardings=placed).lower(params, *prompt).compile()
        cache = like(jax.eval_shape(prefill, params, *prompt), placed)
        states = self._states([self._search() for _ in range(self._rows)])
        advancing = jax.jit(advance, donate_argnums=1, out_shardings=(placed, self._replicated, self._replicated))
        self._advance = advancing.lower(params, cache, *states, np.int32(0)).compile()

    @property
    def cache_bytes(self) -> int:
        """Bytes per device that the compiled step updates in place, or leaves as they are."""
        analysis = self._advance.memory_analysis()
        assert analysis is not None, "every backend has one"
        return analysis.alias_size_in_bytes

    def texts(self, sources: Sequence[np.ndarray]) -> list[bytes]:
        """The best text for each of these sources, which are given as their tokens."""
        return [b"".join(pieces) for pieces in self.pieces(sources)]

    def pieces(self, sources: Sequence[np.ndarray]) -> list[list[bytes]]:
        """The same, token by token."""
        opening, searches = self._opening(sources), [self._search() for _ in range(self._rows)]
        cache = jax.block_until_ready(self._prefill(self._params, opening.prompt_BL, opening.length_B))
        for number in range(self._tokens):
            step = self._advance(self._params, cache, *self._states(searches), np.int32(number))
            cache, best_Dc, choice_Dc2 = jax.block_until_ready(step)  # as for `Generation`
            for search, best_c, choice_c2 in zip(searches, np.asarray(best_Dc), np.asarray(choice_Dc2), strict=True):
                pairs = zip(best_c.tolist(), choice_c2.tolist(), strict=True)
                if not search.over:
                    search.advance([Candidate(total, *choice) for total, choice in pairs])
            if all(search.over for search in searches):
                break
        return [[bytes_of(self._text, token) for token in search.best] for search in searches[: len(sources)]]

    def _opening(self, sources: Sequence[np.ndarray]) -> Opening:
        """The opening of all rows, of which the missing ones are copies of the first."""
        rows = [*sources, *[sources[0]] * (self._rows - len(sources))]
        opening = opening_of(self._task, self._mesh, rows, self._length)
        prompt = jax.device_put((opening.prompt_BL, opening.length_B), self._replicated)
        return opening._replace(prompt_BL=prompt[0], length_B=prompt[1])

    def _search(self) -> Search:
        start = self._task.start_token
        assert start is not None, "the family reads pairs"
        return Search(self._beams, start, self._task.end_token, self._tokens)

    def _states(self, searches: Sequence[Search]) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The last tokens of all beams of all sources, where they come from, and their log probabilities."""
        columns = ((one.tokens, one.parents, one.log_probabilities) for one in searches)
        token, parent, past = (np.concatenate(column) for column in zip(*columns, strict=True))
        return jax.device_put(
            (token.astype(np.int32), parent.astype(np.int32), past.astype(np.float32)), self._replicated
        )
