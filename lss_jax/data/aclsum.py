"""ACLSum (Takeshita et al., NAACL 2024): 250 papers of computational linguistics, of each three one-sentence summaries.

They come with the package `aclsum`, which downloads nothing, in splits of 100, 50 and 100 papers, which are kept. Here
a paper is a JSONL object: its sentences, a line each, of the `abstract`, `introduction` and `conclusion`, and of all
three as the `document`; and its summaries, of the `challenge`, the `approach` and the `outcome`.
"""

import json

from lss_jax.config.schema import ConfigError

SPLITS = {"train": "train", "valid": "val", "test": "test"}
SECTIONS = ("abstract", "introduction", "conclusion")


def papers(split: str) -> bytes:
    """The papers of a split, as JSONL.

    Raises:
      ConfigError: the package is missing.
    """
    try:
        from aclsum import ACLSum  # an optional package
    except ImportError as error:
        raise ConfigError(
            f'data.source="aclsum" needs the package aclsum ({error}); pip install aclsum==0.1.2, or use '
            f'data.source="text" with JSONL files of your own'
        ) from error
    objects = []
    for paper in ACLSum(SPLITS[split]):
        sections = {name: "\n".join(paper.sentences[name]) for name in SECTIONS}
        objects.append({"document": "\n".join(sections.values()), **sections, **paper.summaries})
    return b"".join(json.dumps(paper).encode() + b"\n" for paper in objects)
