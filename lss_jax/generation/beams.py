"""Beam search over the texts of one source: which go on, which have ended, and when none can get better.

A text's score is the log probability of its tokens, the end token among them, over the length penalty of Wu et al. 2016
(arXiv 1609.08144, Sec. 7), `((5 + length) / 6) ** penalty`.
"""

import dataclasses
from collections.abc import Iterator, Sequence

PENALTY = 0.6  # as in Vaswani et al. 2017 (arXiv 1706.03762), Sec. 6.1
NOTHING = -float("inf")  # the log probability of a beam that holds no text


@dataclasses.dataclass(frozen=True)
class Beams:
    """The options of a beam search."""

    beams: int  # how many texts go on at a time; 1 takes the likeliest token, always
    penalty: float  # 0: texts are compared by their log probability alone, which favours short ones

    def problems(self) -> Iterator[str]:
        """Options that cannot work, a line each."""
        if self.beams < 1:
            yield f"--beams={self.beams} leaves no text; use at least 1"
        if not 0 <= self.penalty < float("inf"):
            yield f"--length-penalty={self.penalty} must be at least 0 and finite; 0 has no regard to length"

    def score(self, log_probability: float, length: int) -> float:
        """By which texts that have ended are compared."""
        return log_probability / ((5 + length) / 6) ** self.penalty


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A text of a beam with one token more."""

    log_probability: float
    beam: int
    token: int


class Search:
    """The texts of one source.

    A text ends with `end`, or with the last of `tokens`. The search is over when the best text that has ended can no
    longer be overtaken: log probabilities only fall, and no text is longer than `tokens`, so a text that goes on never
    scores more than its log probability now, at that length.

    Attributes:
      tokens, parents, log_probabilities: of each beam, for the next step: its last token, the number of the beam that
        it went on from, and its log probability.
      best: the tokens of the best text so far, with its end.
      over: whether it stays the best.
    """

    def __init__(self, beams: Beams, start: int, end: int | None, tokens: int):
        self._beams, self._end, self._most = beams, end, tokens
        self._texts: list[list[int]] = [[] for _ in range(beams.beams)]
        self._best_score, self.best, self.over = NOTHING, list[int](), False
        self.tokens, self.parents = [start] * beams.beams, [0] * beams.beams
        self.log_probabilities = [0.0] + [NOTHING] * (beams.beams - 1)  # all begin alike: one is enough

    def advance(self, candidates: Sequence[Candidate]) -> None:
        """Takes the likeliest candidates of all beams, twice as many as beams, in order: then enough do not end."""
        going_on: list[tuple[Candidate, list[int]]] = []
        for candidate in candidates:
            if candidate.log_probability == NOTHING:
                break
            text = [*self._texts[candidate.beam], candidate.token]
            if candidate.token == self._end or len(text) == self._most:
                self._finish(text, candidate.log_probability)
            elif len(going_on) < self._beams.beams:
                going_on.append((candidate, text))
        missing = self._beams.beams - len(going_on)
        self._texts = [text for _, text in going_on] + [[]] * missing
        self.tokens = [candidate.token for candidate, _ in going_on] + [0] * missing
        self.parents = [candidate.beam for candidate, _ in going_on] + [0] * missing
        self.log_probabilities = [candidate.log_probability for candidate, _ in going_on] + [NOTHING] * missing
        self.over = self._best_score >= self._beams.score(self.log_probabilities[0], self._most)

    def _finish(self, text: list[int], log_probability: float) -> None:
        score = self._beams.score(log_probability, len(text))
        if score > self._best_score:
            self._best_score, self.best = score, text
