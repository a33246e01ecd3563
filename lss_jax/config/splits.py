"""The rules for splits that have files of their own, and for the papers of the package `aclsum`, which have."""

from collections.abc import Iterator

from lss_jax.config.genome_rules import FASTA
from lss_jax.config.schema import DataConfig, unknown_choice

PAPER_FIELDS = ("document", "abstract", "introduction", "conclusion", "challenge", "approach", "outcome")


def held_out_problems(data: DataConfig) -> Iterator[str]:
    """Whether only one split has files of its own, or the data is no text."""
    if bool(data.valid_path) != bool(data.test_path):
        yield (
            f"data.valid_path={data.valid_path!r} and data.test_path={data.test_path!r} go together; name both, or "
            f"none, and parts of data.path are held out"
        )
    elif data.valid_path and len({data.path, data.valid_path, data.test_path}) < 3:
        yield (
            f"data.path={data.path!r}, data.valid_path={data.valid_path!r} and data.test_path={data.test_path!r} must "
            f"be different files; hold some out"
        )
    elif data.valid_path and data.source not in ("text", FASTA):
        yield (
            f"data.valid_path={data.valid_path!r} and data.test_path={data.test_path!r} have no use with data.source="
            f'{data.source!r}; use "", or data.source="text" or "{FASTA}"'
        )


def papers_problems(data: DataConfig) -> Iterator[str]:
    """Whether fields are none of a paper's."""
    if data.source != "aclsum":
        return
    named = ("prompt_field", "answer_field") if data.prompt_field else ("field",)
    for key in named:
        if getattr(data, key) not in PAPER_FIELDS:
            yield unknown_choice(f"data.{key}", getattr(data, key), PAPER_FIELDS)
