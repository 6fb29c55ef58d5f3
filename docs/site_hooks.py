"""Hooks of the documentation site: pages from the repository's files, and tables of options from dataclasses."""

from __future__ import annotations

import ast
import base64
import inspect
import json
import re
from dataclasses import MISSING, fields
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any, get_type_hints

import tyro
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
REPOSITORY_FILES = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill in what a page asks for: `<!-- options: module.Class -->` and `<!-- README: a section -->`."""
    source = REPOSITORY_FILES.get(page.file.src_uri)
    if source:
        markdown = _from_docs((ROOT / source).read_text())
    markdown = re.sub(r"<!-- README: (.+) -->", lambda match: readme_section(match[1]), markdown)
    return re.sub(r"<!-- options: (\S+) -->", lambda match: options_table(match[1]), markdown)


def readme_section(title: str) -> str:
    """Return a section of the README, its heading included."""
    (section,) = re.findall(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", (ROOT / "README.md").read_text(), re.M | re.S)
    return _from_docs(section)


def _from_docs(text: str) -> str:
    """Return a text of the repository's root with its links as from the folder of the site's pages."""
    return re.sub(r"\]\(docs/", "](", text)


def on_files(files: Any, config: Any) -> Any:
    """Add a page for each notebook, with its stored outputs."""
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        name = notebook.src_uri.removesuffix(".ipynb")
        cells = json.loads((Path(config.docs_dir) / notebook.src_uri).read_text(encoding="utf-8"))["cells"]
        text, images = notebook_page(cells, name.rpartition("/")[2])
        files.append(File.generated(config, f"{name}.md", content=text))
        for image, content in images.items():
            files.append(File.generated(config, f"{name.rpartition('/')[0]}/{image}", content=content))
    return files


def notebook_page(cells: list[dict[str, Any]], name: str) -> tuple[str, dict[str, bytes]]:
    """Return a notebook's cells as Markdown, and its images by their names."""
    parts, images = list[str](), dict[str, bytes]()
    for cell in cells:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            if "image/png" in output.get("data", ()):
                image = f"{name}_{len(images)}.png"
                images[image] = base64.b64decode(output["data"]["image/png"])
                parts.append(f"![what the code above draws]({image})")
            else:
                text = output.get("text") or output["data"]["text/plain"]
                parts.append(f"```text\n{''.join(text).rstrip()}\n```")
    parts.append(f"The notebook: [{name}.ipynb]({name}.ipynb).")
    return "\n\n".join(parts), images


def options_table(path: str) -> str:
    """Return a Markdown table of a configuration dataclass: option, default, description."""
    module, _, name = path.rpartition(".")
    config = getattr(import_module(module), name)
    docs, hints = field_docs(config), get_type_hints(config, include_extras=True)
    rows = [
        f"| {spelling(field.name, hints[field.name])} | {default(field)} | {docs[field.name]} |"
        for field in fields(config)
    ]
    return "\n".join(["| option | default | |", "|---|---|---|", *rows])


def field_docs(config: type) -> dict[str, str]:
    """Return the docstring below each field of a dataclass, in one line."""
    docs = {}
    for owner in reversed(config.__mro__[:-1]):
        body = ast.parse(inspect.getsource(owner)).body[0].body  # type: ignore[attr-defined]
        for field, text in pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                docs[field.target.id] = " ".join(str(ast.literal_eval(text.value)).split())  # type: ignore[union-attr]
    return docs


def spelling(name: str, hint: Any) -> str:
    """Return how an option is spelled on the command line."""
    marks = getattr(hint, "__metadata__", ())
    if tyro.conf.Positional in marks:
        return f"`{name.upper()}`"
    aliases = [alias for mark in marks for alias in getattr(mark, "aliases", None) or ()]
    return ", ".join(f"`{flag}`" for flag in [*aliases, f"--{name.replace('_', '-')}"])


def default(field: Any) -> str:
    """Return a field's default as it would be typed."""
    value = field.default
    if value is MISSING:
        return "required"
    if value is None or value == ():
        return ""
    if isinstance(value, tuple):
        value = " ".join(map(str, value))
    return f"`{value}`"
