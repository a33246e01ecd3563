"""Images as streams of tokens: a pixel is a token, or a patch of `p x p` pixels is; row by row, image after image.

A window is an image, or some whole rows of one. An image that windows do not divide is filled up at its lower edge, and
one that patches do not divide at the right one too, with pixels of grey level 0 without a label.
"""

import itertools
from typing import NamedTuple

import numpy as np

from lss_jax.config.schema import ConfigError, DataConfig
from lss_jax.data.image_sources import IMAGES, Images
from lss_jax.data.packing import IGNORED_LABEL, Stream
from lss_jax.data.sources import SPLITS, Part


class Grid(NamedTuple):
    """How the pixels of an image lie in its tokens."""

    height: int  # of an image, in pixels
    width: int
    patch: int  # pixels on the side of a token; 0: a token is a pixel, and not a vector of one
    window_rows: int  # of tokens in a window

    @property
    def shown(self) -> str:
        """The images, for errors."""
        patches = f" in patches of {self.patch} x {self.patch}" if self.patch else ""
        return f"images of {self.height} x {self.width} pixels{patches}"

    @property
    def columns(self) -> int:
        """Tokens in a row."""
        return -(-self.width // max(self.patch, 1))

    @property
    def rows(self) -> int:
        """Rows of tokens in an image, with those that fill it up to whole windows."""
        return -(-self.image_rows // self.window_rows) * self.window_rows

    @property
    def image_rows(self) -> int:
        """Rows of tokens in an image."""
        return -(-self.height // max(self.patch, 1))

    def tokens_of(self, images_nHW: np.ndarray, fill: int) -> np.ndarray:
        """Images as tokens, `[n * rows * columns]`, or with patches `[n * rows * columns, p * p]`."""
        n, H, W = images_nHW.shape
        p, rows, columns = max(self.patch, 1), self.rows, self.columns
        filled = np.pad(images_nHW, ((0, 0), (0, rows * p - H), (0, columns * p - W)), constant_values=fill)
        tokens = filled.reshape(n, rows, p, columns, p).swapaxes(2, 3).reshape(-1, p * p)
        return np.ascontiguousarray(tokens if self.patch else tokens[:, 0])

    def images_of(self, tokens: np.ndarray) -> np.ndarray:
        """The opposite: images `[n, H, W]`, without what filled them up."""
        p, rows, columns = max(self.patch, 1), self.rows, self.columns
        filled = tokens.reshape(-1, rows, columns, p, p).swapaxes(2, 3).reshape(-1, rows * p, columns * p)
        return filled[:, : self.height, : self.width]


class PixelSource:
    """The pixels of all splits as tokens, in memory.

    Its contents, of which the fingerprint is taken, are images and labels as they are in any windows and patches.
    """

    def __init__(self, grid: Grid, tokens: np.ndarray, images: Images):
        self.grid, self.size, self._tokens = grid, len(tokens), tokens
        self._contents = [each.ravel() for name in SPLITS for each in (images.pixels[name], images.labels[name])]
        self.text_bytes = sum(map(len, self._contents))

    def read(self, start: int, stop: int) -> np.ndarray:
        return self._tokens[start:stop]

    def mapped(self) -> np.ndarray:
        return np.concatenate(self._contents)

    def check(self) -> None:
        pass


def open_images(data: DataConfig) -> dict[str, Stream]:
    """The configured images as tokens with labels, a stream per split.

    Raises:
      ConfigError: they cannot be opened, or windows are not whole rows of them.
    """
    images = IMAGES[data.source](data)
    grid = _grid(data, *images.pixels["train"].shape[1:])
    tokens = {name: grid.tokens_of(images.pixels[name], 0) for name in SPLITS}
    labels = {name: grid.tokens_of(images.labels[name], IGNORED_LABEL) for name in SPLITS}
    source = PixelSource(grid, np.concatenate([tokens[name] for name in SPLITS]), images)
    ends = np.cumsum([len(tokens[name]) for name in SPLITS]).tolist()
    borders = zip(SPLITS, itertools.pairwise([0, *ends]), strict=True)
    return {name: Stream(Part(source, *at), None, labels[name]) for name, at in borders}


def _grid(data: DataConfig, H: int, W: int) -> Grid:
    """How images of this size become tokens.

    Raises:
      ConfigError: windows are not whole rows of them.
    """
    if 0 in (H, W):
        raise ConfigError(f"data.downsample={data.downsample} leaves no pixel of an image; use a smaller one")
    image = Grid(H, W, data.patch, 1)
    rows, columns = image.rows, image.columns
    if data.seq_len % columns or data.seq_len > rows * columns:
        part = min(max(data.seq_len // columns, 1), rows)
        raise ConfigError(
            f"data.seq_len={data.seq_len} is no number of whole rows of {image.shown}, {rows} of {columns} tokens; "
            f"use data.seq_len={rows * columns} for all of an image, or {part * columns} for {part} rows of it"
        )
    return image._replace(window_rows=data.seq_len // columns)


def grid_of(stream: Stream) -> Grid | None:
    """How the images of a stream lie in its tokens; None: it has no images."""
    source = stream.tokens.source if isinstance(stream.tokens, Part) else None
    return source.grid if isinstance(source, PixelSource) else None


def check_columns(stream: Stream, columns: int) -> None:
    """Raises a ConfigError if rotary positions have rows of other lengths than the images of a stream."""
    grid = grid_of(stream)
    if grid is not None and columns not in (0, grid.columns):
        raise ConfigError(
            f"model.rope_columns={columns}, but {grid.shown} have {grid.columns} tokens in a row; use "
            f"model.rope_columns={grid.columns}, or 0 for positions of one dimension"
        )


def check_labels(name: str, stream: Stream, classes: int) -> None:
    """Raises a ConfigError for a label of a split that is none of so many classes; of images it says where."""
    assert stream.labels is not None
    labels = stream.labels[:]
    outside = (labels >= classes) & (labels != IGNORED_LABEL)
    if not outside.any():
        return
    grid, place = grid_of(stream), f"token {int(np.argmax(outside.ravel()))}"
    label = labels.ravel()[np.argmax(outside.ravel())]
    if grid is not None:
        number, row, column = np.argwhere(grid.images_of(outside))[0]
        label, place = grid.images_of(labels)[number, row, column], f"image {number}, row {row}, column {column}"
    raise ConfigError(
        f"the label of {place} in the split {name!r} is {label}, but model.classes={classes}, so that labels go up to "
        f"{classes - 1}; use more classes, or {IGNORED_LABEL} for no label"
    )
