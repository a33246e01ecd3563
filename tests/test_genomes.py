"""FASTA, GenBank and GFF files: what is written is read, with its coding bases, and what is malformed is named."""

import gzip
import re
from pathlib import Path

import numpy as np
import pytest
from genome_files import fasta, genbank, random_letters, reverse_complement, write
from hypothesis import given, settings
from hypothesis import strategies as st

from lss_jax.config.schema import ConfigError
from lss_jax.data import numbered
from lss_jax.data.annotation import annotated, check_known, labels_of, read_gff, spans_of_location
from lss_jax.data.bases import BaseText, other_strand
from lss_jax.data.genomes import read_genome
from lss_jax.data.packing import IGNORED_LABEL, Packing, Stream

CONTIGS = Path(__file__).parents[2] / "shared" / "data" / "genomes" / "annotated-contigs.gbk.gz"
AMBIGUOUS = "RYSWKMBDHV"

names = st.text("abcXYZ019._|", min_size=1, max_size=8)
sequences = st.text("ACGTUNacgtn" + AMBIGUOUS, min_size=1, max_size=150)


def letters_of(bases: np.ndarray) -> str:
    return "".join("ACGTN"[base] for base in bases)


def plain(letters: str) -> str:
    """As they are to be read: RNA as DNA, upper case, and what stands for several bases as N."""
    return re.sub(f"[{AMBIGUOUS}]", "N", letters.upper().replace("U", "T"))


@settings(deadline=None, max_examples=50)
@given(st.dictionaries(names, sequences, min_size=1, max_size=4), st.integers(1, 80), st.booleans(), st.booleans())
def test_fasta_that_is_written_is_read(tmp_path_factory, records, width, zipped, windows):
    text = fasta(records, width)
    path = tmp_path_factory.mktemp("fasta") / ("genome.fna.gz" if zipped else "genome.fna")
    found = list(read_genome(write(path, text.replace("\n", "\r\n") if windows else text)))
    assert {record.name: letters_of(record.bases) for record in found} == {n: plain(s) for n, s in records.items()}
    assert all(record.bases.dtype == np.uint8 and record.coding is None for record in found)


def test_a_line_longer_than_a_block_is_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(numbered, "BLOCK", 16)
    letters = random_letters(1000)
    path = write(tmp_path / "long.fa", f">one\n{letters}\n>two\nAC-GT\n")
    records = read_genome(path)
    assert letters_of(next(records).bases) == letters
    with pytest.raises(ConfigError, match=r"long.fa, line 4: '-' in record 'two' is no base; give nucleotides"):
        next(records)


@settings(deadline=None, max_examples=30)
@given(st.data(), st.text("ACGTN", min_size=3, max_size=150))
def test_genbank_that_is_written_is_read_with_its_coding_bases(tmp_path_factory, data, letters):
    bounds = st.integers(1, len(letters))
    spans = data.draw(st.lists(st.tuples(bounds, bounds).map(sorted), min_size=2, max_size=6))
    parts = [f"{'<' * (a == 1)}{a}..{'>' * (b == len(letters))}{b}" for a, b in spans]
    locations = [f"complement(join({parts[0]},\n{parts[1]}))", *parts[2:]]
    path = tmp_path_factory.mktemp("genbank") / "genome.gbk"
    (record,) = read_genome(write(path, genbank("X1", letters, locations)))
    assert (record.name, letters_of(record.bases)) == ("X1.1", letters)
    covered = [any(a <= place <= b for a, b in spans) for place in range(1, len(letters) + 1)]
    expected = [IGNORED_LABEL if base == "N" else int(is_in) for base, is_in in zip(letters, covered, strict=True)]
    assert labels_of(record.bases, record.coding).tolist() == expected


