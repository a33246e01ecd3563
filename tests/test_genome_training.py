"""Genomes as training data: splits of whole records, either strand, what each device reads, runs that resume."""

import contextlib
import gzip
import itertools
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from genome_files import fasta, genbank, random_letters, reverse_complement, write
from helpers import change, mesh_of, run, sampled, small_config

from lss_jax.config.schema import ConfigError
from lss_jax.data.annotation import labels_of, spans_of_location
from lss_jax.data.batch import IGNORED
from lss_jax.data.genome_splits import open_genomes
from lss_jax.data.kinds import check_files
from lss_jax.generation.generate import generate_text
from lss_jax.reports.by_position import evaluate_by_position
from lss_jax.storage.metrics import read_records
from lss_jax.tasks import make_task
from lss_jax.training.setup import validate
from lss_jax.training.trainer import Trainer

MASK = 5  # the token behind the vocabulary of bases
L = 45  # which 2, 4 and 8 do not divide
TASKS = {
    "language_model": {"model__vocab": 5},
    "masked_language_model": {"model__vocab": 6, "model__family": "encoder"},
    "token_labels": {"model__vocab": 5, "model__family": "encoder", "model__classes": 2},
}
RECORDS = [random_letters(size, seed=size, letters="ACGTACGTACGTN") for size in (400, 130, 271, 180, 30, 33)]
CODING = ["10..60", "complement(20..120)", "join(1..9,30..90)", "50..150", "3..9", "1..10"]


@pytest.fixture(scope="module")
def genomes(tmp_path_factory):
    """Four contigs to train on, and a file held out for each other split."""
    folder, records = tmp_path_factory.mktemp("genomes"), list(zip(RECORDS, CODING, strict=True))
    files = {"path": range(4), "valid_path": [4], "test_path": [5]}
    for key, numbers in files.items():
        text = "".join(genbank(f"contig{n}", records[n][0], [records[n][1]]) for n in numbers)
        write(folder / f"{key}.gbk.gz", text)
    return {f"data__{key}": str(folder / f"{key}.gbk.gz") for key in files}


def config_of(genomes, task="language_model", **changes):
    keys = {"task": task, "data__source": "fasta", "data__tokenizer": "bases", "data__seq_len": L}
    return small_config(**keys, **TASKS[task], **genomes, data__reverse_complement=True, **changes)


def strands():
    """The letters of the training data on each strand, with the number of its contig and the label of each base."""
    letters, contig = "".join(RECORDS[:4]), np.repeat(np.arange(4), [len(r) for r in RECORDS[:4]])
    bases = [np.array(["ACGTN".index(letter) for letter in record]) for record in RECORDS[:4]]
    labels = np.concatenate([labels_of(b, spans_of_location(c, 0)) for b, c in zip(bases, CODING, strict=False)])
    other = reverse_complement(letters)
    return [(letters, contig, labels), (other, contig[::-1], labels[::-1])]


def row_of(strand, start, task):
    """What a window of a strand is to be: tokens, targets and the bounds of its contigs, in natural order."""
    letters, contig, label = strand
    token = np.array(["ACGTN".index(letter) for letter in letters])
    places = np.arange(start, start + L)
    if task == "token_labels":
        target = np.where(label[places] == 255, IGNORED, label[places].astype(int))
    else:  # of a masked language model, those of the tokens that are hidden
        places = places + (task == "language_model")
        target = np.where(places < len(token), token[np.minimum(places, len(token) - 1)], IGNORED)
        begins = np.append(True, contig[1:] != contig[:-1])[np.minimum(places, len(token) - 1)]
        target[(target == 4) | (begins & (task == "language_model"))] = IGNORED
    places = np.arange(start, start + L)
    bounds = [
        (np.flatnonzero(contig == contig[at]).min(), np.flatnonzero(contig == contig[at]).max() + 1) for at in places
    ]
    return token[places], target, np.clip(np.array(bounds).T - start, 0, L)


def rows_of(batch):
    """The rows of a batch, each as `row_of`."""
    order = np.argsort(batch.positions)[:L]
    arrays = (np.asarray(array)[..., order] for array in (batch.tokens, batch.targets, batch.documents))
    return list(zip(*(np.moveaxis(array, -2, 0) for array in arrays), strict=True))


