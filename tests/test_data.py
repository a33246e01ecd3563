"""Sources and the segment loader: the right bytes, only the bytes that are asked for, and clear errors."""

import functools
import hashlib
import http.server
import re
import threading
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import Watched, mesh_of, random_bytes, small_config

from lss_jax.config.schema import ConfigError
from lss_jax.data import loader, sources
from lss_jax.data.batch import IGNORED
from lss_jax.data.loader import next_tokens, prefetched
from lss_jax.data.mixture import drawn, in_order
from lss_jax.data.packing import Stream, separated
from lss_jax.data.sources import open_splits
from lss_jax.data.windows import EqualWindows, windows_at
from lss_jax.parallel.layout import Layout

ENWIK8_PREFIX = Path(__file__).parents[2] / "shared" / "data" / "enwik8-first-4MB"


def read_batch(data, starts_B, seq_len, mesh, layout="contiguous", documents=None):
    windows = windows_at(data, starts_B, seq_len, documents)
    return loader.read_batch(windows, seq_len, mesh, Layout(layout, mesh.shape["seq"]), read=next_tokens)


@pytest.mark.parametrize(("data", "seq"), [(1, 1), (2, 4), (8, 1), (1, 8), (2, 3)])
def test_a_batch_is_the_windows_and_their_next_bytes(data, seq):
    source, starts_B, L = random_bytes(), np.array([5, 100, 3, 777, 0, 9000, 12, 13]), 48
    batch = read_batch(source, starts_B, L, mesh_of(data, seq))
    for row, start in enumerate(starts_B):
        np.testing.assert_array_equal(np.asarray(batch.tokens)[row], source[start : start + L])
        np.testing.assert_array_equal(np.asarray(batch.targets)[row], source[start + 1 : start + L + 1])
    np.testing.assert_array_equal(batch.positions, np.arange(L))
    for shard in batch.tokens.addressable_shards:
        assert shard.data.shape == (8 // data, L // seq)


def test_a_device_reads_its_own_segments_and_one_byte_more():
    watched = Watched(random_bytes())
    read_batch(watched, np.array([0, 1000, 2000, 3000]), 48, mesh_of(2, 4))
    expected = [(start + 12 * part, start + 12 * part + 13) for start in (0, 1000, 2000, 3000) for part in range(4)]
    assert sorted(watched.reads) == expected, "each once, though tokens and targets both need it"


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize(("data", "seq"), [(1, 1), (2, 4), (1, 8), (2, 3)])
def test_a_batch_of_any_length_in_any_layout(data, seq, layout):
    """Put in natural order it is the windows, then padding: token 0, no target, no document."""
    source, starts_B, L = random_bytes(), np.array([5, 100, 3, 19_990]), 45
    batch = read_batch(source, starts_B, L, mesh_of(data, seq), layout)
    order = np.argsort(batch.positions)
    np.testing.assert_array_equal(np.asarray(batch.positions)[order], np.arange(Layout(layout, seq).padded(L)))
    np.testing.assert_array_equal(batch.positions, Layout(layout, seq).positions(len(order)))
    np.testing.assert_array_equal(batch.rows, np.arange(4))
    for row, start in enumerate(starts_B):
        tokens, targets = (np.asarray(array)[row, order] for array in (batch.tokens, batch.targets))
        there = min(L, len(source) - start)
        np.testing.assert_array_equal(tokens[:there], source[start : start + there])
        np.testing.assert_array_equal(targets[: min(L, len(source) - start - 1)], source[start + 1 : start + L + 1])
        assert np.all(tokens[there:] == 0)
        assert np.all(targets[min(L, len(source) - start - 1) :] == IGNORED)


def test_zigzag_reads_its_two_chunks_and_one_byte_more_of_each():
    watched = Watched(random_bytes())
    read_batch(watched, np.array([1000]), 48, mesh_of(1, 4), "zigzag")
    chunks = [(0, 1), (1, 2), (2, 3), (3, 5), (5, 6), (6, 7), (7, 8)]  # device 3 has two that are neighbours
    assert sorted(watched.reads) == [(1000 + 6 * first, 1000 + 6 * stop + 1) for first, stop in chunks]


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_documents_have_bounds_and_their_first_bytes_are_no_targets(layout):
    text = b"one. three. four. a much longer document, wider than a window of sixteen. last"
    data, L, starts_B = np.frombuffer(text, np.uint8), 17, np.array([0, 17, 34, 68])
    documents = [0, *(match.end() for match in re.finditer(rb"\. ", text))]
    assert [text[i:].split()[0] for i in documents] == [b"one.", b"three.", b"four.", b"a", b"last"]
    batch = read_batch(data, starts_B, L, mesh_of(2, 3), layout, separated(data, ". "))
    order = np.argsort(batch.positions)
    for row, start in enumerate(starts_B):
        begin, end = np.asarray(batch.documents)[:, row, order]
        targets = np.asarray(batch.targets)[row, order]
        length = min(L, len(text) - start)
        for p in range(length):
            mine = max(d for d in documents if d <= start + p)
            following = min([d for d in documents if d > start + p], default=10**6)
            assert (begin[p], end[p]) == (max(mine - start, 0), min(following - start, length))
            if start + p + 1 < len(text):
                assert targets[p] == (IGNORED if start + p + 1 in documents else text[start + p + 1])
        assert np.all(begin[length:] == 0) and np.all(end[length:] == 0), (
            "what is behind the window or the text sees nothing"
        )


def test_a_separator_that_does_not_occur_is_refused():
    with pytest.raises(ConfigError, match=r"data.separator='#' does not occur in a split of 6 bytes; give a string"):
        separated(np.frombuffer(b"a. b. ", np.uint8), "#")


def test_without_a_separator_all_is_one_document():
    assert separated(random_bytes(), "") is None
    assert read_batch(random_bytes(), np.array([0]), 48, mesh_of(1, 4)).documents is None


def test_what_lies_beyond_the_end_is_not_counted():
    source = random_bytes(60)
    batch = read_batch(source, np.array([0, 48, 96, 144]), 48, mesh_of(2, 4))
    targets = np.asarray(batch.targets).ravel()
    np.testing.assert_array_equal(targets[:59], source[1:])
    assert np.all(targets[59:] == IGNORED)
    assert np.asarray(batch.tokens).min() >= 0


def windows_in(length):
    return EqualWindows(Stream(np.zeros(length, np.uint8), None, None), 48, ahead=1)


def test_consecutive_windows_predict_every_byte_but_the_first_once():
    for length in (2, 48, 49, 50, 400, 1000):
        windows = windows_in(length)
        places = in_order([windows.evaluation], batch_size=4).reshape(-1, 2)
        assert not places[:, 0].any(), "one source"
        starts = [windows[number].start for number in places[:, 1]]
        targets = [t for s in starts for t in range(s + 1, s + 49) if t < length]
        assert targets == list(range(1, length))


def test_windows_are_a_function_of_seed_and_step():
    def order(step, seed):
        return [window for _, window in drawn(step, [10], (), batch_size=4, seed=seed)]

    epochs = np.concatenate([order(step, seed=1) for step in range(5)]).reshape(2, 10)
    for number, epoch in enumerate(epochs):
        assert sorted(epoch) == list(range(10)), "each window once an epoch"
        np.testing.assert_array_equal(epoch, np.random.default_rng((1, number)).permutation(10))
    np.testing.assert_array_equal(order(3, seed=1), epochs.ravel()[12:16])
    assert order(0, seed=2) != order(0, seed=1)


def test_the_last_training_window_has_its_last_target():
    assert windows_in(49).training == 1
    assert windows_in(48).training == 0
    assert windows_in(97).training == 2


def test_prefetching_keeps_the_order_and_hands_errors_on():
    assert list(prefetched(lambda i: i * i, 2, 7)) == [4, 9, 16, 25, 36]
    assert list(prefetched(lambda i: i, 3, 3)) == []
    with pytest.raises(ZeroDivisionError):
        list(prefetched(lambda i: 1 // (2 - i), 0, 5))


def config_of(source, path="", seq_len=48):
    return small_config(data__source=source, data__path=str(path), data__seq_len=seq_len).data


def test_the_embedded_corpus_is_python_source_in_a_fixed_order():
    first, second = open_splits(config_of("stdlib")), open_splits(config_of("stdlib"))
    assert len(first["train"]) > 1_000_000
    assert all(b"import " in first[name].mapped().tobytes() for name in ("valid", "test"))
    for name in ("train", "valid", "test"):
        np.testing.assert_array_equal(first[name].mapped(), second[name].mapped())


def test_splits_are_ninety_five_five_and_read_like_arrays(tmp_path):
    file = tmp_path / "text"
    file.write_bytes(bytes(range(200)) * 10)
    splits = open_splits(config_of("text", file))
    assert [len(splits[name]) for name in ("train", "valid", "test")] == [1800, 100, 100]
    whole = np.frombuffer(file.read_bytes(), np.uint8)
    np.testing.assert_array_equal(np.concatenate([split.mapped() for split in splits.values()]), whole)
    for part in (slice(0, 7), slice(90, 200), slice(100, 105), slice(7, 3)):
        np.testing.assert_array_equal(splits["valid"][part], whole[1800:1900][part])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"missing' is not a file; give the path of a text file \(configs/default.py needs no download\)"),
        (b"", r"is empty \(0 bytes\); give a file with text"),
        (
            b"x" * 50,
            r"50 bytes give 45 for training \(90%\), but one window takes data.seq_len \+ 1 = 49; use a longer",
        ),
    ],
)
def test_bad_files_are_named(tmp_path, content, message):
    file = tmp_path / "missing"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        open_splits(config_of("text", file))


