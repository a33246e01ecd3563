"""The site: guides in Markdown, notebooks with their committed outputs, the API from the docstrings.

    pip install -r docs/requirements.txt
    sphinx-build -W --keep-going -b html docs docs/_build/html

Nothing is executed but imports. Links in Markdown are written as they work in the repository; `source-read` below
translates them for the site. The pages of the API follow the package as it is at build time.
"""

import ast
import json
import os
import pkgutil
import re
import shutil
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

DOCS = Path(__file__).parent
ROOT = DOCS.parent
PACKAGE = ROOT / "lss_jax"
API, EXPERIMENTS = DOCS / "api", DOCS / "experiments"  # both are written here, and not under version control
sys.path.insert(0, str(ROOT))

project = "lss_jax"
author = "the authors of lss_jax"
html_title = "lss_jax"
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_copyright = html_show_sphinx = False
html_copy_source = html_show_sourcelink = False
html_theme_options = {
    "navigation_with_keys": True,
    "light_css_variables": {"color-brand-primary": "#1f5fa8", "color-brand-content": "#1f5fa8"},
    "dark_css_variables": {"color-brand-primary": "#7db4f0", "color-brand-content": "#7db4f0"},
}

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "requirements.txt"]
default_role = "code"  # what stands in single backticks in a docstring

myst_heading_anchors = 3
nb_execution_mode = "off"
nb_ipywidgets_js: dict = {}  # no page fetches anything
copybutton_exclude = ".linenos, .gp, .go"

napoleon_google_docstring, napoleon_numpy_docstring = True, False
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "undoc-members": True}
autodoc_preserve_defaults = True
suppress_warnings = ["ref.python"]  # `bytes` in an annotation is the type, not one of our fields of that name
maximum_signature_line_length = 80
python_use_unqualified_type_names = True
add_module_names = False


# The experiments: their pages, tables, figures and notebooks, beside the guides.