def which_window(found, task):
    """The strand and the start of the window that a row is, none but one."""
    tokens, targets, bounds = found
    matches = []
    for number, strand in enumerate(strands()):
        for start in range(len(strand[0]) - L + 1):
            letters = np.array(["ACGTN".index(letter) for letter in strand[0][start : start + L]])
            shown = tokens != MASK if task == "masked_language_model" else np.full(L, True)
            if np.mean(letters[shown] == tokens[shown]) > 0.9:  # a few are random ones
                matches.append((number, start))
    ((number, start),) = matches
    expected = row_of(strands()[number], start, task)
    if task == "masked_language_model":
        is_target = targets != IGNORED
        np.testing.assert_array_equal(targets[is_target], expected[1][is_target])
        is_shown = ~is_target & (expected[0] < 4)  # an unknown base may be hidden, and is still no target
        np.testing.assert_array_equal(tokens[is_shown], expected[0][is_shown])
        assert 0 < is_target.mean() < 0.5
    else:
        np.testing.assert_array_equal(tokens, expected[0])
        np.testing.assert_array_equal(targets, expected[1])
    np.testing.assert_array_equal(bounds, expected[2])
    return number, start


@pytest.mark.parametrize("task", TASKS)
def test_training_windows_lie_on_either_strand(genomes, task):
    config = config_of(genomes, task)
    split = make_task(config).splits(mesh_of(1, 1))["train"]
    found = [which_window(row, task) for step in range(3) for row in rows_of(split.training_batch(step))]
    windows = (sum(map(len, RECORDS[:4])) - (task == "language_model")) // L
    length = sum(map(len, RECORDS[:4]))
    forward = [start if strand == 0 else length - L - start for strand, start in found]
    assert sorted(forward[:windows]) == [L * n for n in range(windows)], "an epoch has each window once, on one strand"
    assert 4 <= sum(strand for strand, _ in found) <= len(found) - 4
    for other in (change(config, seed=1), config):
        again = make_task(other).splits(mesh_of(1, 1))["train"].training_batch(1)
        same = [which_window(row, task)[0] for row in rows_of(again)] == [strand for strand, _ in found[8:16]]
        assert same == (other is config), "which strand is a function of the seed and the step"


MESHES = [(1, 1), (2, 4), (1, 3), (8, 1), (1, 8)]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("mesh", sampled(MESHES, [(2, 4), (1, 3)]))
def test_batches_are_the_same_on_every_mesh(genomes, task, layout, mesh):
    config = config_of(genomes, task, attention__layout=layout)
    splits, others = make_task(config).splits(mesh_of(1, 1)), make_task(config).splits(mesh_of(*mesh))
    batches = [(s["train"].training_batch(5), s["valid"].evaluation_batch(0)) for s in (splits, others)]
    for one, other in zip(*batches, strict=True):
        for a, b in zip(rows_of(one), rows_of(other), strict=True):
            jax.tree.map(np.testing.assert_array_equal, a, b)


@contextlib.contextmanager
def noted_reads():
    """The ranges of the audit event `lss_jax.read`, as they are read."""
    reads, noting = [], [True]
    sys.addaudithook(lambda event, values: reads.append(values) if event == "lss_jax.read" and noting[0] else None)
    yield reads
    noting[0] = False  # a hook stays for good


def test_a_device_reads_its_own_segments_of_either_strand(genomes):
    config, letters = config_of(genomes, data__batch_size=2, attention__layout="contiguous"), "".join(RECORDS[:4])
    split, turned = make_task(change(config, data__seq_len=48)).splits(mesh_of(1, 4))["train"], set()
    for step in range(6):
        with noted_reads() as reads:
            batch = split.training_batch(step)
        assert len(reads) == 8 and {stop - start for start, stop in reads} <= {12, 13}, "a segment, and a base more"
        segments = np.asarray(batch.tokens).reshape(8, 12).tolist()
        for start, stop in reads:
            either = [read[:12] for read in (letters[start:stop], reverse_complement(letters[start:stop]))]
            is_there = [[["ACGTN".index(letter) for letter in read] in segments] for read in either]
            assert sorted(is_there) == [[False], [True]], "on one of the strands"
            turned.add(is_there.index([True]))
    assert turned == {0, 1}


RUN = {"log_every": 2, "eval_every": 4, "eval_batches": 1, "checkpoint_every": 3, "optim__steps": 6}


