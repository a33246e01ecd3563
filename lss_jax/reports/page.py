"""Pieces of a self-contained HTML page: it fetches nothing, and reads in light and dark, on paper and on a phone."""

import base64
from collections.abc import Iterable, Sequence
from html import escape

from lss_jax.reports.figures import Plot, svg_of

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"  # the browser blocks any accidental fetch

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #16191d; --quiet: #565c64; --line: #d5d9de }
@media (prefers-color-scheme: dark) { :root { --paper: #14171a; --ink: #e6e8ea; --quiet: #a3a9b1; --line: #363b42 } }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; background: var(--paper); color: var(--ink);
       font: 1rem/1.5 system-ui, sans-serif }
h1 { font-size: 1.6rem; overflow-wrap: anywhere } h2 { font-size: 1.2rem; margin-top: 2.5rem }
.figures { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)) }
figure { margin: 0; break-inside: avoid } figcaption, .quiet { color: var(--quiet); font-size: .9rem }
img { display: block; max-width: 100%; height: auto }
svg { display: block; width: 100%; max-width: 44rem; height: auto } svg text { font-family: inherit !important }
.scroll { overflow-x: auto; margin: 1rem 0 }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
caption { text-align: left; font-weight: 600; padding-bottom: .3rem }
th, td { padding: .25rem 1rem .25rem 0; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top }
th { font-weight: 500 } th:first-child, .word { text-align: left }
td { overflow-wrap: anywhere; min-width: 4rem }
"""


def page(title: str, parts: Iterable[str]) -> str:
    """The whole HTML document."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{escape(title)}</h1>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def section(heading: str, *parts: str) -> str:
    """A section: parts under a heading."""
    return "\n".join(["<section>", f"<h2>{escape(heading)}</h2>", *parts, "</section>"])


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f'<p class="quiet">{escape(text)}</p>'


def figures(*drawn: tuple[Plot, str]) -> str:
    """Plots with their captions, side by side if there is room."""
    return "\n".join(
        [
            '<div class="figures">',
            *(
                f"<figure>{svg_of(plot, caption)}<figcaption>{escape(caption)}</figcaption></figure>"
                for plot, caption in drawn
            ),
            "</div>",
        ]
    )


def picture(png: bytes, caption: str) -> str:
    """A PNG file with its caption, in the page itself."""
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return f'<figure><img src="{source}" alt="{escape(caption)}"><figcaption>{escape(caption)}</figcaption></figure>'


def table(caption: str, header: Sequence[str], rows: Iterable[Sequence[str]], words: int = 0) -> str:
    """A table: a column of names, `words` columns of words, then numbers."""

    def cells(row: Sequence[str], first: str, other: str) -> str:
        tags = [first, *[f'{other} class="word"'] * words, *[other] * len(row)]
        closed = (f"<{tag}>{escape(cell)}</{tag[:2]}>" for tag, cell in zip(tags, row, strict=False))
        return f"<tr>{''.join(closed)}</tr>"

    return "\n".join(
        [
            f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}">',
            f"<table><caption>{escape(caption)}</caption>",
            "<thead>" + cells(header, 'th scope="col"', 'th scope="col"') + "</thead>",
            "<tbody>",
            *(cells(row, 'th scope="row"', "td") for row in rows),
            "</tbody></table></div>",
        ]
    )
