"""Windows into streams of tokens, which become the rows of batches: equal ones, or a document each."""

from typing import NamedTuple, Protocol

import numpy as np

from lss_jax.data.packing import Packing, Stream, Tokens


class Window(NamedTuple):
    """A row of a batch: the tokens of a stream from `start` to `stop`, of which the stream may have fewer."""

    stream: Stream
    start: int
    stop: int

    def truncated(self, length: int) -> "Window":
        """Its first tokens, so many at most."""
        return self._replace(stop=min(self.stop, self.start + length))


class Windows(Protocol):
    """The windows of a stream by their numbers; a number behind the last one gives a window without tokens."""

    stream: Stream
    training: int  # how many there are to train on
    evaluation: int  # how many to evaluate on

    def __getitem__(self, number: int, /) -> Window: ...


class EqualWindows:
    """Windows of `seq_len` tokens, one after the other; only whole ones are trained on.

    With `ahead=1` a window has a token behind its last one, as the target of that.
    """

    def __init__(self, stream: Stream, seq_len: int, ahead: int):
        self.stream, self._seq_len, length = stream, seq_len, len(stream.tokens) - ahead
        self.training, self.evaluation = length // seq_len, -(-length // seq_len)

    def __getitem__(self, number: int) -> Window:
        start = number * self._seq_len
        return Window(self.stream, start, start + self._seq_len)


class WindowsOfDocuments:
    """Windows of up to `seq_len` tokens, one after the other in each document by itself; `ahead` as above."""

    def __init__(self, stream: Stream, seq_len: int, ahead: int):
        assert stream.documents is not None
        self.stream, self._seq_len = stream, seq_len
        self._start_D, self._end_D = stream.documents.limits(len(stream.tokens))
        count_D = -(-np.maximum(self._end_D - self._start_D - ahead, 0) // seq_len)
        self._stop_D = np.cumsum(count_D)  # the number behind each document's last window
        self.training = self.evaluation = int(count_D.sum())

    def __getitem__(self, number: int) -> Window:
        if number >= self.evaluation:
            return Window(self.stream, len(self.stream.tokens), len(self.stream.tokens))
        document = int(np.searchsorted(self._stop_D, number, side="right"))
        first = int(self._stop_D[document - 1]) if document else 0
        start = int(self._start_D[document]) + (number - first) * self._seq_len
        return Window(self.stream, start, min(start + self._seq_len, int(self._end_D[document])))


class PairWindows:
    """A window for each document of a stream, whole: a prompt and its answer."""

    def __init__(self, stream: Stream):
        assert stream.documents is not None, "pairs come in documents"
        self.stream, self._documents = stream, stream.documents
        self.training = self.evaluation = len(stream.documents)

    def __getitem__(self, number: int) -> Window:
        end = len(self.stream.tokens)
        return Window(self.stream, *(self._documents[number] if number < self.evaluation else (end, end)))

    @property
    def lengths(self) -> np.ndarray:
        """The tokens of each prompt and of each answer, `[2, D]`."""
        return self._documents.lengths()


class PromptWindows(PairWindows):
    """A window for the prompt of each document, as far as `seq_len` tokens reach."""

    def __init__(self, stream: Stream, seq_len: int):
        super().__init__(stream)
        self._seq_len = seq_len

    def __getitem__(self, number: int) -> Window:
        prompt, _ = sides(super().__getitem__(number))
        return prompt.truncated(self._seq_len)


def sides(window: Window) -> tuple[Window, Window]:
    """The prompt and the answer of a document."""
    stream, start, stop = window
    assert stream.documents is not None, "pairs come in documents"
    first = stream.documents.first_target(stream.documents.number(start)) if start < stop else stop
    return Window(stream, start, first), Window(stream, first, stop)


def windows_at(tokens: Tokens, starts_B: np.ndarray, seq_len: int, documents: Packing | None = None) -> list[Window]:
    """The windows of one stream at `starts_B`."""
    stream = Stream(tokens, documents, None)
    return [Window(stream, int(start), int(start) + seq_len) for start in starts_B]