def write_experiments() -> None:
    """Copies what is to be read of `experiments/`; tables without a title get one, notebooks the name of a language."""
    shutil.rmtree(EXPERIMENTS, ignore_errors=True)
    for path in sorted((ROOT / "experiments").rglob("*")):
        copy = EXPERIMENTS / path.relative_to(ROOT / "experiments")
        if path.suffix not in {".md", ".png", ".ipynb"}:
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".md" and path.name != "README.md":
            text = path.read_text()
            title = "" if text.startswith("# ") else f"# {path.parent.name}: {path.stem}\n\n"
            copy.write_text(f"---\norphan: true\n---\n\n{title}{text}")
        elif path.suffix == ".ipynb":
            notebook = json.loads(path.read_text())
            notebook["metadata"]["kernelspec"] = {"name": "python3", "language": "python", "display_name": "Python 3"}
            notebook["metadata"]["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}
            copy.write_text(json.dumps(notebook))
        else:
            shutil.copy(path, copy)
    with (EXPERIMENTS / "README.md").open("a") as index:
        index.write("\n```{toctree}\n:hidden:\n:glob:\n\n*/README\n```\n")


# The API: a page per module, in the folders of the package.


def write_api() -> None:
    """Writes a page per module, a page per folder with what is in it, and one with what `import lss_jax` has."""
    shutil.rmtree(API, ignore_errors=True)
    API.mkdir()
    (API / "index.rst").write_text(
        heading("API reference", "=")
        + "From the docstrings. Start with :doc:`what import lss_jax has <public>`; the rest is for readers of the "
        "code and for those who :doc:`extend it </extend>`. Capital letters in names are sizes: :doc:`/letters`.\n\n"
        + table_of(modules("lss_jax"))
        + toctree(["public", *modules("lss_jax")])
    )
    (API / "public.rst").write_text(
        heading("import lss_jax", "=")
        + "Importing the package starts nothing and imports nothing else. :doc:`/from_python` shows these in use.\n\n"
        + "".join(f".. autofunction:: lss_jax.{name}\n   :no-index:\n\n" for name in public() if name[0].islower())
        + "".join(f".. autoclass:: lss_jax.{name}\n   :no-index:\n\n" for name in public() if name[0].isupper())
    )
    for name in every_module():
        inner = modules(name)
        (API / f"{name}.rst").write_text(
            heading(name.removeprefix("lss_jax."), "=")
            + f".. automodule:: {name}\n\n"
            + (table_of(inner) + toctree(inner) if inner else "")
        )


def heading(text: str, line: str) -> str:
    return f"{text}\n{line * len(text)}\n\n"


def toctree(pages: list[str]) -> str:
    return ".. toctree::\n   :hidden:\n\n" + "".join(f"   {page}\n" for page in pages) + "\n"


def table_of(names: list[str]) -> str:
    rows = "".join(f"   * - :doc:`{name.rpartition('.')[2]} <{name}>`\n     - {summary(name)}\n" for name in names)
    return f".. list-table::\n   :widths: 1 3\n\n{rows}\n"


def path_of(name: str) -> Path:
    path = ROOT / name.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def modules(package: str) -> list[str]:
    """The modules and folders right inside a package, folders last."""
    found = pkgutil.iter_modules([str(path_of(package).parent)]) if path_of(package).name == "__init__.py" else []
    return [f"{package}.{info.name}" for info in sorted(found, key=lambda info: (info.ispkg, info.name))]


def every_module(package: str = "lss_jax") -> list[str]:
    return [name for inner in modules(package) for name in (inner, *every_module(inner))]


def summary(name: str) -> str:
    """The first line of a module's docstring; single backticks are code in reStructuredText, too (`default_role`)."""
    docstring = ast.get_docstring(ast.parse(path_of(name).read_text())) or ""
    return plain(docstring.partition("\n")[0]) or "."


def public() -> list[str]:
    """`__all__` of the package, read from its source."""
    for node in ast.parse((PACKAGE / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    return []


CODE = re.compile(r"(`+[^`]+`+|^ *>>> .*?(?=\n *\n|\Z))", re.DOTALL | re.MULTILINE)


def plain(text: str) -> str:
    """A docstring's text for reStructuredText: outside of code every character is itself, and code may touch a word."""
    parts = CODE.split(text)
    for index in range(0, len(parts), 2):
        part = re.sub(r"([*|]|(?<=\w)_(?!\w))", r"\\\1", parts[index])
        part = re.sub(r"^(?=\w)", r"\\ ", part) if index and parts[index - 1].startswith("`") else part
        parts[index] = re.sub(r"(?<=\w)$", r"\\ ", part) if index + 1 < len(parts) else part
    return "".join(parts)


def on_docstring(app, what, name, obj, options, lines) -> None:
    if lines and lines[0].startswith("Alias for field number"):
        lines[:] = []  # what a NamedTuple says of its fields
    lines[:] = plain("\n".join(lines)).split("\n")


# Links, from how they are in the repository to how they are on the site.

LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?(?=\))")


def on_source(app, docname, source) -> None:
    """Links of a page as they work on the site: to its own pages, to a module's page, or to a file to download."""
    page = DOCS / f"{docname}.md"
    if not page.is_file():
        return
    original = ROOT / "experiments" / page.relative_to(EXPERIMENTS) if page.is_relative_to(EXPERIMENTS) else page

    def translated(match: re.Match) -> str:
        target, anchor = Path(os.path.normpath(original.parent / match[1])), match[2] or ""
        return os.path.relpath(on_site(target), page.parent) + anchor

    source[0] = LINK.sub(translated, source[0])


def on_site(target: Path) -> Path:
    target = target / "README.md" if (target / "README.md").is_file() else target
    if target.is_relative_to(ROOT / "experiments"):
        copied = EXPERIMENTS / target.relative_to(ROOT / "experiments")
        return copied if copied.is_file() else target
    if target.is_relative_to(PACKAGE):
        inside = target.relative_to(ROOT).with_suffix("").parts
        return API / f"{'.'.join(inside).removesuffix('.__init__')}.rst"
    return target


write_experiments()
write_api()


def setup(app) -> None:
    app.connect("source-read", on_source)
    app.connect("autodoc-process-docstring", on_docstring, priority=400)  # before napoleon
