"""A training starts from the weights of another run, all of them or some modules, and says what it loaded."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vla_bench.config import ConfigError, load_config
from vla_bench.models.frameworks.build import build_framework
from vla_bench.models.frameworks.framework import Framework
from vla_bench.models.interop.weights import read_weights
from vla_bench.training.checkpoint import latest_checkpoint
from vla_bench.training.imitation import train
from vla_bench.training.pretrained import our_names
from vla_bench.training.run import set_up


@pytest.fixture(scope="module")
def first(home, tmp_path_factory):
    """A run of three steps with another seed, and checkpoints at steps 1 to 3."""
    folder = tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        options = f"--run_root_dir {folder} --seed 5 --trainer.max_train_steps 3 --trainer.save_interval 1"
        return train(load_config(home / "toy.yaml", f"{options} --trainer.warmup_steps 0"))


def weights_of(framework) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in framework.state_dict().items()}


def same(found, expected, prefix="") -> set[bool]:
    """Whether the tensors of a module are those of `expected`."""
    return {torch.equal(found[name], expected[name]) for name in expected if name.startswith(prefix)}


@pytest.fixture
def fresh(config):
    return weights_of(set_up(config("--run_id fresh")).framework)


WAYS = {
    "a run": lambda run: run,
    "a checkpoint": lambda run: latest_checkpoint(run),
    "a file": lambda run: latest_checkpoint(run) / "model.safetensors",
}


@pytest.mark.parametrize("way", WAYS)
def test_everything_is_loaded_without_modules(config, first, capsys, way):
    run = set_up(config(f"--trainer.pretrained_checkpoint {WAYS[way](first)}"))
    assert same(weights_of(run.framework), load_file(latest_checkpoint(first) / "model.safetensors")) == {
        True
    }
    assert f"loaded everything from {WAYS[way](first)}; as it was built: nothing" in capsys.readouterr().err
    assert run.step == 0 and run.optimizer.state_dict()["state"] == {}


@pytest.mark.parametrize("spelling", ["action_model", "[action_model]", "' action_model, '"])
def test_only_the_modules_that_are_named_are_loaded(config, first, fresh, capsys, spelling):
    options = ["trainer.reload_modules=" + spelling, f"trainer.pretrained_checkpoint={first}"]
    found = weights_of(set_up(config(options)).framework)
    expected = load_file(latest_checkpoint(first) / "model.safetensors")
    assert same(found, expected, "action_model.") == {True}
    assert same(found, fresh, "vlm.") == {True} and False in same(found, expected, "vlm.")
    said = capsys.readouterr().err
    assert (
        f"loaded action_model from {first}; as it was built: queries (1 tensors), vlm (32 tensors), state_encoder (2 tensors)\n"
        in said
    )


@pytest.mark.parametrize("path", ["qwen_vl_interface", "vlm", "vlm.model.model.visual"])
def test_starvla_weights_come_under_starvla_names(config, first, tmp_path, path):
    theirs = load_file(latest_checkpoint(first) / "model.safetensors")
    renamed = {name.replace("vlm.", "module.qwen_vl_interface.", 1) if name[:4] == "vlm." else f"module.{name}": t
               for name, t in theirs.items()}  # fmt: skip
    torch.save(renamed, tmp_path / "steps_3_pytorch_model.pt")
    options = (
        f"--trainer.pretrained_checkpoint {tmp_path}/steps_3_pytorch_model.pt --trainer.reload_modules {path}"
    )
    found = weights_of(set_up(config(options)).framework)
    assert same(found, theirs, path.replace("qwen_vl_interface", "vlm") + ".") == {True}


def test_a_module_that_only_starvla_has_is_said_to_be_nothing(config, first, capsys):
    """As StarVLA's page writes it: `reload_modules: "action_model,layer_qformer"`."""
    options = [f"trainer.pretrained_checkpoint={first}", "trainer.reload_modules=action_model,layer_qformer"]
    found = weights_of(set_up(config(options)).framework)
    assert same(found, load_file(latest_checkpoint(first) / "model.safetensors"), "action_model.") == {True}
    said = capsys.readouterr().err
    assert (
        "trainer.reload_modules: this framework has no layer_qformer, so the name stands for nothing\n"
        in said
    )
    with pytest.raises(ConfigError, match="names nothing that this framework has: layer_qformer"):
        set_up(config([options[0], "trainer.reload_modules=layer_qformer", "run_id=none"]))


def test_the_training_begins_with_these_weights(config, first, losses):
    options = f"--trainer.pretrained_checkpoint {first} --trainer.max_train_steps 1 --trainer.warmup_steps 0"
    ((_, loss, _),) = losses(train(config(options)))
    probe = set_up(config("--run_id probe"))
    samples = [probe.view[key] for key in probe.sampler().batch(0)]
    expected = Framework.from_pretrained(latest_checkpoint(first)).forward(samples)["action_loss"]
    assert loss == pytest.approx(expected.item(), rel=1e-5)


def test_a_resumed_run_does_not_load_again(config, first, tmp_path, losses):
    source = shutil.copytree(first, tmp_path / "source")
    options = f"--trainer.pretrained_checkpoint {source} --trainer.reload_modules vlm"
    expected = losses(train(config(f"{options} --run_id straight")))
    run = train(config(options))
    shutil.rmtree(source)
    shutil.rmtree(latest_checkpoint(run))
    assert losses(train(load_config(run, "--trainer.resume true"))) == expected


