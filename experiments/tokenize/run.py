"""The speed and the peak memory of encoding, for texts of 100 MB and of 1 GB.

    python -m experiments.tokenize.run

Texts are generated: words of random letters, frequent and rare as in natural language (Zipf), in sentences, lines and
paragraphs; once as one document in one file, once as JSONL with a document per line. They are written as they are
generated, into a temporary folder that is removed in the end (about 3 GB). A tokenizer is trained on the first of them,
with the command that a user calls; each text is encoded with it in a process of its own, whose peak memory the system
reports.

The claims: the speed and the peak memory are the same for 1 GB as for 100 MB, in one document or in many. Takes about
12 minutes on two cores (`--tiny`: seconds, as a trial, and writes nothing). Writes `results.json` and `results.md`
beside this file.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lss_jax.data.token_file import TokenFile

SIZES = (10**8, 10**9)  # bytes of text
VOCAB = 16_384
WORDS = 100_000
LETTERS = "etaoinshrdlucmfwypvbgkjqxz"
TRAINED_ON = 10**7  # bytes
HERE = Path(__file__).parent
MIB = 2**20


def paragraphs(seed: int = 0) -> Iterator[str]:
    """Text without end, the same each time, in paragraphs of about 2,000 bytes."""
    random = np.random.default_rng(seed)
    letters = random.geometric(0.12, (WORDS, 12)) % len(LETTERS)
    lengths = random.poisson(5, WORDS) % 12 + 1
    spelled = ["".join(LETTERS[i] for i in row[:length]) for row, length in zip(letters, lengths, strict=True)]
    words = np.array([word.title() if n % 9 == 0 else word for n, word in enumerate(spelled)], dtype=object)
    while True:
        ranks = np.minimum(random.zipf(1.2, 30_000), WORDS) - 1
        for chosen in np.array_split(words[ranks], 85):
            lines = [" ".join(line) for line in np.array_split(chosen, 12)]
            yield ".\n".join((*lines[:6], "", *lines[6:])) + ".\n\n"


def write_text(path: Path, size: int) -> None:
    """One document of `size` bytes, or a little more."""
    written = 0
    with path.open("w") as file:
        for paragraph in paragraphs():
            written += file.write(paragraph)
            if written >= size:
                return


def write_lines(path: Path, size: int) -> None:
    """As many bytes of text, each paragraph a document."""
    written = 0
    with path.open("w") as file:
        for paragraph in paragraphs():
            file.write(json.dumps({"text": paragraph}) + "\n")
            written += len(paragraph)
            if written >= size:
                return


class Cost(NamedTuple):
    """What a command took."""

    seconds: float
    cpu_seconds: float  # of all threads together
    peak_bytes: int


def call(*arguments: object) -> Cost:
    """Runs `python -m lss_jax.tokenize`."""
    started = time.perf_counter()
    line = [sys.executable, "-m", "lss_jax.tokenize", *map(str, arguments)]
    _, status, usage = os.wait4(os.posix_spawn(line[0], line, os.environ), 0)
    if status:
        raise SystemExit(f"{' '.join(line)} ended with status {status}")
    return Cost(time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def measure(text: Path, form: str, tokenizer: Path) -> dict:
    out = text.with_suffix(".tokens")
    cost = call("--tokenizer", tokenizer, "--out", out, text)
    file = TokenFile(out)
    result = {
        "form": form,
        "text_bytes": file.text_bytes,
        "documents": len(file.document_ends),
        "tokens": file.size,
        "file_bytes": out.stat().st_size,
        **cost._asdict(),
    }
    out.unlink()
    return result


def table(results: list[dict]) -> str:
    lines = [
        "| text | documents | bytes | tokens | seconds | MB/s | MB per CPU second | peak memory |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        lines.append(
            f"| {result['form']} | {result['documents']:,} | {result['text_bytes']:,} | {result['tokens']:,} "
            f"| {result['seconds']:,.0f} | {result['text_bytes'] / result['seconds'] / 1e6:.1f} "
            f"| {result['text_bytes'] / result['cpu_seconds'] / 1e6:.1f} "
            f"| {result['peak_bytes'] / MIB:,.0f} MiB |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a hundredth of the text, as a trial")
    parser.add_argument("--folder", metavar="DIR", help="where the temporary folder is made (default: the system's)")
    arguments = parser.parse_args()
    share = 100 if arguments.tiny else 1
    results = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        start, tokenizer = Path(folder) / "start.txt", Path(folder) / "tokenizer.json"
        write_text(start, TRAINED_ON // share)
        call("--train", max(VOCAB // share, 300), "--out", tokenizer, start)
        for form, write, name in (("one document", write_text, "a.txt"), ("many documents", write_lines, "a.jsonl")):
            for size in SIZES:
                text = Path(folder) / name
                write(text, size // share)
                results.append(measure(text, form, tokenizer))
                text.unlink()
                print(table(results), flush=True)
    if not arguments.tiny:
        (HERE / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        (HERE / "results.md").write_text(table(results) + "\n")


if __name__ == "__main__":
    main()
