"""What needs no training steps: k-mer models, gzip and xz on the genomes, and open reading frames on the contigs.

    python -m experiments.genomes.baselines --data GENOMES

GENOMES is a folder with the files that the README of this folder names. The prior of the k-mer models is chosen on a
like question: by counting on all training genomes but one, a strain or a species, and measuring that one. The length of
the shortest open reading frame is chosen by F1 on the training contigs. Takes about five minutes on one core. Writes
`baselines.json` beside this file, which `run` puts into its tables; what is in it already is not measured again.
"""

import argparse
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np

from experiments.genomes.genomes import HELD_OUT, STANDS_FOR, TRAIN, bases_in, contigs_in, held_out, letters
from experiments.genomes.kmers import bits_per_base, both_strands, probabilities
from experiments.genomes.orfs import coding_bases
from experiments.genomes.report import tables

HERE = Path(__file__).parent
ORDERS = (4, 8, 12, 16)
PRIORS = (1.0, 4.0, 16.0, 64.0, 256.0, 1024.0, 4096.0)
LENGTHS = (60, 90, 120, 150, 200, 250, 300, 400, 500)  # bases of the shortest ORF
DICTIONARY = 2**26  # bytes that xz looks back: both strands of all training genomes


def k_mers(folder: Path) -> dict[str, Any]:
    """Bits per base of each order on each held-out genome, with the prior that is best on the one that stands for it.

    That one, of the training genomes, is then left out of the counts.
    """
    train = {name: bases_in(folder, name) for name in TRAIN}
    choices: dict[str, dict[float, float]] = {}
    for left_out in sorted(set(STANDS_FOR.values())):
        others = [bases for name, bases in train.items() if name != left_out]
        *_, (_, found) = probabilities(others, {left_out: train[left_out]}, max(ORDERS), PRIORS)
        choices[left_out] = {prior: bits_per_base(found[left_out, prior]) for prior in PRIORS}
        print(f"{left_out} by prior: {choices[left_out]}", flush=True)
    best = {name: min(PRIORS, key=choices[STANDS_FOR[name]].__getitem__) for name in HELD_OUT}
    tested_on, bits = {name: held_out(folder, name) for name in HELD_OUT}, {}
    for order, found in probabilities(list(train.values()), tested_on, max(ORDERS), sorted(set(best.values()))):
        bits[order] = {name: bits_per_base(found[name, best[name]]) for name in HELD_OUT}
        print(f"order {order}: {bits[order]}", flush=True)
    return {"choices": choices, "prior": best, "bits": {order: bits[order] for order in ORDERS}}


def compressed(folder: Path) -> dict[str, dict[str, float]]:
    """Bits per base of gzip and xz on each held-out genome's letters; xz also behind both strands of the others."""
    before = b"".join(map(letters, both_strands([bases_in(folder, name) for name in TRAIN])))
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": DICTIONARY}]

    def xz(text: bytes) -> int:
        return len(lzma.compress(text, filters=filters))

    alone, found = xz(before), {}
    for name in HELD_OUT:
        text = letters(held_out(folder, name))
        sizes = {
            "gzip -9": len(gzip.compress(text, 9)),
            "xz -9e": xz(text),
            "xz -9e behind the training genomes": xz(before + text) - alone,
        }
        found[name] = {program: 8 * size / len(text) for program, size in sizes.items()}
        print(name, found[name], flush=True)
    return found


def f1(coding: list[np.ndarray], labels: list[np.ndarray]) -> float:
    """2 TP / (predicted + true) over the bases of all contigs."""
    predicted, true = np.concatenate(coding), np.concatenate(labels)
    known = true <= 1
    hits = np.count_nonzero(predicted & (true == 1) & known)
    return float(2 * hits / (np.count_nonzero(predicted & known) + np.count_nonzero((true == 1) & known)))


def open_frames(folder: Path) -> dict[str, Any]:
    """F1 of the rule, by length on the training contigs, and with the best length on the held-out ones."""
    contigs = contigs_in(folder)

    def f1_of(split: str, shortest: int) -> float:
        bases, labels = zip(*contigs[split], strict=True)
        return f1([coding_bases(one, shortest) for one in bases], list(labels))

    by_length = {length: f1_of("train", length) for length in LENGTHS}
    best = max(by_length, key=lambda length: by_length[length])
    everything = {
        split: f1([b < 4 for b, _ in contigs[split]], [one for _, one in contigs[split]]) for split in contigs
    }
    sizes = {split: {"contigs": len(of), "bases": sum(len(b) for b, _ in of)} for split, of in contigs.items()}
    found = {split: f1_of(split, best) for split in contigs}
    return {"lengths": by_length, "length": best, "f1": found, "all coding": everything, "splits": sizes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="GENOMES", type=Path, help="the folder of the genomes")
    folder = parser.parse_args().data
    results = HERE / "baselines.json"
    found = json.loads(results.read_text()) if results.exists() else {}
    for name, measure in {"open frames": open_frames, "compressed": compressed, "k-mers": k_mers}.items():
        if name not in found:
            found[name] = measure(folder)
            results.write_text(json.dumps(found, indent=2) + "\n")
    print(tables({}, json.loads(results.read_text())))


if __name__ == "__main__":
    main()
