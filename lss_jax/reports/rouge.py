"""ROUGE (Lin 2004), by the package `rouge-score`, and the first sentences of a source as a summary to compare with."""

import re
import statistics
from collections.abc import Sequence
from typing import Any

from lss_jax.config.schema import ConfigError

MEASURES = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}
END_OF_SENTENCE = re.compile(r"""(?:(?<=[.!?])|(?<=[.!?][\"')]))\s+(?=[\"'(]?[A-Z])""")


class Rouge:
    """Scores texts against references, with words stemmed (Porter's), as is usual.

    Raises:
      ConfigError: the package is missing.
    """

    def __init__(self):
        try:
            from rouge_score.rouge_scorer import RougeScorer  # an optional package
        except ImportError as error:
            raise ConfigError(
                f"ROUGE needs the package rouge-score ({error}); pip install rouge-score==0.1.2"
            ) from error
        self._scorer: Any = RougeScorer([*MEASURES], use_stemmer=True)

    def of(self, references: Sequence[str], texts: Sequence[str]) -> dict[str, float]:
        """The means over all pairs of the F-measures, in percent."""
        scores = [self._scorer.score(*pair) for pair in zip(references, texts, strict=True)]
        return {name: 100 * statistics.fmean(score[name].fmeasure for score in scores) for name in MEASURES}


def first_sentences(text: str, count: int) -> str:
    """The first sentences of a text: its lines, where it has several.

    Else a sentence ends with `.`, `!` or `?` before a space and a capital letter, both perhaps quoted or in brackets.
    """
    lines = text.strip().splitlines()
    sentences = lines if lines[1:] else END_OF_SENTENCE.split(text.strip())
    return " ".join(sentence.strip() for sentence in sentences[:count])


def table_of(rows: dict[str, dict[str, float]]) -> str:
    """The scores of several kinds of texts, a line each."""
    width = max(map(len, rows))
    lines = [" " * width + "".join(f"{label:>9}" for label in MEASURES.values())]
    lines += [f"{name:{width}}" + "".join(f"{scores[one]:9.2f}" for one in MEASURES) for name, scores in rows.items()]
    return "\n".join(lines)