@pytest.mark.skipif(not CONTIGS.exists(), reason="the annotated contigs are not at hand")
def test_real_contigs_are_read_as_biopython_reads_them():
    from Bio import SeqIO

    with gzip.open(CONTIGS, "rt") as file:
        for ours, theirs in zip(read_genome(CONTIGS), SeqIO.parse(file, "genbank"), strict=True):
            assert (ours.name, letters_of(ours.bases)) == (theirs.id, plain(str(theirs.seq)))
            labels = np.zeros(len(ours.bases), np.uint8)
            for feature in theirs.features:
                for part in feature.location.parts if feature.type == "CDS" else ():
                    labels[int(part.start) : int(part.end)] = 1
            labels[ours.bases == 4] = IGNORED_LABEL
            np.testing.assert_array_equal(labels_of(ours.bases, ours.coding), labels)


@pytest.mark.parametrize(
    ("location", "spans"),
    [
        ("7", [(6, 7)]),
        ("complement(3..9)", [(2, 9)]),
        ("join(complement(1..2),<5..>6)", [(0, 2), (4, 6)]),
        ("order(1..2, join(4..5,8))", [(0, 2), (3, 5), (7, 8)]),
    ],
)
def test_locations(location, spans):
    assert [(start, stop) for start, stop, _ in spans_of_location(location, 1)] == spans


TWO = {"one": "ACGT", "two": "TTTT"}
CODING = genbank("A", random_letters(30), ["3..8"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"bad is empty, without any record; leave it out"),
        ("ACGT\n", r"bad, line 1: begins with 'ACGT', but FASTA with a header, '>NAME', and GenBank with LOCUS"),
        (">\nACGT\n", r"bad, line 1: has no name behind '>'; give each record"),
        (">one\n\n>two\nAC\n", r"bad, line 1: record 'one' has no bases; leave it out"),
        (fasta(TWO) + ">one\nAC\n", r"bad, line 5: record 'one' is there twice, first in .*bad, line 1; leave one out"),
        (">one\nACGT\nAXGT\n", r"bad, line 3: 'X' in record 'one' is no base; give nucleotides, as A, C, G, T, N"),
        (CODING.replace("//\n", ""), r"bad, line 1: record 'A.1' does not end with //: the file is truncated; copy"),
        (CODING.replace("//\n", "") + CODING, r"bad, line 11: a record begins, but record 'A.1' has not ended with //"),
        (CODING + "x\n", r"bad, line 12: is outside of any record; each begins with LOCUS, and ends with //"),
        (CODING.replace(" 30 bp", " 40 bp"), r"bad, line 1: record 'A.1' says 40 bp, but has 30 bases; the file is"),
        (CODING.replace(" 30 bp", " 30 aa"), r"bad, line 1: LOCUS has no name, or is that of a protein; give"),
        (CODING.replace("3..8", "3..31"), r"line 6: a CDS of record 'A.1' goes from 3 to 31, but the record has 30 ba"),
        (
            CODING.replace("3..8", "8..3"),
            r"line 6: a CDS of record 'A.1' has a location with '8..3' in it; give places",
        ),
        (CODING.replace("3..8", "J00.1:3..8"), r"location with 'J00.1:3..8' in it; give places in this record, as in"),
        (re.sub("ORIGIN.*//", "CONTIG      join(B:1..30)\n//", CODING, flags=re.DOTALL), r"'A.1' has no bases; leave"),
    ],
)
def test_what_is_malformed_is_named_with_its_record_and_line(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        list(read_genome(write(tmp_path / "bad", text)))


def test_half_a_gzip_file_and_no_file_are_refused(tmp_path):
    whole = gzip.compress(fasta({"one": random_letters(5000)}).encode())
    (tmp_path / "half").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=r"half, line \d+: is no whole gzip file \(Compressed file ended before"):
        list(read_genome(tmp_path / "half"))
    with pytest.raises(ConfigError, match=r"none cannot be read \(No such file or directory\); make it readable"):
        list(read_genome(tmp_path / "none"))


