"""Every component's module is a program that shows the component, as a module and as a file."""

import ast
from pathlib import Path

import pytest

from vla_bench import registry
from vla_bench.registry import Registry

ROOT = Path(__file__).parents[1]
REGISTRIES = [each for each in vars(registry).values() if isinstance(each, Registry)]
OTHERS = ["vla_bench.data.lerobot", "vla_bench.data.conversations"]  # datasets, which no registry names
COMMAND = {
    "vla_bench.benchmarks.metaworld": "list",  # of a program that has several
    "vla_bench.benchmarks.maniskill_cubes": "list",
}
PARTS = {}  # module to the components in it
for each in REGISTRIES:
    for name, known in each.known.items():
        PARTS.setdefault(known.module, []).append(name)
MODULES = [*sorted(PARTS), *OTHERS]


def file_of(module: str) -> str:
    return str(ROOT / (module.replace(".", "/") + ".py"))


@pytest.mark.parametrize("module", MODULES)
def test_a_module_shows_every_component_in_it(module, server, tmp_path):
    words = [COMMAND[module], "--help"] if module in COMMAND else []
    done = server({"program": ["-m", module, *words], "cwd": str(tmp_path)})
    assert done["returncode"] == 0, done["output"]
    assert len(done["output"].splitlines()) >= 4, (
        f"{module} says nothing: end its page as `nbs/models/heads/10_mlp.ipynb`"
    )
    if module.partition("models.")[2].startswith(("heads.", "projectors.")):
        assert all(f"{name}, " in done["output"] for name in PARTS[module])
    assert not any(word in done["output"] for word in ("Warning", "Traceback", "nan")), done["output"]
    assert not list(tmp_path.iterdir()), "it leaves something behind"


@pytest.mark.parametrize("module", MODULES)
def test_a_file_says_what_it_takes(module, server, tmp_path):
    done = server({"program": [file_of(module), "--help"], "cwd": str(tmp_path)})
    assert done["returncode"] == 0 and done["output"].startswith("usage:"), done["output"]


@pytest.mark.parametrize("module", MODULES)
def test_a_wrong_word_is_one_line(module, server, tmp_path):
    words = [*filter(None, [COMMAND.get(module)]), "--no_such_argument=3"]
    done = server({"program": ["-m", module, *words], "cwd": str(tmp_path)})
    told = [line for line in done["output"].splitlines() if not line.startswith((" ", "usage:"))]
    assert done["returncode"] == 2 and len(told) == 1 and "error: " in told[0], done["output"]
    assert "no_such_argument" in told[0]


@pytest.mark.parametrize("module", MODULES)
def test_to_import_a_module_does_not_import_what_shows_it(module):
    tree = ast.parse(Path(file_of(module)).read_text(encoding="utf-8"))
    names = [node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert not [name for name in names if name.endswith("show")]


@pytest.mark.parametrize(
    "words, shown",
    [
        (["heads.mlp", "--horizon", "4", "num_queries=2"], "4 actions of 7 numbers"),
        (["heads.flow_inference", "--only", "FlowMatchingInference"], "of FlowMatching"),
        (["projectors.pixel_shuffle", "--rows", "6"], "6 x 4 patches of 32 to 3 x 2 tokens of 64"),
        (["backbones.llm", "--only", "Llama", "num_layers=2"], "width 96, 2 layers"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_sizes_and_arguments_reach_the_component(words, shown, server):
    done = server({"program": ["-m", f"vla_bench.models.{words[0]}", *words[1:]]})
    assert done["returncode"] == 0 and shown in done["output"], done["output"]


def test_a_backbone_of_ones_own_is_shown(server, tmp_path):
    assert not server(
        {"program": ["-m", "vla_bench.models.backbones.tiny", "paligemma", "--out", str(tmp_path)]}
    )["returncode"]
    done = server(
        {
            "program": [
                "-m",
                "vla_bench.models.backbones.qwen",
                "--base_vlm",
                str(tmp_path),
                "--only",
                "qwen3_vl",
            ]
        }
    )
    assert done["output"].startswith(f"PaliGemma, {tmp_path}"), done["output"]
    done = server(
        {"program": ["-m", "vla_bench.models.backbones.qwen", "--base_vlm", str(tmp_path / "nowhere")]}
    )
    assert done["returncode"] == 2 and "nowhere" in done["output"] and "Traceback" not in done["output"]


@pytest.fixture
def configured(tmp_path):
    """A configuration that names the dataset of the fixtures, and its folder."""
    root = ROOT / "tests/fixtures/version_0_1/dataset"
    path = tmp_path / "train.yaml"
    path.write_text(
        f"run_root_dir: runs\nrun_id: r\nframework: {{name: OFT, action_horizon: 3}}\n"
        f"datasets: {{vla_data: {{root: {root}, held_out: 0.2}}}}\ntrainer: {{max_train_steps: 5}}\n"
    )
    return path, root


@pytest.mark.parametrize("as_file", [False, True], ids=["module", "file"])
def test_a_dataset_is_shown_as_a_configuration_names_it(as_file, configured, server):
    path, root = configured
    program = [file_of(OTHERS[0])] if as_file else ["-m", OTHERS[0]]
    done = server({"program": [*program, "--config_yaml", str(path)]})
    assert done["returncode"] == 0 and done["output"].startswith(f"{root}: LeRobot"), done["output"]
    action = next(line for line in done["output"].splitlines() if line.split()[0] == "action")
    assert len(ast.literal_eval(action.split(maxsplit=1)[1])) == 3  # the framework's horizon


@pytest.mark.parametrize(
    "words, named",
    [
        (["framework.action_horizon=0"], "horizon must be at least 1"),
        (["datasets.vla_data.root=nowhere"], "nowhere"),
        (["datasets.vla_data.root=null"], "datasets.vla_data.root must be a dataset's folder"),
        (["datasets.vla_data.cameras=[wrist]"], "no camera 'wrist'"),
        (["trainer.sed=1"], "nothing reads 'trainer.sed'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_is_wrong_with_a_configured_dataset_is_one_line(words, named, configured, server):
    done = server({"program": ["-m", OTHERS[0], "--config_yaml", str(configured[0]), *words]})
    assert done["returncode"] in (1, 2) and named in done["output"], done["output"]
    assert len(done["output"].splitlines()) == 1