REFUSED = [
    ("", "", "it lacks 1 tensors, action_model.layers.2.weight"),
    ("action_model", "", "does not fit action_model: it lacks 1 tensors, action_model.layers.2.weight"),
    ("action_modle", "", "the model has no module 'action_modle'; did you mean 'action_model'"),
    (
        "vlm.model.visua",
        "",
        "the model has no module 'vlm.model.visua'; did you mean 'vlm.model.lm_head'? choices: vlm.model.lm_head, vlm.model.model",
    ),
    ("action_model.layers.2.weight", "", "name the module that holds it"),
    ("action_model", "rename", "did you mean 'layers.2.weight'"),
    ("action_model", "shape", "is [4, 32] there and [6, 32] here"),
    (
        "action_model",
        "gone",
        "holds nothing of 'action_model'; at the top there are queries, state_encoder, vlm",
    ),
    ("action_model", "nan", "holds numbers that are not finite"),
]


@pytest.mark.parametrize("modules, damage, message", REFUSED)
def test_what_does_not_fit_is_refused_in_one_line(config, first, tmp_path, modules, damage, message):
    weights = load_file(latest_checkpoint(first) / "model.safetensors")
    queries = weights.pop("action_model.layers.2.weight")
    if damage == "gone":
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith("action_model")}
    changed = {"rename": ("layers.2.wieght", queries), "shape": ("layers.2.weight", torch.zeros(4, 32))}
    changed["nan"] = ("layers.2.weight", queries * torch.nan)
    if damage in changed:
        weights["action_model." + changed[damage][0]] = changed[damage][1]
    torch.save(weights, tmp_path / "odd.pt")
    options = [f"trainer.pretrained_checkpoint={tmp_path}/odd.pt", f"run_root_dir={tmp_path}/runs"]
    options += [f"trainer.reload_modules={modules}"] if modules else []
    with pytest.raises(ValueError) as error:
        set_up(config(options))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("key", ["trainer.pretrained_checkpoint", "framework.pretrained_name_or_path"])
def test_a_path_that_leads_nowhere_is_refused(config, tmp_path, key):
    with pytest.raises(FileNotFoundError, match="no weights at"):
        set_up(config([f"{key}={tmp_path}/nowhere"]))


def test_modules_without_weights_to_load_are_refused(config):
    with pytest.raises(ConfigError, match="reload_modules needs trainer.pretrained_checkpoint"):
        set_up(config("--trainer.reload_modules vlm"))


@pytest.fixture
def damaged(first, tmp_path):
    """The run, its newest checkpoint damaged."""
    run = shutil.copytree(first, tmp_path / "damaged")
    file = latest_checkpoint(run) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    return run


def test_a_run_folder_means_its_newest_whole_checkpoint(config, first, damaged, capsys):
    expected = load_file(first / "checkpoints/step_000002/model.safetensors")
    section = config([f"framework.pretrained_name_or_path={damaged}"]).section("framework").to_dict()
    built = build_framework(section, action_dim=3, state_dim=2)
    assert same(weights_of(built), expected) == {True}
    run = set_up(config(f"--trainer.pretrained_checkpoint {damaged}"))
    assert same(weights_of(run.framework), expected) == {True}
    assert same(weights_of(Framework.from_pretrained(damaged)), expected) == {True}
    assert same(read_weights(damaged), expected) == {True}
    assert "not taken, step_000003: " in capsys.readouterr().err


def test_a_run_without_a_whole_checkpoint_is_refused(config, damaged):
    for file in damaged.rglob("model.safetensors"):
        file.write_bytes(b"")
    with pytest.raises(ValueError, match="none of its 3 checkpoints is whole"):
        set_up(config([f"framework.pretrained_name_or_path={damaged}"]))


OLD = Path(__file__).parents[1] / "fixtures/version_0_1"


@pytest.mark.parametrize("modules", [None, "action_model", "[action_model, vlm]"])
def test_weights_of_version_0_1_come_under_their_present_names(tmp_path, monkeypatch, modules):
    shutil.copytree(OLD, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    options = ["run_id=new", "seed=8", "trainer.pretrained_checkpoint=runs/llava"]
    options += [f"trainer.reload_modules={modules}"] if modules else []
    found = weights_of(set_up(load_config("runs/llava", options)).framework)
    theirs = load_file(OLD / "runs/llava/checkpoints/step_000003/model.safetensors")
    renamed = {"action_model.blanks": "action_model.action_queries"}
    assert renamed.keys() <= theirs.keys()
    theirs = {renamed.get(name, name): tensor for name, tensor in theirs.items()}
    parts = ("action_model.", "vlm.") if modules != "action_model" else ("action_model.",)
    for part in parts:
        assert same(found, theirs, part) == {True}
    if modules == "action_model":
        assert False in same(found, theirs, "vlm.")


def test_a_frameworks_own_modules_and_its_heads_have_their_present_names():
    framework = Framework.from_pretrained(OLD / "gr00t")
    present = list(framework.state_dict())
    renamed = {**framework.renamed_parameters, **framework.action_model.renamed_parameters}
    assert renamed
    old = {name: 0 for name in present}
    for before, now in framework.renamed_parameters.items():
        old = {
            name.replace(f"{now}.", f"{before}.", 1) if name.startswith(f"{now}.") else name: 0
            for name in old
        }
    assert (
        list(our_names(framework, old)) == present
        and list(our_names(framework, dict.fromkeys(present))) == present
    )
