"""Reports: what the page of a run says, that it fetches nothing, and which runs are not compared."""

import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
from html.parser import HTMLParser
from pathlib import Path

import jax
import pytest
from helpers import TEXT, change, small_config

from lss_jax import report
from lss_jax.config.schema import ConfigError
from lss_jax.reports.runs import caveats, check_comparable, read_runs
from lss_jax.storage.metrics import add_record, read_records
from lss_jax.storage.workdir import keep_config
from lss_jax.training.trainer import Trainer

ROOT = Path(__file__).parents[1]
ODD = "_<b>&$2"  # the name of a run that HTML, Matplotlib or TeX could take for something else
VOID = {"meta", "link", "path", "use", "rect"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs whose checkpoints and configs are real, and their metrics written by hand: one skips updates."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "text").write_bytes(TEXT)
    config = small_config(
        mesh__data=1, mesh__seq=4, data__source="text", data__path=str(folder / "text"), model__layers=1
    )
    trainer = Trainer(config, folder / "one", jax.devices()[:4])
    trainer.save()
    trainer.close()
    shutil.copytree(folder / "one", folder / ODD)
    keep_config(change(config, optim__learning_rate=1e-4, eval_batches=8), folder / ODD)
    write_metrics(folder / "one", skipped_at=20)
    write_metrics(folder / ODD, skipped_at=None)
    window = {"length": 4, "loss": 2.0, "bits_per_byte": 2.5, "bytes": 9}
    bins = [
        {"before": [a, b], "loss": 2.0, "bits_per_byte": 3.0 - b / 8, "bytes": 3} for a, b in ((1, 1), (2, 2), (3, 4))
    ]
    result = {"step": 40, "split": "valid", "windows": [{**window, "bins": bins}]}
    (folder / "one" / "by_position_valid.json").write_text(json.dumps(result))
    return folder


def write_metrics(workdir, skipped_at):
    for step in range(10, 50, 10):
        lost = step == skipped_at
        loss = math.inf if lost else 5 - step / 20
        record = {"step": step, "split": "train", "loss": loss, "bits_per_byte": loss / math.log(2)}
        record |= {"learning_rate": 1e-3, "grad_norm": math.inf if lost else 1.0, "tokens_per_second": 100.0 + step}
        add_record(
            workdir, record | {"step_seconds": 0.5, "skipped": int(skipped_at is not None and step >= skipped_at)}
        )
    add_record(workdir, {"step": 40, "split": "valid", "loss": 3.0, "bits_per_byte": 4.3281})


class Page(HTMLParser):
    """What matters of a page: that tags are closed, tables, figures, words, and what it would fetch."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tables, self.pictures, self.words, self.fetched = [], {}, [], [], []
        self.feed(text)
        assert self.open == [], "every tag is closed"
        self.fetched += re.findall(r"url\((?!#)[^)]*\)|@import[^;]*", text)
        self.words = " ".join(self.words)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "svg":
            assert attributes["role"] == "img"
            self.pictures.append(attributes["aria-label"])
        if tag == "table":
            self.rows = []
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th", "caption"):
            self.cell = ""
        assert not any(name.startswith("on") for name in attributes) and tag not in ("script", "iframe", "object")
        for name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
            if name in attributes and not attributes[name].startswith(("#", "data:")):
                self.fetched.append(attributes[name])

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        assert self.open.pop() == tag
        if tag == "caption":
            self.tables[self.cell] = self.rows
        if tag in ("td", "th"):
            self.rows[-1].append(self.cell)

    def handle_data(self, data):
        self.words.append(data)
        if self.open and self.open[-1] in ("td", "th", "caption"):
            self.cell += data

    def rows_of(self, caption):
        return {row[0]: row[1:] for row in self.tables[caption]}


def page_of(*workdirs, audits=None):
    found = read_runs(workdirs)
    check_comparable(found)
    return Page(report.report(found, audits or ["no devices"] * len(found)))


def test_the_page_of_a_run_says_what_its_files_say(runs):
    (run,) = read_runs([runs / "one"])
    page = page_of(runs / "one", audits=[report.compiled(run.config)])
    assert page.fetched == []
    numbers = page.rows_of("Final numbers")
    assert numbers["steps"] == ["40 of 20"] and numbers["valid, bits per byte"] == ["4.3281"]
    assert numbers["tokens per second, median"] == ["125"] and numbers["updates skipped"] == ["1"]
    assert "Compiled for 4 cpu, mesh data=1 x seq=4 x model=1. As predicted." in page.words
    memory = page.rows_of("Memory per device; predicted temporaries are an upper bound")
    assert memory["parameters"][0] == memory["parameters"][1] != "-"
    collectives = page.tables["Collectives per step; MB are of their results on one device"]
    (gather,) = [row for row in collectives if row[:3] == ["attention forward", "all-gather", "seq"]]
    assert gather[3] == gather[5] == "1" and gather[4] == gather[6]
    assert page.rows_of("All config keys")["optim.learning_rate"] == ["0.003"]
    by_position = page.rows_of("Bits per byte of the valid split by how many bytes came before in the window")
    assert by_position["3-4"] == ["2.5000"] and by_position["at step"] == ["40"]
    assert "Training and validation loss. Updates skipped, up to the dotted lines: 1 by step 20." in page.pictures
    assert len(page.pictures) == 5


def test_runs_side_by_side_with_names_that_must_be_escaped(runs):
    page = page_of(runs / "one", runs / ODD)
    assert page.fetched == []
    assert page.tables["Final numbers"][0] == ["", "one", ODD]
    differing = page.rows_of("Config keys that differ")
    assert differing == {
        "key": ["one", ODD],
        "optim.learning_rate": ["0.003", "0.0001"],
        "eval_batches": ["16", "8"],
    }
    assert page.words.count(ODD) > 5, "in legends, too"
    assert f"Validation is over the first 3,072 bytes in {ODD}, 6,144 in one." in page.words
    assert page.words.count("Not compiled, since it cannot be on the devices at hand: no devices") == 2


def test_a_mesh_that_does_not_fit_is_told_on_the_page(runs):
    (run,) = read_runs([runs / "one"])
    reason = report.compiled(change(run.config, mesh__data=16))
    assert "mesh.data=16, mesh.seq=4, mesh.model=1 needs 64 devices, but 8 are found" in reason
    assert reason in page_of(runs / "one", audits=[reason]).words


def test_the_command_writes_one_file_or_one_line(runs, tmp_path):
    done = command("--workdir", runs / "one", "--out", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"wrote {tmp_path}/page.html\n"
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]
    assert Page((tmp_path / "page.html").read_text()).fetched == []
    failed = command("--workdir", tmp_path)
    assert failed.returncode == 2 and failed.stdout == ""
    assert failed.stderr.startswith(f"error: {tmp_path}/config.json cannot be read (No such file or directory); give")
    assert failed.stderr.count("\n") == 1


def command(*arguments):
    call = [sys.executable, "-m", "lss_jax.report", *map(str, arguments)]
    return subprocess.run(call, cwd=ROOT, capture_output=True, text=True)


def test_runs_on_other_data_are_not_compared(runs, tmp_path):
    """By the data's fingerprint, wherever the file lies; and by its place where there is no checkpoint."""
    (one,) = read_runs([runs / "one"])
    moved = one._replace(config=change(one.config, data__path="elsewhere"))
    check_comparable([one, moved])
    other = one._replace(workdir=Path("other"), data={"bytes": 5000, "sha256": "f" * 64})
    message = (
        r"--compare: other was trained on text '.*text' \(5,000 bytes, fingerprint ffffffffffff\), but .*; give runs on"
    )
    with pytest.raises(ConfigError, match=message):
        check_comparable([one, other])
    with pytest.raises(ConfigError, match=r"--compare: .* was trained on text 'elsewhere', but "):
        check_comparable([one, moved._replace(data=None)])
    packed = one._replace(name="packed", config=change(one.config, data__separator="a"))
    assert caveats([one, packed]) == ["By attention.prefix or data.separator packed predicts other bytes than one."]


def test_bad_workdirs_are_one_error(runs, tmp_path):
    with pytest.raises(ConfigError, match="--compare: a run is given twice; compare different runs"):
        read_runs([runs / "one", runs / ODD / ".." / "one"])
    (one,) = read_runs([runs / "one"])
    keep_config(one.config, tmp_path)
    metrics = tmp_path / "metrics.jsonl"
    with pytest.raises(
        ConfigError, match=r"metrics.jsonl cannot be read \(No such file or directory\); give the folder"
    ):
        read_runs([tmp_path])
    whole = (runs / "one" / "metrics.jsonl").read_text()
    metrics.write_text(whole + '{"step": 50, "sp')  # as a killed run leaves it
    (run,) = read_runs([tmp_path])
    assert len(run.records) == len(read_records(runs / "one" / "metrics.jsonl")) and run.data is None
    for damage in ("nothing\n", "[1]\n", '{"step": 1, "split": "train", "loss": 1}\n', "\xff\n"):
        metrics.write_bytes(whole.encode() + damage.encode("latin1") + whole.encode())
        with pytest.raises(ConfigError, match=r"metrics.jsonl: line 6 is damaged; put the file back from a copy, or"):
            read_runs([tmp_path])
    metrics.write_text("")
    with pytest.raises(ConfigError, match=r"metrics.jsonl has no metrics yet; train there for log_every steps first"):
        read_runs([tmp_path])
    metrics.write_text(whole)
    for damage in ("", "[]", '{"step": 1, "split": "valid", "windows": [{}]}'):
        (tmp_path / "by_position_valid.json").write_text(damage)
        with pytest.raises(ConfigError, match=r"by_position_valid.json is damaged; evaluate again with --by-position"):
            read_runs([tmp_path])


def test_training_does_not_import_matplotlib():
    code = "import sys, lss_jax.train, lss_jax.evaluate; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def shown(page, folder):
    """The document in Chromium, its console, and what it asked for (the browser itself asks for more)."""
    with tempfile.TemporaryDirectory() as profile:
        done = subprocess.run(
            [
                *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
                *(f"--user-data-dir={profile}", f"--log-net-log={folder}/net.json", "--enable-logging=stderr"),
                *("--virtual-time-budget=2000", "--dump-dom", f"file://{page}"),
            ],
            capture_output=True,
            text=True,
            timeout=120,
        )
    asked = [event.get("params", {}) for event in json.loads((folder / "net.json").read_text())["events"]]
    of_page = {each["url"] for each in asked if each.get("initiator", "not an origin") != "not an origin"}
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line], of_page


@pytest.mark.grid
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium; what the page would fetch is also tested without")
def test_a_browser_shows_the_page_and_asks_nobody(runs, tmp_path):
    page = tmp_path / "page.html"
    page.write_text(report.report(read_runs([runs / "one", runs / ODD]), ["none"] * 2))
    document, console, asked = shown(page, tmp_path)
    assert document.count("<svg") == 6 and "Config keys that differ" in document
    assert (console, asked) == ([], set())
    page.write_text('<img src="http://example.invalid/a"><script>console.log(1)</script>')
    _, console, asked = shown(page, tmp_path)
    assert len(console) == 1 and asked == {"http://example.invalid/a"}, "they would be seen"
