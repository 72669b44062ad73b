"""The reference: a page for each module, read from its source, with every public class and function and its docstring."""

import ast
import re
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = "https://github.com/vla-bench/vla_bench/blob/main"
SOURCE = re.compile(r"File to edit: (\S+\.ipynb)")
SPECIAL = re.compile(r"([\\*_\[\]<>#$|{}~])")


@dataclass
class Entry:
    """A class or a function: its name, how it is called, what it says, and where it stands."""

    name: str
    signature: str
    doc: str
    line: int
    methods: list["Entry"] = field(default_factory=list)


def prose(doc: str) -> str:
    """A docstring as MyST: names in backticks stay code, indented lines are code, all else is text."""
    blocks = []
    for block in re.split(r"\n\s*\n", doc):
        if all(line.startswith("    ") for line in block.splitlines()):
            blocks.append(f"```text\n{block}\n```")
        else:
            parts = re.split(r"(``?[^`]+``?)", block)
            plain = [part if part.startswith("`") else SPECIAL.sub(r"\\\1", part) for part in parts]
            blocks.append("\n".join(line.strip() for line in "".join(plain).splitlines()))
    return "\n\n".join(blocks)


def signature(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str:
    """A function's first lines as they are written, with the comments that say what each argument is."""
    text = "\n".join(lines[node.lineno - 1 : node.body[0].lineno - 1]) or lines[node.lineno - 1]
    if node.body[0].lineno == node.lineno:  # the body stands on the same line
        text = text[: node.body[0].col_offset].rstrip()
    text = "\n".join(line for line in text.splitlines() if line.strip() and not line.strip().startswith("#"))
    indent = len(text) - len(text.lstrip())
    return "\n".join(line[indent:] for line in text.splitlines())


def fields_of(node: ast.ClassDef, lines: list[str]) -> list[str]:
    """Attributes of a class with their comments; those of a dataclass are its arguments."""
    kept = [each for each in node.body if isinstance(each, ast.AnnAssign) and public(each.target.id)]
    return [line for each in kept for line in lines[each.lineno - 1 : each.end_lineno]]


def public(name: str) -> bool:
    """Whether a name is for others."""
    return not name.startswith("_") or name == "__call__"


def patched(node: ast.FunctionDef) -> str | None:
    """The class that `@patch` gives a function to."""
    decorators = [each.func if isinstance(each, ast.Call) else each for each in node.decorator_list]
    if any(isinstance(each, ast.Name) and each.id == "patch" for each in decorators) and node.args.args:
        return ast.unparse(node.args.args[0].annotation)
    return None


def function(node: ast.FunctionDef, lines: list[str], name: str | None = None) -> Entry:
    return Entry(name or node.name, signature(node, lines), ast.get_docstring(node) or "", node.lineno)


def entries(text: str) -> list[Entry]:
    """What a module defines for others, in its order, methods within their classes."""
    lines, found = text.splitlines(), {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef) and public(node.name):
            head = [line for line in lines[node.lineno - 1 : node.body[0].lineno - 1] if line.strip()]
            told = "\n".join([*(head or [lines[node.lineno - 1]]), *fields_of(node, lines)])
            entry = found[node.name] = Entry(node.name, told, ast.get_docstring(node) or "", node.lineno)
            inside = [each for each in node.body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)]
            entry.methods = [
                function(each, lines, f"{node.name}.{each.name}")
                for each in inside
                if public(each.name)
                or each.name == "__init__"
                and len(each.args.args + each.args.kwonlyargs) > 1
            ]
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and public(node.name):
            owner = patched(node)
            if owner:
                target = found.setdefault(
                    owner, Entry(owner, "", "Methods that this page adds.", node.lineno)
                )
                target.methods.append(function(node, lines, f"{owner}.{node.name}"))
            else:
                found[node.name] = function(node, lines)
    return list(found.values())


def page(module: Path, root: Path) -> str:
    """The page of one module, as MyST."""
    text, name = module.read_text(encoding="utf-8"), ".".join(module.relative_to(root).with_suffix("").parts)
    doc = (ast.get_docstring(ast.parse(text)) or "").split("Docs: http")[0].strip()
    notebook = (module.parent / SOURCE.search(text)[1]).resolve().relative_to(root / "nbs")
    link = f"{REPOSITORY}/{module.relative_to(root).as_posix()}"
    parts = [
        f"# `{name}`",
        prose(doc),
        f"Explained and shown in [](/{notebook.as_posix()}). [Source]({link})",
    ]
    for entry in entries(text):
        for each, level in ((entry, "##"), *((method, "###") for method in entry.methods)):
            code = f"```python\n{each.signature}\n```" if each.signature else ""
            parts += [f"{level} `{each.name}`", code, prose(each.doc), f"[source]({link}#L{each.line})"]
    return "\n\n".join(part for part in parts if part) + "\n"


def modules(root: Path) -> list[Path]:
    """Every exported module that defines something for others."""
    every = sorted((root / "vla_bench").rglob("*.py"))
    own = [path for path in every if path.name not in ("__init__.py", "_modidx.py")]
    return [path for path in own if SOURCE.search(path.read_text(encoding="utf-8"))]
