"""Build `_docs/` from the notebooks: stage them without what is hidden, then run Sphinx with warnings as errors.

The notebooks are written to be read in order, so pages show the exported source where it is introduced. Cells with
`#| hide` are left out; the directives (`#| export`) are stripped, and exported cells get a coloured rule instead.
"""

import ast
import re
import shutil
import subprocess
import sys
from html import escape
from importlib.metadata import distribution
from pathlib import Path

import nbformat
from nbformat.v4 import new_markdown_cell

ROOT = Path(__file__).parents[1]
STAGE, OUT = ROOT / "_site_src", ROOT / "_docs"
MATHJAX = "sphinx-mathjax-offline/static/mathjax/tex-svg.js"  # one file, fonts included
DIRECTIVE = re.compile(r"^#\|[^\n]*\n?", re.M)
HIDDEN = re.compile(r"^#\|\s*(hide|default_exp)\b", re.M)
EXPORTED = re.compile(r"^#\|\s*(exports?|export_in_copy)\b", re.M)
PACKAGES = {
    "Foundations": "",
    "Data": "data",
    "Models": "models",
    "Layers": "models/layers",
    "Backbones": "models/backbones",
    "Projectors": "models/projectors",
    "Action heads": "models/heads",
    "Frameworks": "models/frameworks",
    "Other codebases": "models/interop",
    "Training": "training",
    "Serving": "serving",
    "Benchmarks": "benchmarks",
    "Evaluation": "evaluation",
    "Reinforcement learning": "rl",
    "Seeing": "viz",
    "Tutorials": "tutorials",
    "Templates": "templates",
}


def readable(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook as a page: hidden cells gone, directives stripped, exported cells tagged `source`."""
    cells = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            if HIDDEN.search(cell.source):
                continue
            if EXPORTED.search(cell.source):
                cell.metadata["tags"] = [*cell.metadata.get("tags", []), "source"]
            cell.source = DIRECTIVE.sub("", cell.source)
            if only_imports(cell.source):
                cell.metadata["tags"] = [*cell.metadata.get("tags", []), "hide-input"]
            for output in cell.outputs:
                show_videos(output)
        cells.append(cell)
    notebook.cells = cells
    return notebook


def show_videos(output: nbformat.NotebookNode) -> None:
    """Makes HTML of an animated WebP, which Sphinx's renderer of notebooks does not know."""
    data = output.get("data", {})
    if content := data.pop("image/webp", None):
        told = escape(data.get("text/plain", "a video"))
        data["text/html"] = f'<img alt="{told}" src="data:image/webp;base64,{content.strip()}">'


def only_imports(source: str) -> bool:
    """Whether a cell holds nothing but imports; pages fold those, since a reader wants the reason first."""
    body = ast.parse(source).body if not source.lstrip().startswith(("%", "!")) else []
    return bool(body) and all(isinstance(node, ast.Import | ast.ImportFrom) for node in body)


def contents(pages: list[Path]) -> str:
    """One captioned table of contents per package, as MyST. Raises `ValueError` for a page that is in none."""
    folders = {p.parent.relative_to(STAGE).as_posix() for p in pages} - {"."}
    if left := folders - set(PACKAGES.values()):
        raise ValueError(f"no table of contents shows {sorted(left)}: add them to PACKAGES")
    trees = []
    for caption, folder in PACKAGES.items():
        inside = [
            p.relative_to(STAGE).with_suffix("").as_posix() for p in pages if p.parent == STAGE / folder
        ]
        inside = [name for name in inside if name != "index"]
        if inside:
            trees.append(
                "```{toctree}\n:hidden:\n:caption: " + caption + "\n\n" + "\n".join(inside) + "\n```"
            )
    return "\n\n".join(trees)


def stage() -> list[Path]:
    """Copies every notebook, made readable, and the Sphinx configuration; returns the pages."""
    shutil.rmtree(STAGE, ignore_errors=True)
    pages = []
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        if ".ipynb_checkpoints" not in path.parts:
            page = STAGE / path.relative_to(ROOT / "nbs")
            page.parent.mkdir(parents=True, exist_ok=True)
            nbformat.write(readable(nbformat.read(path, 4)), page)
            pages.append(page)
    index = nbformat.read(STAGE / "index.ipynb", 4)
    index.cells.append(new_markdown_cell(contents(pages)))
    nbformat.write(index, STAGE / "index.ipynb")
    shutil.copy(ROOT / "docs/conf.py", STAGE)
    shutil.copytree(ROOT / "docs/_static", STAGE / "_static")
    (STAGE / "_static/mathjax").mkdir()
    shutil.copy(distribution("sphinx-mathjax-offline").locate_file(MATHJAX), STAGE / "_static/mathjax")
    shutil.copytree(ROOT / "figures", STAGE / "figures", ignore=shutil.ignore_patterns("*.ipynb", ".gitkeep"))
    return pages


def main() -> None:
    pages = stage()
    shutil.rmtree(OUT, ignore_errors=True)
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "-d", STAGE / "doctrees", STAGE, OUT]
    code = subprocess.call([str(part) for part in command])
    print(f"{len(pages)} pages in {OUT.relative_to(ROOT)}" if not code else "the documentation has warnings")
    raise SystemExit(code)


if __name__ == "__main__":
    main()
