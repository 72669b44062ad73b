"""What every built page repeats is kept once or left out: icons, white space of templates, tags without an effect."""

import json
import re
from pathlib import Path

ICONS = re.compile(
    r'<svg xmlns="http://www.w3.org/2000/svg" style="display: none;">.*?</svg>\s*(?=<input)', re.S
)
# Tags around what has, or may have, the colour of the text; and words that no style of ours reads.
PLAIN = re.compile(r'<span class="(?:o|mi|mf|nb|bp|si|pre)">([^<]*)</span>')
UNREAD = (' title="Link to this heading"', "docutils literal notranslate"), ("", "literal")
PRE = re.compile(r"(<(pre|script|style|textarea)\b.*?</\2>)", re.S)


def without_space(page: str) -> str:
    """The page with one line end where templates leave many blanks; code stays as it is."""
    parts = PRE.split(page)  # text, a whole block, its tag, text, …
    texts = [re.sub(r"\s*\n\s*", "\n", part) for part in parts[0::3]]
    blocks = [*parts[1::3], ""]
    return "".join(text + block for text, block in zip(texts, blocks))


def lighten(out: Path) -> None:
    """Rewrites every page of a built documentation. The theme's icons move to one script, which each page loads."""
    icons = ""
    for path in out.rglob("*.html"):
        page = path.read_text(encoding="utf-8")
        if found := ICONS.search(page):
            icons = found[0].strip()
            up = "../" * (len(path.relative_to(out).parts) - 1)
            page = ICONS.sub(f'<script src="{up}_static/icons.js"></script>', page)
        page = PLAIN.sub(r"\1", page)
        for words, shorter in zip(*UNREAD):
            page = page.replace(words, shorter)
        path.write_text(without_space(page), encoding="utf-8")
    if icons:
        (out / "_static/icons.js").write_text(f"document.write({json.dumps(icons)});\n", encoding="utf-8")
