"""The rules for genomes as data."""

from collections.abc import Iterator

from lss_jax.config.schema import DataConfig

FASTA, BASES = "fasta", "bases"


def genome_problems(data: DataConfig) -> Iterator[str]:
    """Errors in the keys of `data` that are for genomes."""
    if data.source != FASTA:
        yield from _of_other_data(data)
        return
    if not data.path:
        yield f'data.source="{FASTA}" needs genomes; give data.path, files of FASTA or GenBank'
    for key in ("path", "valid_path", "test_path", "annotation"):
        value = getattr(data, key)
        if value and not all(part.strip() for part in value.split(",")):
            yield f"data.{key}={value!r} has an empty part between commas; give a file, folder or glob in each"
    if data.tokenizer != BASES:
        yield (
            f'data.source="{FASTA}" is read base by base, not with data.tokenizer={data.tokenizer!r}; use '
            f'data.tokenizer="{BASES}"'
        )
    if bool(data.valid_path) != bool(data.test_path):
        yield (
            f"data.valid_path={data.valid_path!r} and data.test_path={data.test_path!r} go together; name both, or "
            f"none, and whole records are held out"
        )
    if data.separator:
        yield f'data.separator={data.separator!r} has no use with data.source="{FASTA}", whose documents are records'


def _of_other_data(data: DataConfig) -> Iterator[str]:
    if data.tokenizer == BASES:
        yield (
            f'data.tokenizer="{BASES}" is for data.source="{FASTA}", and has no use with {data.source!r}; use "bytes", '
            f"or the path of a tokenizer.json"
        )
    for key in ("valid_path", "test_path", "annotation", "reverse_complement"):
        if getattr(data, key):
            yield (
                f'data.{key}={getattr(data, key)!r} is for data.source="{FASTA}", and has no use with {data.source!r}; '
                f"leave it out"
            )
