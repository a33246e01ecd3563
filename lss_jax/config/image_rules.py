"""The rules for images: their sources, patches, and positions by row and column."""

from collections.abc import Iterator

from lss_jax.config.schema import Config, ModelConfig

IMAGE_SOURCES = ("mri", "mosaics", "images")


def image_problems(config: Config) -> Iterator[str]:
    """Errors in the keys of images, also where the data is something else."""
    data, model, shown = config.data, config.model, f"data.source={config.data.source!r}"
    if data.source == "images" and not data.path:
        yield f"{shown} needs a file; give the .npz file of your images as data.path"
    if data.source in ("mri", "mosaics") and data.path:
        yield f'data.path={data.path!r} has no use with {shown}; use data.source="images" for a file of your own'
    of_text = {"tokenizer": "bytes", "separator": "", "prompt_field": "", "answer_field": ""}
    for key, default in of_text.items():
        value = getattr(data, key)
        if data.source in IMAGE_SOURCES and value != default:
            yield f"data.{key}={value!r} has no use with {shown}, which has no text; use data.{key}={default!r}"
    if data.downsample > 1 and data.source not in ("mri", "mosaics"):
        yield f"data.downsample={data.downsample} has no use with {shown}; use data.downsample=1"
    if data.patch > 0 and data.source not in IMAGE_SOURCES:
        yield f"data.patch={data.patch} is for images, but data is from {shown}; use data.patch=0"
    if data.patch > 0 and model.vocab_parallel:
        yield (
            f"model.vocab_parallel=True has no use with data.patch={data.patch}, whose tokens are no vocabulary; "
            f"use model.vocab_parallel=False"
        )
    yield from _rope_columns_problems(model)


def _rope_columns_problems(model: ModelConfig) -> Iterator[str]:
    """Errors in rotation by row and column."""
    columns = model.rope_columns
    if columns == 0:
        return
    if model.positions != "rope":
        yield (
            f"model.rope_columns={columns} has no use with model.positions={model.positions!r}; "
            f'use model.positions="rope" or model.rope_columns=0'
        )
    if model.rope_scaling != "none":
        yield (
            f"model.rope_scaling={model.rope_scaling!r} is for positions of one dimension, but model.rope_columns="
            f'{columns} gives two; use model.rope_scaling="none"'
        )
    if model.head_width % 4 == 2:
        yield (
            f"the head width model.head_width={model.head_width} is not divisible by 4, but model.rope_columns="
            f"{columns} rotates half of the pairs by row and half by column; use a multiple of 4"
        )