def test_splits_of_a_byte_are_refused(tmp_path):
    (tmp_path / "text").write_bytes(b"x" * 39)
    with pytest.raises(ConfigError, match="39 bytes are too few for a validation and a test split; use at least 40"):
        open_splits(config_of("text", tmp_path / "text", seq_len=8))
    (tmp_path / "text").write_bytes(b"x" * 40)
    assert [len(split) for split in open_splits(config_of("text", tmp_path / "text", seq_len=8)).values()] == [36, 2, 2]


def test_a_prefix_of_enwik8_is_checked(tmp_path, monkeypatch):
    genuine = random_bytes(3000).tobytes()
    monkeypatch.setattr(
        sources, "ENWIK8_SHA256", {length: hashlib.sha256(genuine[:length]).hexdigest() for length in (1000, 3000)}
    )
    monkeypatch.setattr(sources, "ENWIK8_BYTES", 3000)
    file = tmp_path / "enwik8"
    for length in (500, 1000, 1500, 3000):
        file.write_bytes(genuine[:length])
        assert sum(map(len, open_splits(config_of("enwik8", file)).values())) == length
    for wrong in (b"#" + genuine[1:], b"#" + genuine[1:2000]):
        file.write_bytes(wrong)
        with pytest.raises(ConfigError, match=r"sha256 of the first \d+ bytes is \w{64}, but enwik8 has \w{64}; fetch"):
            open_splits(config_of("enwik8", file))
    file.write_bytes(genuine + b"#")
    with pytest.raises(ConfigError, match="has 3001 bytes, but enwik8 has 3000"):
        open_splits(config_of("enwik8", file))


