"""The rules for genomes as data."""

from collections.abc import Iterator

from lss_jax.config.schema import DataConfig, parts_of

FASTA, BASES = "fasta", "bases"


def genome_problems(data: DataConfig) -> Iterator[str]:
    """Errors in the keys of `data` that are for genomes."""
    if data.source != FASTA:
        yield from _of_other_data(data)
        return
    if not data.path:
        yield f'data.source="{FASTA}" needs genomes; give data.path, files of FASTA or GenBank'
    if data.annotation and "" in parts_of(data.annotation):
        yield f"data.annotation={data.annotation!r} has an empty part between commas; give a file or glob in each"
    if data.tokenizer != BASES:
        yield (
            f'data.source="{FASTA}" is read base by base, not with data.tokenizer={data.tokenizer!r}; use '
            f'data.tokenizer="{BASES}"'
        )
    if data.separator:
        yield f'data.separator={data.separator!r} has no use with data.source="{FASTA}", whose documents are records'


def _of_other_data(data: DataConfig) -> Iterator[str]:
    if data.tokenizer == BASES:
        yield (
            f'data.tokenizer="{BASES}" is for data.source="{FASTA}", and has no use with {data.source!r}; use "bytes", '
            f"or the path of a tokenizer.json"
        )
    for key in ("annotation", "reverse_complement"):
        if getattr(data, key):
            yield (
                f'data.{key}={getattr(data, key)!r} is for data.source="{FASTA}", and has no use with {data.source!r}; '
                f"leave it out"
            )