def test_a_run_goes_on_with_the_same_files_alone(genomes, tmp_path):
    """Not with another genome, nor with other annotation, be it of what is held out."""
    texts = {key: gzip.decompress(Path(path).read_bytes()).decode() for key, path in genomes.items()}
    copies = {key: str(write(tmp_path / f"{key}.gbk", text)) for key, text in texts.items()}
    config, devices = config_of(copies, mesh__seq=2, model__layers=1, **RUN), jax.devices()[:2]
    run(config, tmp_path / "run", stop_after=2, devices=devices)
    for key, text in texts.items():
        write(Path(copies[key]), re.sub(r"(CDS +)\S+", r"\g<1>1..30", text, count=1))
        with pytest.raises(ConfigError, match=r"but the run in .* was trained on \d+ bytes with .*; put the file back"):
            Trainer(config, tmp_path / "run", devices)
        write(Path(copies[key]), text)
    assert Trainer(config, tmp_path / "run", devices).step == 2


@pytest.mark.grid
@pytest.mark.parametrize("task", TASKS)
def test_runs_are_equal_on_meshes_and_when_they_resume(genomes, task, tmp_path):
    config, curves = config_of(genomes, task, model__layers=1, **RUN), []
    for data, seq in [(1, 1), (2, 4), (1, 3)]:
        workdir = tmp_path / f"{data}x{seq}"
        state = run(change(config, mesh__data=data, mesh__seq=seq), workdir, devices=jax.devices()[: data * seq])
        records = read_records(workdir / "metrics.jsonl")
        curves.append([record["loss"] for record in records])
        assert {"language_model": "bits_per_base", "token_labels": "dice_coding"}.get(
            task, "bits_per_token"
        ) in records[0]
    for other in curves[1:]:
        np.testing.assert_allclose(other, curves[0], rtol=1e-5)
    config, last = change(config, mesh__data=1, mesh__seq=3), jax.devices()[:3]
    run(config, tmp_path / "parts", stop_after=2, devices=last)
    jax.tree.map(np.testing.assert_array_equal, run(config, tmp_path / "parts", devices=last), state)


@pytest.mark.grid
def test_a_model_of_bases_is_evaluated_by_position_and_continues_a_prompt(genomes, tmp_path):
    config = config_of(genomes, mesh__seq=4, **RUN)
    run(config, tmp_path)
    result = evaluate_by_position(config, tmp_path, "test", [16, L], None)
    assert [window["bases"] for window in result["windows"]] == [sum(c != "N" for c in RECORDS[5][1:])] * 2
    assert all("bits_per_base" in one for window in result["windows"] for one in window["bins"])
    text = generate_text(tmp_path, "acgt", tokens=12)
    assert text[:4] == "acgt" and len(text) == 16 and set(text[4:]) <= set("ACGTN")
    with pytest.raises(ConfigError, match=r"the prompt: '!' is no base; write A, C, G and T, and N or another letter"):
        generate_text(tmp_path, "ACG!")


def contigs(count, seed=0):
    sizes = np.random.default_rng(seed).integers(50, 400, count)
    return {f"c{number}": random_letters(size, seed=number) for number, size in enumerate(sizes)}


def letters_by_split(path, **changes):
    config = small_config(data__source="fasta", data__tokenizer="bases", data__path=str(path), **changes)
    found = {}
    for split, streams in open_genomes(config.data).items():
        records = []
        for tokens, documents, _ in streams:
            bounds = [documents[number] for number in range(len(documents))]
            records += ["".join("ACGTN"[base] for base in tokens[start:stop]) for start, stop in bounds]
        found[split] = records
    return found


def test_records_are_dealt_whole_by_the_hash_of_their_bases(tmp_path):
    records = contigs(120)
    found = letters_by_split(write(tmp_path / "a.fa", fasta(records)))
    assert sorted(itertools.chain.from_iterable(found.values())) == sorted(records.values()), "each whole, in one split"
    sizes = {split: sum(map(len, of_split)) for split, of_split in found.items()}
    total = sum(sizes.values())
    assert all(0.03 * total < sizes[split] <= 0.05 * total for split in ("valid", "test"))
    assert found["train"] == [letters for letters in records.values() if letters in found["train"]], "in their order"
    renamed = {f"x{n}": letters for n, letters in enumerate(reversed(records.values()))}
    again = letters_by_split(write(tmp_path / "b.fa", fasta(renamed)))
    assert {split: sorted(of_split) for split, of_split in again.items()} == {s: sorted(r) for s, r in found.items()}


def test_equal_records_are_in_one_split(tmp_path):
    records = contigs(60)
    twice = records | {f"{name}again": letters for name, letters in records.items()}
    found = letters_by_split(write(tmp_path / "a.fa", fasta(twice)))
    for split, others in (("valid", "test"), ("train", "valid"), ("test", "train")):
        assert found[split] and not set(found[split]) & set(found[others])


def gff_of(*records):
    return "".join(f"{record}\tx\tCDS\t1\t9\t.\t+\t0\tID=1\n" for record in records)


