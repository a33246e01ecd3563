"""A class for each pixel, from windows, patches and whole images, against a dense oracle; pictures; what is refused."""

import base64
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import assert_close, make_loss_and_gradient, model_on, perturbed_params, run, sampled, small_config

from experiments.segmentation.run import config_of, views
from lss_jax.config.schema import ConfigError
from lss_jax.data.images import open_images
from lss_jax.data.sources import fingerprint
from lss_jax.inspection import audit
from lss_jax.reports import pictures, run_page
from lss_jax.reports.pictures import check_pictures, picture_run, predicted_windows
from lss_jax.reports.runs import read_runs
from lss_jax.tasks import make_task
from lss_jax.tasks.task import means_of, values_of
from lss_jax.training.evaluation import evaluate_run
from lss_jax.training.setup import validate
from lss_jax.training.step import make_eval_step

H, W, CLASSES = 7, 9, 3
SEGMENTS = {
    "task": "token_labels",
    "model__family": "encoder",
    "model__heads": 8,
    "model__classes": CLASSES,
    "model__positions": "rope",
    "labels__names": "sky,sea,land",
    "labels__weights": (1.0, 2.0, 0.5),
    "data__source": "images",
}
VIEWS = {
    "images": {"data__seq_len": 63, "model__rope_columns": 9},
    "windows of three rows": {"data__seq_len": 27, "model__rope_columns": 9},
    "rows as text": {"data__seq_len": 9},
    "pixels as patches": {"data__patch": 1, "data__seq_len": 63, "model__rope_columns": 9},
    "patches": {"data__patch": 2, "data__seq_len": 20, "model__rope_columns": 5},
    "patches in windows": {"data__patch": 3, "data__seq_len": 6, "model__rope_columns": 3, "model__positions": "rope"},
    "patches with learned positions": {"data__patch": 2, "data__seq_len": 20, "model__positions": "learned"},
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Twenty images with something to learn in them: classes are darker, brighter, and in between; some have none."""
    random = np.random.default_rng(0)
    labels = np.repeat(random.integers(0, CLASSES, (20, H, 3)), 3, axis=2)
    grey = (60 + 60 * labels + random.integers(-25, 26, labels.shape)).astype(np.uint8)
    labels[random.random(labels.shape) < 0.1] = 255
    path = tmp_path_factory.mktemp("images") / "images.npz"
    np.savez(path, images=grey, labels=labels)
    return path


def changes_of(images, view, **changes):
    return {**SEGMENTS, "data__path": str(images), **VIEWS[view], **changes}


def windows_of(config, first, count):
    """Pixels and labels of the windows of training images from one on, by loops: `[B, L, P]` each; no label is -1."""
    with np.load(config.data.path) as arrays:
        grey, labels = arrays["images"].astype(int), np.where(arrays["labels"] == 255, -1, arrays["labels"])
    p = max(config.data.patch, 1)
    columns = math.ceil(W / p)
    rows = config.data.seq_len // columns
    per_image = math.ceil(math.ceil(H / p) / rows)
    windows = []
    for number in range(first, first + count):
        image, part = divmod(number, per_image)
        window = []
        for row in range(part * rows, (part + 1) * rows):
            for column in range(columns):
                places = [(row * p + i, column * p + j) for i in range(p) for j in range(p)]
                inside = [(y, x) if y < H and x < W else None for y, x in places]
                window.append(
                    [(grey[image][at], labels[image][at]) if at is not None else (0, -1) for at in inside],
                )
        windows.append(window)
    pixels_2BLP = np.moveaxis(np.array(windows), -1, 0)
    return pixels_2BLP[0], pixels_2BLP[1]


def dense_logits(params, pixels_BLP, config):
    """Logits of each pixel on one device, `[B, L, P, C]`."""
    B, L, P = pixels_BLP.shape
    numbers_BL = pixels_BLP[..., 0]
    if config.data.patch:  # a table of all patches there are
        table = pixels_BLP.reshape(B * L, P) / 255 @ params["tokens"]["kernel_PE"] + params["tokens"]["bias"]
        params, numbers_BL = {**params, "tokens": {"table_VE": table}}, np.arange(B * L).reshape(B, L)
    everything_BLL = np.ones((B, L, L), bool)
    return oracle.logits(params, numbers_BL, everything_BLL, config.model).reshape(B, L, P, -1)


def dense_loss(params, pixels_BLP, labels_BLP, config):
    logits = dense_logits(params, pixels_BLP, config)
    weight = np.where(labels_BLP < 0, 0.0, np.array(config.labels.weights)[labels_BLP])
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), np.maximum(labels_BLP, 0)[..., None], -1)[..., 0]
    return -(weight * chosen).sum() / weight.sum()


def dense_values(params, pixels_BLP, labels_BLP, config):
    """Accuracy and Dice coefficients, by sets of pixels."""
    predicted = np.asarray(jnp.argmax(dense_logits(params, pixels_BLP, config), -1))
    counted = labels_BLP >= 0
    dice = []
    for number in range(CLASSES):
        found, true = (set(np.flatnonzero((each == number) & counted)) for each in (predicted, labels_BLP))
        dice.append(2 * len(found & true) / (len(found) + len(true)))
    values = {"accuracy": np.mean(predicted[counted] == labels_BLP[counted]), "dice": np.mean(dice)}
    return values | dict(zip(("dice_sky", "dice_sea", "dice_land"), dice, strict=True))


def check(images, view, sizes, **changes):
    """Loss, gradient, and the metrics of an evaluation, of windows in order."""
    model, mesh = model_on(*sizes, **changes_of(images, view, **changes))
    config, params, task = model.config, perturbed_params(model), make_task(model.config)
    pixels, labels = windows_of(config, first=0, count=config.data.batch_size)
    batch = task.splits(mesh)["train"].evaluation_batch(0)
    loss, gradient = jax.jit(make_loss_and_gradient(model, mesh))(params, batch, 0)
    with jax.default_device(jax.devices()[0]):
        expected = jax.jit(jax.value_and_grad(lambda params: dense_loss(params, pixels, labels, config)))(params)
        values = dense_values(params, pixels, labels, config)
    assert_close({"loss": loss, "gradient": gradient}, dict(zip(("loss", "gradient"), expected, strict=True)), 2e-5)
    if config.mesh.shard == "none":
        found = values_of(task, means_of(make_eval_step(model, mesh)(params, batch)))
        assert {name: found[name] for name in values} == pytest.approx(values)


CASES = [
    *((view, sizes, "zigzag") for view in VIEWS for sizes in [(1, 3, 1), (2, 2, 2)]),
    *(("patches in windows", sizes, layout) for sizes in [(1, 8, 1), (2, 4, 1)] for layout in ("zigzag", "contiguous")),
]


@pytest.mark.parametrize("case", sampled(CASES, [("patches", (2, 2, 2), "zigzag")]), ids=str)
def test_loss_gradient_and_dice_equal_the_oracle(case, images):
    view, sizes, layout = case
    check(images, view, sizes, attention__layout=layout)


VARIANTS = {
    "tiles": {"model__tile": 2},
    "remat": {"model__remat": "input"},
    "sharded weights": {"mesh__shard": "all"},
    "microbatches": {"optim__accumulate": 2},
    "ring": {"attention__strategy": "ring"},
    "ulysses": {"attention__strategy": "ulysses"},
}


@pytest.mark.parametrize("variant", sampled(VARIANTS, []))
def test_patches_with_every_variant(variant, images):
    check(images, "patches", (2, 2, 2), **VARIANTS[variant])


PROGRAMS = [((1, 8, 1), "plain"), *(((2, 2, 2), variant) for variant in ("plain", "tiles", "sharded weights"))]


@pytest.mark.parametrize("program", sampled(PROGRAMS, []), ids=str)
def test_the_compiled_step_with_patches_is_as_predicted(program, images):
    sizes, variant = program
    model, mesh = model_on(*sizes, **changes_of(images, "patches", **{**VARIANTS, "plain": {}}[variant]))
    assert audit.problems(audit.audited(model, mesh), None) == []


@pytest.mark.grid
def test_every_mesh_predicts_the_same_pixels(images):
    found = []
    for sizes in [(1, 1, 1), (2, 3, 1)]:
        model, mesh = model_on(*sizes, **changes_of(images, "patches in windows"))
        params, task = perturbed_params(model), make_task(model.config)
        split = task.splits(mesh)["train"]
        found.append(pictures.pictures(split, predicted_windows(task, model, mesh, params, split), 2))
    pixels, _ = windows_of(model.config, first=0, count=2)
    classes = np.asarray(jnp.argmax(dense_logits(params, pixels, model.config), -1))
    one, other = found
    assert [picture.name for picture in one] == ["image 0", "image 15"]
    np.testing.assert_array_equal(one[0].predicted[:3, :3], classes[0, 0].reshape(3, 3))
    for first, second in zip(one, other, strict=True):
        np.testing.assert_array_equal(first.predicted, second.predicted)
        assert first.predicted.shape == first.pixels.shape == first.labels.shape == (H, W)


def test_the_same_images_in_other_windows_are_the_same_data(images):
    found = []
    for view in ("images", "patches in windows"):
        streams = open_images(small_config(**changes_of(images, view)).data)
        found.append(fingerprint(streams["train"].tokens.source))
    assert found[0] == found[1]


def test_a_run_learns_its_classes_and_draws_them(images, tmp_path):
    config = small_config(**changes_of(images, "images", mesh__data=2, mesh__seq=4))
    run(config, tmp_path)
    record = evaluate_run(tmp_path, "test")
    assert record["dice"] > 0.8, record
    drawn = picture_run(config, tmp_path, "test", 2)
    assert drawn.startswith(b"\x89PNG") and drawn == picture_run(config, tmp_path, "test", 2)
    (tmp_path / "pictures_test.png").write_bytes(drawn)
    written = run_page.report(read_runs([tmp_path]), ["it is not asked"])
    shown = f'<img src="data:image/png;base64,{base64.b64encode(drawn).decode()}" alt="Images of the test split: labels'
    assert shown in written


BAD = {
    "part of a row": (
        {"data__seq_len": 20},
        r"data.seq_len=20 is no number of whole rows of images of 7 x 9 pixels, 7 of 9 tokens; use data.seq_len=63 for "
        r"all of an image, or 18 for 2 rows of it",
    ),
    "several images": ({"data__seq_len": 126}, r"data.seq_len=126 is no number .* or 63 for 7 rows of it"),
    "rows of pixels, not patches": (
        {"data__patch": 2, "data__seq_len": 20, "model__rope_columns": 9},
        r"model.rope_columns=9, but images of 7 x 9 pixels in patches of 2 x 2 have 5 tokens in a row; use "
        r"model.rope_columns=5, or 0",
    ),
    "too few classes": (
        {"model__classes": 2, "labels__names": "sky,sea", "labels__weights": ()},
        r"the label of image 0, row \d, column \d in the split 'train' is 2, but model.classes=2, so that labels go up "
        r"to 1; use more classes, or 255 for no label",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_what_does_not_fit_the_images_is_refused(bad, images):
    changes, message = BAD[bad]
    model, mesh = model_on(1, 8, **changes_of(images, "images", **{"model__rope_columns": 0, **changes}))
    with pytest.raises(ConfigError, match=message):
        make_task(model.config).splits(mesh)


REFUSED = {
    "no file": (
        {"data__path": ""},
        r"data.source='images' needs a file; give the .npz file of your images as data.path",
    ),
    "a file of its own": ({"data__source": "mri"}, r"data.path='.*' has no use with data.source='mri'"),
    "means": ({"data__downsample": 2}, r"data.downsample=2 has no use with data.source='images'"),
    "nothing": ({"data__downsample": 0}, r"data.downsample=0 must be at least 1"),
    "patches of text": (
        {"data__source": "stdlib", "data__path": "", "data__patch": 2, "task": "language_model"},
        r"data.patch=2 is for images, but data is from data.source='stdlib'; use data.patch=0",
    ),
    "patches of a vocabulary": (
        {"data__patch": 2, "model__vocab_parallel": True},
        r"model.vocab_parallel=True has no use with data.patch=2",
    ),
    "predicted patches": (
        {"data__patch": 2, "task": "masked_language_model", "model__classes": 0},
        r"data.patch=2 makes vectors of pixels of tokens, which task='masked_language_model' cannot predict",
    ),
    "other classes": (
        {"data__source": "mosaics", "data__path": "", "labels__names": "", "labels__weights": ()},
        r"model.classes=3, but there are 11 classes \(background, 0, 1, .*; use model.classes=11",
    ),
    "a tokenizer": (
        {"data__tokenizer": "tokenizer.json"},
        r"data.tokenizer='tokenizer.json' has no use with data.source=",
    ),
    "documents": ({"data__separator": "x"}, r"data.separator='x' has no use with data.source='images'"),
}


@pytest.mark.parametrize("refused", REFUSED)
def test_keys_that_do_not_suit_images_are_refused(refused, images):
    changes, message = REFUSED[refused]
    with pytest.raises(ConfigError, match=message):
        validate(small_config(**changes_of(images, "images", **changes)), 8)


@pytest.mark.parametrize(("source", "height", "width"), [("mri", 58, 49), ("mri", 233, 197), ("mosaics", 28, 28)])
def test_the_views_of_the_experiment_are_possible_and_alike(source, height, width):
    for name, changes in views(config_of(source, {}), height, width).items():
        config = config_of(source, changes)
        validate(config, 8)
        parts, patch = config.data.batch_size // config_of(source, {}).data.batch_size, config.data.patch
        rows = config.data.seq_len // config.model.rope_columns * parts
        assert config.data.seq_len % config.model.rope_columns == 0, name
        assert height <= rows * patch < height + parts * patch * 2 and width <= config.model.rope_columns * patch, name


def test_pictures_are_of_images():
    with pytest.raises(ConfigError, match="--pictures is for classes of pixels, but the run has task='language_model'"):
        check_pictures(small_config())
