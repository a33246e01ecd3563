"""Pictures of what was predicted beside what is true, for runs that give the pixels of images a class."""

import functools
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from lss_jax.config.schema import Config, ConfigError
from lss_jax.data.images import grid_of
from lss_jax.data.split import WindowSplit
from lss_jax.models import Model, Params, build_model
from lss_jax.parallel.layout import layout_on
from lss_jax.reports.figures import Picture, png_of_pictures
from lss_jax.tasks import make_task
from lss_jax.tasks.token_labels import TokenLabels
from lss_jax.training.compatibility import check_workdir
from lss_jax.training.evaluation import restore_params
from lss_jax.training.setup import mesh_of
from lss_jax.training.step import make_prediction_step


def check_pictures(config: Config) -> TokenLabels:
    """The task of a config, if it gives the pixels of images a class.

    Raises:
      ConfigError: it does not.
    """
    task = make_task(config)
    if isinstance(task, TokenLabels) and task.has_images:
        return task
    raise ConfigError(
        f"--pictures is for classes of pixels, but the run has task={config.task!r} and data.source="
        f"{config.data.source!r}; leave it out"
    )


def picture_run(config: Config, workdir: Path, name: str, count: int) -> bytes:
    """Some images of a split with their labels and the predictions of a run's newest sound checkpoint, as a PNG file.

    Images are evenly spaced in the split. All processes must ask.

    Raises:
      ConfigError: there is no run or no checkpoint, it has no images, or the config does not fit it or the devices.
    """
    task = check_pictures(config)
    check_workdir(config, workdir, trains=False)
    mesh = mesh_of(config, jax.devices(), trains=False)
    model, split = build_model(config, mesh), task.splits(mesh)[name]
    step, params = restore_params(model, mesh, workdir)
    shown = pictures(split, predicted_windows(task, model, mesh, params, split), count)
    return png_of_pictures(shown, task.names, f"{name} split, after {step:,} steps")


def predicted_windows(
    task: TokenLabels, model: Model, mesh: Mesh, params: Params, split: WindowSplit
) -> Callable[[int], np.ndarray]:
    """A function of a window's number in the split: the classes of its tokens, uint8 `[L]`, or `[L, pixels]`.

    Devices predict their own segments. Only then, at a byte per pixel, a batch comes together on the hosts.
    """
    data, layout = model.config.data, layout_on(model.config, mesh)
    predict = make_prediction_step(model, mesh, task.predictions)

    @functools.lru_cache(maxsize=1)  # windows of one batch are asked for one after the other
    def batch(index: int) -> np.ndarray:
        found = multihost_utils.process_allgather(predict(params, split.evaluation_batch(index)), tiled=True)
        return found[:, np.argsort(layout.positions(found.shape[1]))[: data.seq_len]]

    return lambda window: batch(window // data.batch_size)[window % data.batch_size]


def pictures(split: WindowSplit, predicted: Callable[[int], np.ndarray], count: int) -> list[Picture]:
    """So many images of a split, or all if they are fewer, with the classes that are `predicted` for each window."""
    (stream,) = split.streams
    grid = grid_of(stream)
    assert grid is not None and stream.labels is not None, "the task is for images"
    size, windows = grid.rows * grid.columns, grid.rows // grid.window_rows
    images = len(stream.tokens) // size
    found = []
    for number in np.unique(np.linspace(0, images - 1, min(count, images)).round().astype(int)).tolist():
        place = slice(number * size, (number + 1) * size)
        of_image = np.concatenate([predicted(window) for window in range(number * windows, (number + 1) * windows)])
        arrays = (grid.images_of(each)[0] for each in (stream.tokens[place], stream.labels[place], of_image))
        found.append(Picture(f"image {number}", *arrays))
    return found
