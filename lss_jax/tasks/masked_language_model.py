"""Masked language modelling: hidden tokens are predicted from the rest (Devlin et al. 2018, arXiv 1810.04805).

Which tokens are hidden, and behind what, is a hash of the seed, the step, the row and the natural position: the same on
every mesh, with any number of processes, and after a resume. In evaluation it is always the same.
"""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from lss_jax.config.schema import ConfigError
from lss_jax.data.batch import IGNORED, Batch
from lss_jax.data.corpus import Corpus
from lss_jax.data.loader import Read, own_tokens
from lss_jax.data.windows import Window
from lss_jax.models.losses import LossSum
from lss_jax.parallel.hashing import hashed_on_host
from lss_jax.tasks.language_model import no_classes
from lss_jax.tasks.token_task import BidirectionalTask, entropy_metrics

HIDDEN, HOW, WHAT = range(3)  # the draws of a position


class MaskedLanguageModel(BidirectionalTask):
    """The share `masking.rate` of each sequence's tokens is predicted, from logits as those of `LanguageModel`.

    Most of them are hidden behind the mask token, which is the one behind the tokenizer's vocabulary; some behind a
    random token; some are left as they are.
    """

    needs = "tokens"
    sums = LossSum
    metrics = entropy_metrics("token", "masked token")
    headline = metrics[1]

    def counted(self) -> dict[str, Any]:
        masking = self.config.masking
        shares = {"masking.rate": masking.rate, "masking.random": masking.random, "masking.kept": masking.kept}
        return shares | super().counted()

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from no_classes(self.config)
        if not self.encoded:
            yield from self.too_few_tokens(self.tokenizer.vocab + 1, f"data of {self.items} with a mask token")

    def check(self, corpus: Corpus) -> None:
        super().check(corpus)
        if self.encoded:
            for problem in self.too_few_tokens(self.tokenizer.vocab + 1, "a vocabulary with a mask token"):
                raise ConfigError(problem)

    def reading(self, turn: int) -> Read:
        masking, vocab, seed = self.config.masking, self.tokenizer.vocab, self.config.seed

        def masked(window: Window, run: range, row: int) -> np.ndarray:
            tokens, targets = own_tokens(window, run, row)
            positions = np.arange(run.start, run.stop)
            hidden, how, what = (hashed_on_host(seed, turn, row, draw, positions) for draw in (HIDDEN, HOW, WHAT))
            is_hidden = hidden < masking.rate * 2.0**32
            is_random = how < masking.random * 2.0**32
            is_kept = ~is_random & (how < (masking.random + masking.kept) * 2.0**32)
            behind = np.where(is_random, what % vocab, np.where(is_kept, tokens, vocab))
            return np.stack((np.where(is_hidden, behind, tokens), np.where(is_hidden, targets, IGNORED)))

        return self.learned(masked)

    def losses(self, outputs: jax.Array, batch: Batch, axis: str | None) -> LossSum:
        loss = self.cross_entropy(outputs, batch.targets, axis)
        return LossSum(loss.nats, loss.tokens)
