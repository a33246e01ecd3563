"""What strategies that are not exact cannot express, a line each, in one wording for all of them."""

from collections.abc import Iterator

from lss_jax.attention.mask import MaskKind
from lss_jax.config.schema import AttentionConfig, Config

REMEDY = 'attention.strategy="lss"'  # which expresses any mask


def mask_gaps(config: Config, seen: MaskKind) -> Iterator[str]:
    """A prefix, and rows of several documents: neither is one sum over what came before."""
    name = config.attention.strategy
    if seen.prefix:
        yield (
            f"attention.prefix={seen.prefix} makes a mask that attention.strategy={name!r} cannot express; "
            f"use attention.prefix=0 or {REMEDY}"
        )
    if seen.documents:
        yield (
            f"data.pack=True makes windows of several documents that do not see one another, a mask that "
            f"attention.strategy={name!r} cannot express; use data.pack=False, data that is one document, or {REMEDY}"
        )


def window_gap(config: Config, seen: MaskKind) -> Iterator[str]:
    """A window, where attention is a sum that nothing is taken out of again."""
    if seen.window:
        yield (
            f"attention.window={seen.window} makes a mask that attention.strategy={config.attention.strategy!r} cannot "
            f'express; use attention.window=0, {REMEDY} or attention.strategy="longformer"'
        )


def dropout_gap(config: Config) -> Iterator[str]:
    """Dropout of attention weights, where there are none."""
    if config.model.dropout:
        yield (
            f"model.dropout={config.model.dropout} drops attention weights too, which "
            f"attention.strategy={config.attention.strategy!r} never has; use model.dropout=0.0 or {REMEDY}"
        )


def kernel_gap(attention: AttentionConfig) -> Iterator[str]:
    """A kernel, where there is one way to compute alone."""
    if attention.kernel not in ("auto", "blockwise"):
        yield (
            f"attention.kernel={attention.kernel!r} is not for attention.strategy={attention.strategy!r}, which is "
            f'computed in blocks of its own; use attention.kernel="auto" or {REMEDY}'
        )
