"""Build `_docs/`: stage notebooks, hand-written pages and the reference, then run Sphinx with warnings as errors.

Every notebook of `nbs/` is a page (see `notebooks.py`), every module has a page of the reference (see `reference.py`),
and `docs/pages` holds what is written for the documentation alone.
"""

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import links
import nbformat
import reference
from lighter import lighten
from nbformat.v4 import new_markdown_cell
from notebooks import readable, with_light_outputs
from results import write_results

ROOT = Path(__file__).parents[1]
STAGE, OUT = ROOT / "_site_src", ROOT / "_docs"
MATHJAX = "sphinx-mathjax-offline/static/mathjax/tex-svg.js"  # one file, fonts included
LIMIT = 28_000_000  # bytes of all pages together
SECTIONS = (
    "install",
    "quickstart",
    "tutorials/index",
    "guides/index",
    "concepts",
    "reference/index",
    "results/index",
)
# Of the notebooks: title and folder; the tutorials are a section of their own.
CONCEPTS = {
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
}
GUIDES = (
    "from_starvla",
    "from_fluxvla",
    "from_lerobot",
    "from_openpi",
    "architecture",
    "contributing",
    "mutants",
    "changes",
)


def toctree(names: list[str], hidden: bool = True) -> str:
    """A table of contents as MyST; `names` are pages, seen from the top."""
    options = ":hidden:\n" if hidden else ":maxdepth: 1\n"
    return "```{toctree}\n" + options + "\n" + "\n".join(f"/{name}" for name in names) + "\n```\n"


def subtitle(page: Path) -> str:
    """A notebook's title and the line below it, as an entry of a list with a link."""
    first = nbformat.read(page, 4).cells[0].source
    title, _, rest = first.partition("\n")
    told = re.search(r"^> (.+)$", rest, re.M)
    return f"- [{title.lstrip('# ')}](/{page.relative_to(STAGE).as_posix()}){': ' + told[1] if told else ''}"


def listing(title: str, pages: list[Path], before: str = "") -> str:
    """A page that lists others, each with its subtitle."""
    names = [page.relative_to(STAGE).with_suffix("").as_posix() for page in pages]
    return f"# {title}\n\n{before}\n\n" + "\n".join(map(subtitle, pages)) + "\n\n" + toctree(names)


def stage_notebooks() -> list[Path]:
    """Copies every notebook, made readable; the package's own index becomes the first page of the concepts."""
    pages = []
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        if ".ipynb_checkpoints" in path.parts:
            continue
        page = STAGE / path.relative_to(ROOT / "nbs")
        page = page.with_stem("concepts") if page == STAGE / "index.ipynb" else page
        page.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(with_light_outputs(readable(nbformat.read(path, 4))), page)
        pages.append(page)
    return pages


def list_concepts(pages: list[Path]) -> None:
    """A page per package, and a table of contents of them. Raises `ValueError` for a page that is in none."""
    concepts = STAGE / "concepts.ipynb"
    folders = {page.parent.relative_to(STAGE).as_posix() for page in pages} - {".", "tutorials", "templates"}
    if left := folders - set(CONCEPTS.values()):
        raise ValueError(f"no table of contents shows {sorted(left)}: add them to CONCEPTS in docs/build.py")
    lists = []
    for title, folder in CONCEPTS.items():
        inside = [page for page in pages if page.parent == STAGE / folder and page != concepts]
        if inside:
            name = f"{folder}/index" if folder else "foundations"
            (STAGE / f"{name}.md").write_text(listing(title, inside), encoding="utf-8")
            lists.append(name)
    index = nbformat.read(concepts, 4)
    index.cells[
        0
    ].source = "# Concepts\n\n> Every module is a notebook that explains one idea, shows it, and tests it"
    index.cells.append(new_markdown_cell(toctree(lists)))
    nbformat.write(index, concepts)


def list_tutorials(pages: list[Path]) -> None:
    """The tutorials, and the notebooks that `vla_bench new` copies."""
    inside = [page for name in ("tutorials", "templates") for page in pages if page.parent == STAGE / name]
    before = "Each runs from top to bottom on a CPU. The last three are what `vla_bench new` copies."
    (STAGE / "tutorials/index.md").write_text(listing("Tutorials", inside, before), encoding="utf-8")


