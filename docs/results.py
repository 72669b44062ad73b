"""The section "Results": the leaderboard of the stored evaluations, the protocols, what fits what, the figures.

An evaluation is stored by copying its `summary.json` to `docs/results/RUN/eval/BENCHMARK/`.
"""

import re
from pathlib import Path


def leaderboard(root: Path) -> str:
    """The stored evaluations, and the table of the README."""
    from vla_bench.evaluation.results import leaderboard_markdown

    readme = (root / "README.md").read_text(encoding="utf-8")
    (own,) = re.findall(r"^## Results of the quickstart\n\n(.*?)\n\n", readme, re.M | re.S)
    return f"""# The leaderboard

Rates with exact 95% intervals. [A column is a protocol](/evaluation/36_protocols.ipynb), named by eight digits: numbers of two columns say nothing about each other.

{leaderboard_markdown(root / "docs/results")}
The table is what `vla_bench results FOLDER --out board.md` writes for the runs of [a folder](/evaluation/40_results.ipynb). An evaluation joins it when its `summary.json` is copied to `docs/results/RUN/eval/BENCHMARK/`.

## Frameworks on the quickstart's data

{own}

Each task has its own scene, so this shows that the pipeline learns, not that a policy understands language.
"""


def protocols() -> str:
    """What every benchmark that can be asked here declares."""
    from vla_bench.registry import BENCHMARKS, RegistryError

    rows, missing = [], []
    for name in BENCHMARKS.names():
        try:
            spec = BENCHMARKS.get(name)().spec
        except (RegistryError, ImportError, FileNotFoundError):
            missing.append(name)
            continue
        cells = (
            f"`{spec.name}`", spec.protocol, ", ".join(spec.cameras), "×".join(map(str, spec.image_size)),
            ", ".join(spec.action.names), spec.action.units, f"{spec.control_rate:g}", str(spec.max_steps),
        )  # fmt: skip
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    head = "| benchmark | protocol | cameras | image | action | units | Hz | steps |\n|---|---|---|---|---|---|---|---|"
    others = ", ".join(f"`{name}`" for name in missing)
    rest = f"\n\nDeclared where their simulators are installed: {others}." if missing else ""
    return f"""# The benchmarks

A benchmark declares what it expects of a policy and how it counts; a policy that does not fit is refused before the first episode. These are the sizes that each has without arguments; a run asks for its own cameras and image size.

{head}
{chr(10).join(rows)}{rest}

More about each: [MetaWorld](/benchmarks/10_metaworld.ipynb), [LIBERO](/benchmarks/24_libero.ipynb), [the point on a table](/benchmarks/05_point.ipynb), and [the interface](/benchmarks/00_benchmark.ipynb). What belongs to a protocol, and when two numbers may be compared: [Protocols](/evaluation/36_protocols.ipynb).
"""


def figures(root: Path) -> str:
    """Every figure, with the notebook that draws it."""
    drawn = [path for path in sorted((root / "figures").iterdir()) if path.suffix in (".jpg", ".png", ".svg")]
    shown = "\n\n".join(
        f"## {path.stem.replace('_', ' ').capitalize()}\n\n![{path.stem}](/figures/{path.name})"
        for path in drawn
    )
    return f"# Figures\n\n`make figures` draws them anew, from the runs in `experiments/runs`.\n\n{shown}\n"


def write_results(root: Path, stage: Path) -> None:
    """Writes the section, with a table of contents."""
    folder = stage / "results"
    folder.mkdir(exist_ok=True)
    texts = {"leaderboard": leaderboard(root), "benchmarks": protocols(), "figures": figures(root)}
    for name, text in texts.items():
        (folder / f"{name}.md").write_text(text, encoding="utf-8")
    told = """# Results

- [The leaderboard](/results/leaderboard.md): success rates with exact intervals, a column for each protocol
- [The benchmarks](/results/benchmarks.md): what each expects of a policy, and how it counts
- [The grid, measured](/models/96_compatibility_grid.ipynb): every backbone with every head that can read it
- [Figures](/results/figures.md)

```{toctree}
:hidden:

/results/leaderboard
/results/benchmarks
/results/figures
```
"""
    (folder / "index.md").write_text(told, encoding="utf-8")
