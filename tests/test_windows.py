"""Windows of each document by itself: together they predict every token but the first of each document, once."""

import numpy as np
import pytest

from lss_jax.data.batch import IGNORED
from lss_jax.data.loader import next_tokens, own_tokens
from lss_jax.data.packing import ENDLESS, Packing, Stream
from lss_jax.data.windows import WindowsOfDocuments

ENDS = [5, 6, 25, 26, 42]  # documents of 5, 1, 19, 1 and 16 tokens


@pytest.mark.parametrize("ends", [ENDS, [*ENDS[:-1], ENDLESS]], ids=["ended", "endless"])
@pytest.mark.parametrize(("ahead", "read"), [(1, next_tokens), (0, own_tokens)], ids=["next", "own"])
def test_each_document_has_windows_of_its_own(ends, ahead, read):
    tokens = np.arange(42, dtype=np.uint8)
    stream = Stream(tokens, Packing(np.array(ends)), None)
    windows = WindowsOfDocuments(stream, seq_len=8, ahead=ahead)
    assert windows.training == windows.evaluation == (6 if ahead else 8)
    found = []
    for number in range(windows.evaluation):
        window = windows[number]
        shown, targets = read(window, range(8), 0)
        count = window.stop - window.start
        assert count <= 8 and np.all(shown[count:] == 0) and np.all(targets[count:] == IGNORED)
        np.testing.assert_array_equal(shown[:count], tokens[window.start : window.stop])
        ends_here = [end for end in ENDS if window.start < end < window.stop]
        assert not ends_here, "no window reaches into another document"
        found += targets[targets != IGNORED].tolist()
    starts = {0, *ENDS[:-1]}
    assert found == [token for token in range(42) if not ahead or token not in starts]
    behind = read(windows[windows.evaluation], range(8), 0)
    assert np.all(behind[0] == 0) and np.all(behind[1] == IGNORED)
