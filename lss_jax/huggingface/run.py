"""A run that starts from a Hugging Face folder, and a folder that is made of a run."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from lss_jax.config.schema import Config, ConfigError, with_value
from lss_jax.data.text import BYTES
from lss_jax.data.tokenizer import load_tokenizer
from lss_jax.huggingface.exporting import DTYPES, Merged, Source, files_of, groups_of, write_file, write_index
from lss_jax.huggingface.families import FAMILIES
from lss_jax.huggingface.folder import CONFIG, TOKENIZER, Folder
from lss_jax.huggingface.importing import Import, shapes_by_name
from lss_jax.huggingface.keys import expressing, family_of, their_config
from lss_jax.models import Model, build_model
from lss_jax.runtime.distributed import after_first
from lss_jax.storage.arrays import StoredArrays
from lss_jax.storage.checkpoint import newest_step
from lss_jax.storage.workdir import keep_config

IMPORTED = "imported"  # within the folder of a run: the folder that it starts from
UNFINISHED = ".unfinished"


def imported(workdir: Path, model: Model) -> Import | None:
    """The parameters that a run starts from, None if it starts from random ones.

    Raises:
      ConfigError: they are damaged, or not those of the model.
    """
    folder = workdir / IMPORTED
    return Import(folder, model) if folder.is_dir() else None


def import_run(source: Path, workdir: Path, config: Config) -> None:
    """Makes a run at step 0 whose parameters, and whose tokenizer if it has one, are those of a Hugging Face folder.

    Its files become files of the run, without copying where the file system can link them.

    Raises:
      ConfigError: the folder is not that of the config's model, or its tokenizer has tokens that the model has not, or
        the run cannot be written, or is there already.
    """
    if (workdir / "config.json").exists() or (workdir / IMPORTED).exists():
        raise ConfigError(f"workdir {workdir} holds a run already; choose another --workdir")
    Import(source, build_model(config))
    if (source / TOKENIZER[0]).is_file() and config.data.tokenizer == BYTES:
        _check_vocabulary(source / TOKENIZER[0], config)
        config = with_value(config, "data.tokenizer", str(workdir / IMPORTED / TOKENIZER[0]))

    def place() -> None:
        unfinished = _made_anew(workdir / f"{IMPORTED}{UNFINISHED}")
        for file in Folder(source).files:
            _link_or_copy(file.resolve(), unfinished / file.name)
        os.replace(unfinished, workdir / IMPORTED)

    after_first(lambda: _writing(workdir, place))
    after_first(lambda: keep_config(config, workdir))


def _check_vocabulary(tokenizer: Path, config: Config) -> None:
    vocab = load_tokenizer(str(tokenizer)).vocab
    if vocab > config.model.vocab:
        raise ConfigError(
            f"{tokenizer} has {vocab} tokens, more than the model's model.vocab={config.model.vocab}; give the "
            f"tokenizer that the model was trained with"
        )


def export_run(config: Config, workdir: Path, out: Path, family: str | None, dtype: str) -> str:
    """Makes a Hugging Face folder of a run's newest checkpoint, or of what it starts from; returns the family's name.

    Each process writes files of its own.

    Raises:
      ConfigError: no family has such models, the run has no parameters or damaged ones, or the folder cannot be
        written, or is there already.
    """
    model = build_model(config)
    start = imported(workdir, model)
    came_as = family_of(start.config, workdir / IMPORTED / CONFIG) if start else None
    name = expressing(config, family, preferred=came_as)
    if out.exists():
        raise ConfigError(f"--to-hf={out} is there already; give the name of a folder that is not")
    source, shapes = _source(workdir, start, model), shapes_by_name(model)
    groups = groups_of(FAMILIES[name].tensors, shapes)
    _, numpy_dtype = DTYPES[dtype]
    files = files_of(groups, numpy_dtype.itemsize)
    kept = start.config if start and name == came_as else None
    unfinished = out.with_name(f"{out.name}{UNFINISHED}")
    after_first(lambda: _writing(out, lambda: _made_anew(unfinished)))

    def write_own() -> None:
        for file, held in list(files.items())[jax.process_index() :: jax.process_count()]:
            write_file(unfinished / file, held, source, dtype)

    def finish() -> None:
        write_index(unfinished, files, numpy_dtype.itemsize)
        theirs = their_config(config, name, kept) | {"torch_dtype": dtype}
        (unfinished / CONFIG).write_text(json.dumps(theirs, indent=2) + "\n")
        for file, copied in zip(_tokenizer_files(config), TOKENIZER, strict=False):
            shutil.copy(file, unfinished / copied)
        os.replace(unfinished, out)

    _writing(out, write_own)
    multihost_utils.sync_global_devices("all files are written")
    after_first(lambda: _writing(out, finish))
    return name


def _source(workdir: Path, start: Import | None, model: Model) -> Source:
    """The newest checkpoint with its adapters merged; or what the run starts from, where adapters change nothing."""
    step = newest_step(workdir / "checkpoints")
    if step is not None:
        lora = model.config.lora
        stored = StoredArrays(workdir / "checkpoints" / str(step), "params")
        return Merged(stored, shapes_by_name(model), lora.alpha / lora.rank) if lora.rank else stored
    if start is None:
        raise ConfigError(f"{workdir} has no checkpoint yet; train there first")
    return start


def _tokenizer_files(config: Config) -> list[Path]:
    """The run's tokenizer, with what lies beside it."""
    if config.data.tokenizer == BYTES:
        return []
    folder = Path(config.data.tokenizer).expanduser().parent
    beside = [folder / name for name in TOKENIZER[1:]]
    return [Path(config.data.tokenizer).expanduser(), *(file for file in beside if file.is_file())]


def _writing(place: Path, write: Callable[[], Any]) -> None:
    """Writes something; where that fails, what is unfinished is removed."""
    try:
        write()
    except OSError as error:
        raise ConfigError(f"{place} cannot be written ({error.strerror}); make room, or choose another") from error
    except BaseException:
        shutil.rmtree(place.with_name(f"{place.name}{UNFINISHED}"), ignore_errors=True)
        raise


def _made_anew(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _link_or_copy(file: Path, to: Path) -> None:
    try:
        os.link(file, to)
    except OSError:  # another file system, or one without links
        shutil.copy(file, to)