def test_real_text_passes():
    """Python's sources; and the prefix of enwik8 where it is at hand, checked against the sums in the code."""
    lengths = {"stdlib": sum(map(len, check_splits_of(config_of("stdlib"))))}
    if ENWIK8_PREFIX.exists():
        lengths["enwik8"] = sum(map(len, check_splits_of(config_of("enwik8", ENWIK8_PREFIX))))
        assert lengths["enwik8"] == 4_000_000
    assert lengths["stdlib"] > 1_000_000


def check_splits_of(config):
    train, *others = open_splits(config).values()
    assert len(train) == sum(map(len, (train, *others))) * 90 // 100
    return train, *others


@pytest.fixture
def enwik8_server(tmp_path, monkeypatch):
    """A small 'enwik8.zip' on a real server, and a cache folder of its own."""
    genuine = random_bytes(3000).tobytes()
    (tmp_path / "www").mkdir()
    zipped = tmp_path / "www" / "enwik8.zip"
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("enwik8", genuine)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "www"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "ENWIK8_URL", f"http://127.0.0.1:{server.server_port}/enwik8.zip")
    monkeypatch.setattr(sources, "ENWIK8_ZIP_SHA256", hashlib.sha256(zipped.read_bytes()).hexdigest())
    monkeypatch.setattr(sources, "ENWIK8_BYTES", 3000)
    monkeypatch.setattr(sources, "ENWIK8_SHA256", {3000: hashlib.sha256(genuine).hexdigest()})
    yield server
    server.shutdown()
    server.server_close()


def test_enwik8_is_downloaded_once_and_checked(enwik8_server):
    assert len(open_splits(config_of("enwik8"))["train"]) == 2700
    enwik8_server.shutdown()
    enwik8_server.server_close()
    assert len(open_splits(config_of("enwik8"))["train"]) == 2700


def test_a_wrong_download_is_refused_and_not_kept(enwik8_server, monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "ENWIK8_ZIP_SHA256", "0" * 64)
    with pytest.raises(ConfigError, match=r"cannot be downloaded \(ValueError: SHA256 hash of downloaded file"):
        open_splits(config_of("enwik8"))
    assert [f for f in (tmp_path / "cache").rglob("*") if f.is_file()] == []


def test_without_a_network_the_error_says_what_to_fetch(enwik8_server):
    enwik8_server.shutdown()
    enwik8_server.server_close()
    with pytest.raises(ConfigError, match=r"fetch http://\S+/enwik8.zip \(36445475 bytes, sha256 .* needs no download"):
        open_splits(config_of("enwik8"))


def test_no_whole_batch_is_made_on_the_way(monkeypatch):
    """Every array that the loader hands to JAX is one device's segment."""
    shapes = []
    real = jax.make_array_from_callback

    def watched(shape, sharding, callback):
        def noted(index):
            part = callback(index)
            shapes.append(part.shape)
            return part

        return real(shape, sharding, noted)

    monkeypatch.setattr(jax, "make_array_from_callback", watched)
    read_batch(random_bytes(), np.arange(8) * 48, 48, mesh_of(2, 4))
    assert set(shapes) == {(4, 12), (12,), (4,)}