def stage_guides() -> None:
    """The hand-written pages, and the files of the repository that are pages as well."""
    shutil.copytree(ROOT / "docs/pages", STAGE, dirs_exist_ok=True)
    files = {"contributing": "CONTRIBUTING.md", "changes": "CHANGELOG.md", "mutants": "docs/mutants.md"}
    for name, path in files.items():
        text = (ROOT / path).read_text(encoding="utf-8")
        (STAGE / f"guides/{name}.md").write_text(links.staged(text, Path(path).parent), encoding="utf-8")
    told = [f"- [](/guides/{name}.md)" for name in GUIDES]
    guides = "# Guides\n\n" + "\n".join(told) + "\n\n" + toctree([f"guides/{name}" for name in GUIDES])
    (STAGE / "guides/index.md").write_text(guides, encoding="utf-8")
    with (STAGE / "index.md").open("a", encoding="utf-8") as index:
        index.write("\n" + toctree(list(SECTIONS)))


def stage_reference() -> None:
    """A page per module, listed by package."""
    folder, packages = STAGE / "reference", {}
    folder.mkdir()
    for module in reference.modules(ROOT):
        name = ".".join(module.relative_to(ROOT / "vla_bench").with_suffix("").parts)
        (folder / f"{name}.md").write_text(reference.page(module, ROOT), encoding="utf-8")
        packages.setdefault(name.rpartition(".")[0], []).append(name)
    groups = []
    for package, names in packages.items():
        group = package or "vla_bench"
        told = "\n".join(f"- [`{name}`](/reference/{name}.md)" for name in names)
        text = f"# {group}\n\n{told}\n\n{toctree([f'reference/{name}' for name in names])}"
        (folder / f"package.{group}.md").write_text(text, encoding="utf-8")
        groups.append(f"reference/package.{group}")
    told = "Every public class and function, from its source: how it is called, what it says, and where it stands."
    (folder / "index.md").write_text(
        f"# Reference\n\n{told}\n\n{toctree(groups, hidden=False)}", encoding="utf-8"
    )


def stage_static() -> None:
    """Styles, MathJax, the figures, and the rollout of the first page."""
    from PIL import Image

    from vla_bench.evaluation.rollout import Recording
    from vla_bench.viz.attention import attention_frames

    shutil.copy(ROOT / "docs/conf.py", STAGE)
    shutil.copytree(ROOT / "docs/_static", STAGE / "_static")
    (STAGE / "_static/mathjax").mkdir()
    shutil.copy(distribution("sphinx-mathjax-offline").locate_file(MATHJAX), STAGE / "_static/mathjax")
    shutil.copytree(ROOT / "figures", STAGE / "figures", ignore=shutil.ignore_patterns("*.ipynb", ".gitkeep"))
    recording = Recording.load(ROOT / "nbs/viz/recording.npz")
    first, *rest = [Image.fromarray(frame) for frame in attention_frames(recording, height=320)]
    first.save(
        STAGE / "_static/rollout.webp", save_all=True, append_images=rest, duration=80, loop=0, quality=70
    )


def stage() -> int:
    """Everything that Sphinx reads; returns how many pages there are."""
    shutil.rmtree(STAGE, ignore_errors=True)
    pages = stage_notebooks()
    list_concepts(pages)
    list_tutorials(pages)
    stage_guides()
    stage_reference()
    write_results(ROOT, STAGE)
    stage_static()
    every = [path for path in STAGE.rglob("*") if path.suffix in (".md", ".ipynb")]
    links.check(every)
    return len(every)


def main() -> None:
    count = stage()
    shutil.rmtree(OUT, ignore_errors=True)
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "-W",
        "--keep-going",
        "-b",
        "html",
        "-d",
        STAGE / "doctrees",
        STAGE,
        OUT,
    ]
    if code := subprocess.call(
        [str(part) for part in command], env=os.environ | {"PYTHONWARNINGS": "ignore"}
    ):
        raise SystemExit(code)
    shutil.rmtree(OUT / "_sources", ignore_errors=True)  # an empty folder: html_copy_source is off
    lighten(OUT)
    links.check_local(OUT)
    size = sum(path.stat().st_size for path in OUT.rglob("*") if path.is_file())
    print(f"{count} pages in {OUT.relative_to(ROOT)}, {size / 1e6:.1f} MB")
    if size > LIMIT:
        raise SystemExit(
            f"the pages are larger than {LIMIT / 1e6:.0f} MB: look for images and outputs that grew"
        )


if __name__ == "__main__":
    main()
