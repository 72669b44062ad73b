"""The links of the pages: those within are Sphinx's to follow, those to elsewhere are checked by their form."""

import json
import re
from pathlib import Path, PurePosixPath

REPOSITORY = "https://github.com/vla-bench/vla_bench/blob/main"
MARKDOWN = re.compile(r"\]\(<?((?:https?|ftp):[^)\s>]*)>?\)|<(https?:[^>\s]*)>")
RELATIVE = re.compile(r"\]\((?!https?:|#|mailto:)([^)\s]+)\)")
# Hosts whose addresses have a form of their own; all others need https and a host.
FORMS = {
    "arxiv.org": r"/(abs|pdf)/((0[7-9]|1[0-4])\d\d\.\d{4}|(1[5-9]|[2-9]\d)\d\d\.\d{5})(v\d+)?$",
    "doi.org": r"/10\.\d{4,9}/\S+$",
    "github.com": r"/[\w.-]+(/[\w.-]+(/(blob|tree|pull|issues|releases|commit)/\S+)?)?/?(#[\w-]+)?$",
    "huggingface.co": r"/((datasets|docs|spaces|papers|blog)/\S+|[\w.-]+(/[\w.-]+)?)$",
}
ANYWHERE = re.compile(r"https://(?P<host>[a-z0-9-]+(\.[a-z0-9-]+)+)(?P<path>/[^\s]*)?$", re.I)
FETCHED = re.compile(
    r"<(?:script|img|link|video|source|iframe)\b[^>]*?\b(?:src|href)=\"((?:https?:)?//[^\"]*)", re.I
)
LINKED = re.compile(r'rel="(?:canonical|index|search|next|prev|author)"')


def wrong(url: str) -> str | None:
    """What is wrong with an external address, or None."""
    found = ANYWHERE.match(url)
    if not found:
        return "is not an https address"
    host, path = found["host"].lower().removeprefix("www."), found["path"] or "/"
    if host in FORMS and not re.match(FORMS[host], path):
        return f"is no address that {host} has"
    return "ends in punctuation" if re.search(r"[.,;]$", url) else None


def external(text: str) -> list[str]:
    """The addresses of other places in a page's prose."""
    return [a or b for a, b in MARKDOWN.findall(re.sub(r"```.*?```", "", text, flags=re.S))]


def prose(path: Path) -> str:
    """The Markdown of a page."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return text


def check(pages: list[Path]) -> None:
    """Raises `ValueError` naming each page with an external link that cannot be right."""
    found = [
        f"{page}: {url} {told}" for page in pages for url in external(prose(page)) if (told := wrong(url))
    ]
    if found:
        raise ValueError("\n".join(["links that cannot be right:", *found]))


def staged(text: str, folder: Path) -> str:
    """A file of the repository as a page of `guides/`: what it links to is a page, or stands in the repository."""

    def other(match: re.Match) -> str:
        path, _, anchor = match[1].partition("#")
        whole = (PurePosixPath(folder.as_posix()) / path).as_posix()
        anchor = f"#{anchor}" if anchor else ""
        if whole.startswith("nbs/"):
            return f"](/{whole.removeprefix('nbs/')}{anchor})"
        return f"]({REPOSITORY}/{whole}{anchor})"

    return RELATIVE.sub(other, text)


def check_local(out: Path) -> None:
    """Raises `ValueError` naming each built page that would fetch something from elsewhere."""
    found = []
    for page in out.rglob("*.html"):
        for match in FETCHED.finditer(page.read_text(encoding="utf-8")):
            if not LINKED.search(match[0]):
                found.append(f"{page.relative_to(out)} fetches {match[1]}")
    if found:
        raise ValueError("\n".join(["pages that need the network:", *found]))