def gff_line(record="one", kind="CDS", start=2, stop=5, attributes="ID=x"):
    return f"{record}\tsource\t{kind}\t{start}\t{stop}\t.\t+\t0\t{attributes}\n"


def test_gff_beside_fasta(tmp_path):
    """Its names are escaped, only coding sequences count, and those of a circular record go on at its start."""
    lines = ["##gff-version 3\n", "# a comment\n", gff_line("a%7Cb"), gff_line("a%7Cb", "gene", 1, 10)]
    lines += [gff_line("ring", "region", 1, 10, "ID=r;Is_circular=true"), gff_line("ring", start=9, stop=12)]
    gff = read_gff(write(tmp_path / "genes.gff.gz", "".join([*lines, "##FASTA\n", ">not\tlooked at\n"])))
    assert [span[:2] for span in annotated("a|b", 10, [gff])] == [(1, 5)]
    assert [span[:2] for span in annotated("ring", 10, [gff])] == [(8, 10), (0, 2)]
    assert annotated("without genes", 10, [gff]) == []
    labels = labels_of(np.array([0, 1, 4, 2, 3, 3], np.uint8), annotated("a|b", 6, [gff]))
    assert labels.tolist() == [0, 1, IGNORED_LABEL, 1, 1, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# nothing\n", r"bad.gff has no feature of type CDS; give a GFF3 file with coding sequences in it"),
        ("\none two\n", r"bad.gff, line 2: has 1 columns, but a line of GFF3 has 9, with tabs between; repair it"),
        (gff_line(start=5, stop=2), r"line 1: a CDS of record 'one' from '5' to '2'; give its first and its last base"),
        (gff_line(start="x"), r"line 1: a CDS of record 'one' from 'x' to '5'; give its first and its last base, coun"),
        (
            gff_line(stop=11),
            r"line 1: a CDS of record 'one' goes from 2 to 11, but the record has 10 bases; give the an",
        ),
        (
            gff_line("three"),
            r"bad.gff, line 1: annotates record 'three', which no FASTA file has \(they have 'one', 'tw",
        ),
    ],
)
def test_malformed_annotation_is_named_with_its_line(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        gff = read_gff(write(tmp_path / "bad.gff", text))
        check_known([gff], {"one": 1, "two": 2})
        annotated("one", 10, [gff])


def test_the_tokenizer_of_bases():
    text = BaseText()
    assert text.tokens_of(b"ACGTNacgtuRv").tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 3, 4, 4]
    assert b"".join(map(text.bytes_of, range(text.vocab))) == b"ACGTN"
    with pytest.raises(ConfigError, match=r"'E' is no base; write A, C, G and T, and N or another letter of IUPAC"):
        text.tokens_of(b"ACE")


@settings(deadline=None, max_examples=50)
@given(st.lists(st.text("ACGTN", min_size=1, max_size=9), min_size=1, max_size=4), st.data())
def test_the_other_strand_is_the_reverse_complement(documents, data):
    letters = "".join(documents)
    tokens = BaseText().tokens_of(letters.encode()).astype(np.uint8)
    labels = np.arange(len(letters), dtype=np.uint8)
    ends = np.cumsum([len(one) for one in documents])
    other = other_strand(Stream(tokens, Packing(ends), labels))
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, len(letters))] * 2)))
    assert letters_of(other.tokens[start:stop]) == reverse_complement(letters)[start:stop]
    assert other.labels[start:stop].tolist() == labels[::-1][start:stop].tolist()
    expected = np.concatenate([np.full(len(one), number) for number, one in enumerate(reversed(documents))])
    starts = np.append(0, np.cumsum([len(one) for one in reversed(documents)]))
    bounds = other.documents.bounds(np.arange(len(letters)))
    np.testing.assert_array_equal(bounds[0], starts[expected])
    np.testing.assert_array_equal(np.minimum(bounds[1], len(letters)), starts[expected + 1])
    twice = other_strand(other)
    assert letters_of(twice.tokens[0 : len(letters)]) == letters
