"""A notebook as a page: what a reader sees of it, and the code that one can paste from it."""

import ast
import builtins
import io
import re
from base64 import b64decode, b64encode
from html import escape

import nbformat
from PIL import Image

DIRECTIVE = re.compile(r"^#\|[^\n]*\n?", re.M)
HIDDEN = re.compile(r"^#\|\s*(hide|default_exp)\b", re.M)
EXPORTED = re.compile(r"^#\|\s*(exports?|export_in_copy)\b", re.M)
AS_A_FILE = '"__file__" in globals()'  # what a module does when it is run as a program, which a page is not


def readable(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook as a page: directives stripped, exported cells tagged `source`, imports folded.

    Of the cells with `#| hide` those stay, folded, that bind a name which a shown cell needs: pasted code runs.
    """
    cells, needed = [], set()
    for cell in reversed(notebook.cells):  # a cell is needed by those below it
        if cell.cell_type == "code":
            hidden, exported = HIDDEN.search(cell.source), EXPORTED.search(cell.source)
            cell.source = DIRECTIVE.sub("", cell.source)
            binds, reads = names(cell.source)
            if not cell.source.strip() or AS_A_FILE in cell.source or hidden and not binds & needed:
                continue
            needed = (needed - binds) | reads
            tags = ["source"] if exported else []
            tags += ["hide-input"] if hidden or only_imports(cell.source) else []
            cell.metadata["tags"] = [*cell.metadata.get("tags", []), *tags]
            cell.outputs = [] if hidden else cell.outputs
        cells.append(cell)
    notebook.cells = cells[::-1]
    return notebook


def with_light_outputs(page: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The page with smaller images; see `lighter`."""
    for cell in page.cells:
        if cell.cell_type == "code":
            cell.outputs = [lighter(output) for output in cell.outputs]
    return page


def shown_code(page: nbformat.NotebookNode) -> list[str]:
    """What is pasted from a page, cell by cell."""
    return [cell.source for cell in page.cells if cell.cell_type == "code"]


def names(source: str) -> tuple[set[str], set[str]]:
    """The names that a cell binds, and those that it reads."""
    if source.lstrip().startswith(("%", "!")):
        return set(), set()
    binds, reads = set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            binds |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            binds.add(node.name)
        elif isinstance(node, ast.Name):
            (reads if isinstance(node.ctx, ast.Load) else binds).add(node.id)
    return binds, reads - {*vars(builtins)}


def only_imports(source: str) -> bool:
    """Whether a cell holds nothing but imports; pages fold those, since a reader wants the reason first."""
    body = ast.parse(source).body if not source.lstrip().startswith(("%", "!")) else []
    return bool(body) and all(isinstance(node, ast.Import | ast.ImportFrom) for node in body)


def lighter(output: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """A stored output as a page carries it: smaller images, and videos as HTML, which Sphinx's renderer asks for."""
    data = output.get("data", {})
    if content := data.get("image/png"):
        data["image/png"] = b64encode(smaller_png(b64decode(content))).decode()
    if content := data.pop("image/webp", None):
        told = escape(data.get("text/plain", "a video"))
        data["text/html"] = f'<img alt="{told}" src="data:image/webp;base64,{content.strip()}">'
    return output


def smaller_png(content: bytes) -> bytes:
    """A figure with a palette of 256 colours where nobody sees the difference; else as it is."""
    image = Image.open(io.BytesIO(content)).convert("RGB")
    few = image.quantize(256, dither=Image.Dither.NONE)
    written = io.BytesIO()
    few.save(written, "PNG", optimize=True)
    return min(content, written.getvalue(), key=len)