def test_what_cannot_be_split_or_annotated_is_refused(tmp_path):
    one, two = (
        write(tmp_path / "one.fa", fasta({"a": "ACGT" * 30})),
        write(tmp_path / "two.fa", fasta({"b": "AC" * 40})),
    )
    tiny, same = write(tmp_path / "tiny.fa", fasta({"t": "A"})), write(tmp_path / "same.fa", fasta({"a": "AC" * 9}))
    gff, other = write(tmp_path / "a.gff", gff_of("a")), write(tmp_path / "z.gff", gff_of("a", "z"))
    held = {"data__valid_path": str(two), "data__test_path": str(same)}
    cases = [
        (
            {},
            r"one.fa': of 1 different records, 120 bases, too few are short enough to be held out whole .*; name files",
        ),
        (
            {**held, "data__test_path": str(two)},
            r"test_path='.*two.fa' has .*two.fa, which data.valid_path='.*' has too",
        ),
        (
            {**held, "data__test_path": str(tiny)},
            r"the split 'test' has a source of a single base, with none to predict",
        ),
        (
            {**held, "data__seq_len": 120},
            r"data.path='.*one.fa': 120 bases for training, but one window .* 1 = 121; give",
        ),
        (
            {**held, "data__annotation": str(gff)},
            r"same.fa, line 1: record 'a' is in .*one.fa, line 1 too, and data.anno",
        ),
        (
            {**held, "data__test_path": str(tiny), "data__annotation": str(other)},
            r"z.gff, line 2: annotates record 'z', which no FASTA file has \(they have 'a', 'b', 't'\); give its file",
        ),
    ]
    for changes, message in cases:
        with pytest.raises(ConfigError, match=message):
            letters_by_split(one, **changes)


def test_files_that_are_not_there_are_named_before_anything_is_read(tmp_path):
    missing = {
        "data__valid_path": str(tmp_path / "v.fa"),
        "data__test_path": str(tmp_path),
        "data__annotation": "no.gff",
    }
    config = small_config(data__source="fasta", data__tokenizer="bases", data__path="nowhere.fa", **missing)
    with pytest.raises(ConfigError) as error:
        check_files(config.data)
    lines = str(error.value).split("\n")
    keys = ["data.path", "data.valid_path", "data.test_path", "data.annotation"]
    assert [line.split(":")[0] for line in lines] == keys
    assert "folders with .fasta, .fa, .fna, .gb, .gbk, .gbff files in them" in lines[2]


def test_labels_come_from_annotation_beside_fasta(tmp_path):
    files = [write(tmp_path / f"{name}.fa", fasta({name: random_letters(60 + n)})) for n, name in enumerate("abc")]
    gff = write(tmp_path / "genes.gff", gff_of("a", "c"))
    paths = dict(zip(("data__path", "data__valid_path", "data__test_path"), map(str, files), strict=True))
    streams = open_genomes(config_of(paths, data__annotation=str(gff)).data)
    assert [np.flatnonzero(streams[s][0].labels[0:60]).tolist() for s in streams] == [[*range(9)], [], [*range(9)]]
    with pytest.raises(
        ConfigError, match=r"bases of the split 'train' have no labels, which task='token_labels' needs"
    ):
        make_task(config_of(paths, "token_labels")).splits(mesh_of(1, 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data__tokenizer": "bytes"},
            r"is read base by base, not with data.tokenizer='bytes'; use data.tokenizer=\"bas",
        ),
        (
            {"data__test_path": ""},
            r"data.test_path='' go together; name both, or none, and parts of data.path are held out",
        ),
        ({"data__path": ""}, r"data.source=\"fasta\" needs genomes; give data.path, files of FASTA or GenBank"),
        ({"data__annotation": "a.gff,"}, r"data.annotation='a.gff,' has an empty part between commas; give a file"),
        (
            {"data__separator": "x"},
            r"data.separator='x' has no use with data.source=\"fasta\", whose documents are reco",
        ),
        (
            {"data__source": "text"},
            r"data.tokenizer=\"bases\" is for data.source=\"fasta\", and has no use with 'text'",
        ),
        (
            {"data__source": "text"},
            r"data.reverse_complement=True is for data.source=\"fasta\", and has no use with 't",
        ),
        ({"model__vocab": 4}, r"model.vocab=4 is less than 5, which data of bases needs; use model.vocab=5"),
    ],
)
def test_configs_that_make_no_sense(genomes, changes, message):
    with pytest.raises(ConfigError, match=message):
        validate(change(config_of(genomes), **changes), 8)
