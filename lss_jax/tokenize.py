"""Train a tokenizer, or encode documents: `python -m lss_jax.tokenize --tokenizer tokenizer.json --out F FILES`."""

import argparse
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from lss_jax import cli
from lss_jax.config.genome_rules import BASES
from lss_jax.config.schema import ConfigError
from lss_jax.data.documents import Documents, Fields, files_of
from lss_jax.data.encoding import encode
from lss_jax.data.token_file import TokenFile
from lss_jax.data.tokenizer import load_tokenizer
from lss_jax.data.tokenizer_training import train_tokenizer

FILES = (
    "plain text, or JSONL (.jsonl, .ndjson), gzipped (.gz) or not; folders, of which all .txt, .md and JSONL files are "
    "taken; globs, where ** stands for any folders"
)


def main() -> int:
    arguments = _parser().parse_intermixed_args()  # options may come between files
    if problems := "\n".join(_problems(arguments)):
        raise ConfigError(problems)
    _limit_threads(arguments.workers)
    try:
        print(_train(arguments) if arguments.train is not None else _encode(arguments))
    except KeyboardInterrupt:
        kept = "nothing was written" if arguments.train is not None else f"finished parts are in {arguments.out}.parts"
        print(f"interrupted; {kept}, and the same command goes on", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lss_jax.tokenize",
        description="Train a byte-level BPE on documents (--train), or encode documents (--tokenizer) into a token "
        "file, which data.path can name. An interrupted encoding goes on with the same command.",
        allow_abbrev=False,
    )
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--train", type=int, metavar="SIZE", help="train a tokenizer of so many tokens")
    task.add_argument("--tokenizer", metavar="FILE", help='encode with this tokenizer.json, or with "bytes"')
    parser.add_argument("--out", required=True, metavar="FILE", help="the tokenizer.json or token file to be written")
    parser.add_argument("files", nargs="+", metavar="FILES", help=FILES)
    fields = parser.add_argument_group("fields of JSONL objects")
    fields.add_argument("--field", metavar="NAME", help="the text (default: text)")
    fields.add_argument("--prompt-field", metavar="NAME", help="instead of a text: a prompt, which is not learned ...")
    fields.add_argument("--answer-field", metavar="NAME", help="... and the answer to it, which is")
    parser.add_argument(
        "--separator",
        default="",
        metavar="TEXT",
        help="what ends a document in plain text (default: the end of the file)",
    )
    parser.add_argument(
        "--end", metavar="TOKEN", help="put behind each document (default: the tokenizer's eos_token or <|endoftext|>)"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="threads (default: one per core)")
    return parser


def _problems(arguments: argparse.Namespace) -> Iterator[str]:
    field, prompt, answer = arguments.field, arguments.prompt_field, arguments.answer_field
    if bool(prompt) != bool(answer):
        yield f"--prompt-field={prompt} and --answer-field={answer} go together; give both, or --field"
    if field and (prompt or answer):
        yield f"--field={field} is of a text, --prompt-field and --answer-field are of two; give one or the other"
    if arguments.train is not None and arguments.end:
        yield f"--end={arguments.end} is for encoding; a tokenizer that is trained here has <|endoftext|>"
    if arguments.tokenizer == BASES:
        yield '--tokenizer=bases: genomes are trained on as they are; give their files to data.source="fasta"'
    if arguments.workers is not None and arguments.workers < 1:
        yield f"--workers={arguments.workers} must be at least 1"


def _limit_threads(workers: int | None) -> None:
    """Tells the library `tokenizers`, which reads this when it first encodes."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false" if workers == 1 else "true"
    if workers is not None:
        os.environ["RAYON_NUM_THREADS"] = str(workers)


def _fields(arguments: argparse.Namespace) -> Fields:
    return Fields(arguments.field or "text", arguments.prompt_field or "", arguments.answer_field or "")


def _train(arguments: argparse.Namespace) -> str:
    started, out = time.perf_counter(), Path(arguments.out)
    documents = Documents(files_of(arguments.files), _fields(arguments), arguments.separator)
    vocab = train_tokenizer(documents, arguments.train, out, progress=sys.stderr.isatty())
    fewer = f" of {arguments.train:,}, since no other pair occurs twice" if vocab < arguments.train else ""
    read, seconds = documents.position, time.perf_counter() - started
    return f"tokenizer  {out}, {vocab:,} tokens{fewer}, from {read:,} bytes of files in {seconds:.1f} s"


def _encode(arguments: argparse.Namespace) -> str:
    started, out = time.perf_counter(), Path(arguments.out)
    tokenizer = load_tokenizer(arguments.tokenizer, arguments.end)
    files = files_of(arguments.files)
    encoded = encode(files, out, tokenizer, fields=_fields(arguments), separator=arguments.separator, progress=True)
    return _summary(encoded, time.perf_counter() - started)


def _summary(encoded: TokenFile, seconds: float) -> str:
    size, documents, text = encoded.size, len(encoded.document_ends), encoded.text_bytes
    files = len(encoded.files)
    ending = f", each ending with {encoded.end}" if encoded.end else ""
    return "\n".join(
        (
            f"documents  {documents:,}, from {files:,} file{'s' * (files > 1)}{ending}",
            f"tokens     {size:,}, of {text / size:.2f} bytes; vocabulary {encoded.vocab:,}, {encoded.dtype}",
            f"text       {text:,} bytes in {seconds:.1f} s, {text / seconds / 1e6:.1f} MB/s",
            f"file       {encoded.path}, {encoded.path.stat().st_size:,} bytes",
        )
    )


if __name__ == "__main__":
    cli.run(main)
