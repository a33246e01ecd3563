"""Genomes to begin with, from a package on PyPI: a bacterium to train on, two others held out, and their genes.

    pip install pyrodigal
    python -m experiments.genomes.example --out genomes

Writes `train.fna` (Corynebacterium diphtheriae NCTC 11397, 2.5 million bases), `valid.fna` (a contig of Escherichia
coli) and `test.fna` (a contig of a mycoplasma), which the package's tests come with; and `genes.gff`, the coding
sequences that the package finds in them (Prodigal, Hyatt et al. 2010). Found genes are no curated ones: what is learned
from them is what Prodigal says. The package is under the GPL 3; this script imports it, and lss_jax does not.
"""

import argparse
import gzip
import importlib.resources
import importlib.util
import io
import sys
from pathlib import Path

from lss_jax.data.annotation import read_gff
from lss_jax.data.bases import LETTERS
from lss_jax.data.genomes import read_genome

FILES = {
    "train": "GCF_001457455.1_NCTC11397_genomic.fna.gz",
    "valid": "MIIJ01000039.fna.gz",
    "test": "SRR492066.fna.gz",
}


def genes_of(path: Path) -> str:
    """The coding sequences of a genome, as GFF3."""
    import pyrodigal

    finder, written = pyrodigal.GeneFinder(meta=True), io.StringIO()
    for record in read_genome(path):
        letters = bytes(LETTERS[base] for base in record.bases)
        finder.find_genes(letters).write_gff(written, sequence_id=record.name, header=False)
    return written.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, metavar="DIR", type=Path, help="the folder to write")
    out = parser.parse_args().out
    if importlib.util.find_spec("pyrodigal") is None:
        sys.exit("error: the package pyrodigal, which has the genomes, is not installed; pip install pyrodigal")
    out.mkdir(parents=True, exist_ok=True)
    packaged, genes = importlib.resources.files("pyrodigal.tests.data"), ["##gff-version 3\n"]
    for split, name in FILES.items():
        path = out / f"{split}.fna"
        path.write_bytes(gzip.decompress((packaged / name).read_bytes()))
        genes.append(genes_of(path))
        print(f"{path}: {sum(len(record.bases) for record in read_genome(path)):,} bases", flush=True)
    (out / "genes.gff").write_text("".join(genes))
    found = read_gff(out / "genes.gff").spans
    print(f"{out / 'genes.gff'}: {sum(map(len, found.values())):,} coding sequences")


if __name__ == "__main__":
    main()
