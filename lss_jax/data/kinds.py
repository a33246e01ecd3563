"""The configured data, opened: texts, or a source of another kind. A new kind is one file, and one line in `KINDS`."""

from collections.abc import Callable
from typing import NamedTuple

from lss_jax.config.genome_rules import BASES, FASTA
from lss_jax.config.schema import DataConfig
from lss_jax.data.annotation import NAMES as LABELS_OF_BASES
from lss_jax.data.corpus import Corpus, are_documents, check_texts, open_texts
from lss_jax.data.generated import GENERATED, repeated
from lss_jax.data.genome_splits import genome_files, open_genomes
from lss_jax.data.image_sources import DIGITS, TISSUES, check_arrays
from lss_jax.data.images import open_images


class Kind(NamedTuple):
    """A source that is no text: how it is opened, and what is known of it before."""

    open: Callable[[DataConfig], Corpus]
    packed: bool  # whether windows say which documents they hold
    classes: tuple[str, ...] | None  # of its tokens' labels; empty: the config names them; None: it has no labels
    items: str  # what a token is, in the plural
    check: Callable[[DataConfig], object]  # raises a ConfigError for files that are not there


def _genomes(config: DataConfig) -> Corpus:
    return Corpus(open_genomes(config), None)


def _of_images(config: DataConfig) -> Corpus:
    return Corpus({name: [stream] for name, stream in open_images(config).items()}, None)


def _arrays_file(config: DataConfig) -> None:
    if config.path:
        check_arrays(config.path)


SYMBOLS = Kind(lambda config: Corpus(repeated(config), None), True, None, "symbols", lambda _: None)
KINDS: dict[str, Kind] = {
    **dict.fromkeys(GENERATED, SYMBOLS),
    FASTA: Kind(_genomes, True, LABELS_OF_BASES, BASES, genome_files),
    "mri": Kind(_of_images, False, TISSUES, "pixels", lambda _: None),
    "mosaics": Kind(_of_images, False, DIGITS, "pixels", lambda _: None),
    "images": Kind(_of_images, False, (), "pixels", _arrays_file),
}


def is_packed(config: DataConfig) -> bool:
    """Whether windows say which documents they hold: unless the data is one."""
    return KINDS[config.source].packed if config.source in KINDS else are_documents(config)


def check_files(config: DataConfig) -> None:
    """Raises a ConfigError for files that are not there, a line each; opens nothing."""
    check = KINDS[config.source].check if config.source in KINDS else check_texts
    check(config)


def open_corpus(config: DataConfig) -> Corpus:
    """Opens all sources.

    Raises:
      ConfigError: a source cannot be opened, or is too short.
    """
    open_source = KINDS[config.source].open if config.source in KINDS else open_texts
    return open_source(config)
