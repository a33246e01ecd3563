"""The genomes of this experiment: which are trained on, and which held out."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np

from configs import base
from lss_jax.config.schema import from_dict
from lss_jax.data.bases import LETTERS
from lss_jax.data.genome_splits import open_genomes
from lss_jax.data.genomes import read_genome

TRAIN = ("ecoli-MG1655", "hpylori-ELS37", "hpylori-G27", "saureus-N315")
HELD_OUT = {  # what each is to those
    "hpylori-SJM180": "a strain",
    "ecoli-DH1": "nearly a copy",
    "vcholerae-O395": "a species",
}
STANDS_FOR = {  # a training genome that is to the others what a held-out one is to all, to choose by
    "hpylori-SJM180": "hpylori-G27",
    "ecoli-DH1": "hpylori-G27",
    "vcholerae-O395": "saureus-N315",
}
EVALUATED = 2**19  # bases of each held-out genome
CONTIGS = "annotated-contigs.gbk.gz"


def file_of(folder: Path, name: str) -> Path:
    return folder / f"{name}.fasta.gz"


def bases_in(folder: Path, name: str) -> np.ndarray:
    """All bases of a genome; of several records one after the other."""
    return np.concatenate([record.bases for record in read_genome(file_of(folder, name))])


def held_out(folder: Path, name: str) -> np.ndarray:
    """The bases of a held-out genome that are evaluated: its first ones."""
    return bases_in(folder, name)[:EVALUATED]


def letters(bases: np.ndarray) -> bytes:
    return np.frombuffer(LETTERS, np.uint8)[bases].tobytes()


def contigs_in(folder: Path) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    """By split, the bases and the labels of each annotated contig, as training splits them."""
    config: Any = base.get_config()
    config.update_from_flattened_dict(
        {"data.source": "fasta", "data.path": str(folder / CONTIGS), "data.tokenizer": "bases"}
    )
    found = {}
    for split, (stream,) in open_genomes(from_dict(config).data).items():
        assert stream.documents is not None and stream.labels is not None
        bounds = itertools.starmap(slice, (stream.documents[n] for n in range(len(stream.documents))))
        found[split] = [(stream.tokens[part], stream.labels[part]) for part in bounds]
    return found
