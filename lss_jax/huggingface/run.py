"""A run that starts from a Hugging Face folder, and a folder that is made of a run."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from lss_jax.config.schema import Config, ConfigError, with_value
from lss_jax.data.text import BYTES
from lss_jax.data.tokenizer import OF_LETTERS, load_tokenizer
from lss_jax.huggingface.exporting import DTYPES, Merged, Source, files_of, groups_of, write_file, write_index
from lss_jax.huggingface.families import FAMILIES
from lss_jax.huggingface.folder import BESIDE, CONFIG, GENERATION, OTHER_TOKENIZERS, TOKENIZER
from lss_jax.huggingface.importing import Import, shapes_by_name
from lss_jax.huggingface.keys import expressing, family_of, their_config
from lss_jax.models import Model, build_model
from lss_jax.runtime.distributed import after_first, is_first
from lss_jax.storage.arrays import StoredArrays
from lss_jax.storage.checkpoint import newest_step
from lss_jax.storage.workdir import IMPORTED, keep_config

UNFINISHED = ".unfinished"


def imported(workdir: Path, model: Model) -> Import | None:
    """The parameters that a run starts from, None if it starts from random ones.

    Raises:
      ConfigError: they are damaged, or not those of the model.
    """
    folder = workdir / IMPORTED
    return Import(folder, model) if folder.is_dir() else None


def import_run(source: Path, workdir: Path, config: Config) -> Model:
    """Makes a run at step 0 whose parameters, and whose tokenizer if it has one, are those of a Hugging Face folder.

    Its tensors become files of the run without copying, where the file system can link them. Returns the run's model.

    Raises:
      ConfigError: the folder is not that of the config's model, or its tokenizer cannot be used, or the run cannot be
        written, or is there already.
    """
    if (workdir / "config.json").exists():
        raise ConfigError(f"workdir {workdir} holds a run already; choose another --workdir")
    model = build_model(config)
    folder = Import(source, model).folder
    if config.data.tokenizer == BYTES:
        config = with_value(config, "data.tokenizer", _own_tokenizer(source, workdir, config))
    multihost_utils.sync_global_devices("all have checked")

    def place() -> None:
        shutil.rmtree(workdir / IMPORTED, ignore_errors=True)  # of a command that was killed
        with _writing(workdir / IMPORTED) as unfinished:
            _made_anew(unfinished)
            for file in folder.tensor_files:
                _link_or_copy(file.resolve(), unfinished / file.name)
            for file in folder.other_files:
                shutil.copy(file, unfinished / file.name)
            os.replace(unfinished, workdir / IMPORTED)
        keep_config(config, workdir)

    after_first(place)
    return model


def _own_tokenizer(source: Path, workdir: Path, config: Config) -> str:
    """The tokenizer that comes with a folder, as `data.tokenizer`."""
    tokenizer = source / TOKENIZER
    if not tokenizer.is_file():
        other = next((name for name in OTHER_TOKENIZERS if (source / name).is_file()), None)
        if other:
            raise ConfigError(
                f"{source} has {other}, but no {TOKENIZER}; save the tokenizer by transformers' AutoTokenizer, which "
                f"writes one, or give another as --config.data.tokenizer"
            )
        return BYTES
    vocab = load_tokenizer(str(tokenizer)).vocab
    if vocab > config.model.vocab:
        raise ConfigError(
            f"{tokenizer} has {vocab} tokens, more than the model's model.vocab={config.model.vocab}; give the "
            f"tokenizer that the model was trained with as --config.data.tokenizer"
        )
    return str(workdir / IMPORTED / TOKENIZER)


def export_run(config: Config, workdir: Path, out: Path, family: str | None, dtype: str) -> str:
    """Makes a Hugging Face folder of a run's newest checkpoint, or of what it starts from; returns the family's name.

    Each process writes files of its own.

    Raises:
      ConfigError: no family has such models, the run has no parameters or damaged ones, or the folder cannot be
        written, or is there already.
    """
    model = build_model(config)
    start = imported(workdir, model)
    came_as = family_of(start.folder.config, workdir / IMPORTED / CONFIG) if start else None
    name = expressing(config, family, preferred=came_as)
    source, shapes = _source(workdir, start, model), shapes_by_name(model)
    kept = start.folder.config if start and name == came_as else None
    theirs = their_config(config, name, kept) | _ends(config, kept) | {"torch_dtype": dtype}
    beside = _tokenizer_files(config) | ({GENERATION: start.folder.path / GENERATION} if start else {})
    if out.exists():
        raise ConfigError(f"--to-hf={out} is there already; give the name of a folder that is not")
    groups = groups_of(FAMILIES[name].tensors, shapes)
    files = files_of(groups, DTYPES[dtype].itemsize)
    multihost_utils.sync_global_devices("all have checked")
    with _writing(out) as unfinished:
        after_first(lambda: _made_anew(unfinished))
        for file, held in list(files.items())[jax.process_index() :: jax.process_count()]:
            write_file(unfinished / file, held, source, DTYPES[dtype])
        if is_first():
            write_index(unfinished, files, DTYPES[dtype].itemsize)
            (unfinished / CONFIG).write_text(json.dumps(theirs, indent=2) + "\n")
            for file, place in beside.items():
                if place.is_file():
                    shutil.copy(place, unfinished / file)
        multihost_utils.sync_global_devices("all files are written")
        after_first(lambda: os.replace(unfinished, out))
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


def _ends(config: Config, kept: dict[str, Any] | None) -> dict[str, Any]:
    """The keys of the tokens that begin and end texts, unless they are kept from a `config.json` that came in."""
    if kept is not None:
        return {}
    tokenizer = load_tokenizer(config.data.tokenizer)
    first = tokenizer.first.tolist()
    return {"bos_token_id": first[0] if first else None, "eos_token_id": tokenizer.end}


def _tokenizer_files(config: Config) -> dict[str, Path]:
    """The run's tokenizer and what may lie beside it, by their names in a folder of theirs."""
    if config.data.tokenizer in OF_LETTERS:
        return {}
    tokenizer = Path(config.data.tokenizer).expanduser()
    if not tokenizer.is_file():
        raise ConfigError(f"data.tokenizer={config.data.tokenizer!r} is not a file; put it back, to be exported, too")
    return {TOKENIZER: tokenizer, **{name: tokenizer.parent / name for name in BESIDE}}


@contextmanager
def _writing(folder: Path) -> Iterator[Path]:
    """Yields the name that the folder has until it is complete; where that fails, what was written is removed."""
    unfinished = folder.with_name(f"{folder.name}{UNFINISHED}")
    try:
        yield unfinished
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        raise ConfigError(f"{folder} cannot be written ({error.strerror}); make room, or choose another") from error


def _made_anew(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _link_or_copy(file: Path, to: Path) -> None:
    try:
        os.link(file, to)
    except OSError:  # another file system, or one without links
        shutil.copy(file, to)
