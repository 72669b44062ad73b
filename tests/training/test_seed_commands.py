"""StarVLA's own commands, with our module's path in place of their script's, on tiny data."""

import json
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from vla_bench.config import parse_cli
from vla_bench.files import list_checkpoints
from vla_bench.models.frameworks.framework import Framework
from vla_bench.training import cotrain, imitation, vlm
from vla_bench.training.loop import read_metrics
from vla_bench.training.run import set_up

PROGRAMS = {"imitation": imitation, "cotrain": cotrain, "vlm": vlm}


@pytest.fixture
def yamls(config, tmp_path):
    """`yamls[program]`: a YAML file of each strategy in the seeds' spelling, without a place for the run."""
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    turns = [{"from": "human", "value": "<image>\nclose"}, {"from": "gpt", "value": "the box"}]
    (tmp_path / "talk.json").write_text(json.dumps([{"image": "red.png", "conversations": turns}] * 3))
    place = {"annotation_path": str(tmp_path / "talk.json"), "data_path": str(tmp_path)}
    talk = {
        "dataset_py": "vlm_datasets",
        "dataformat": "llava_json",
        "dataset_use": "talk",
        "data_dict": {"talk": place},
    }
    tree = config("", "GR00T").to_dict()
    tree["framework"]["name"] = "OFT"  # the command says which
    del tree["run_root_dir"], tree["run_id"], tree["framework"]["vlm"]
    tree["trainer"] |= {"max_train_steps": 2, "warmup_steps": 0, "save_interval": 2}
    datasets = {
        "imitation": tree["datasets"],
        "cotrain": tree["datasets"] | {"vlm_data": talk},
        "vlm": {"vlm_data": talk},
    }
    found = {}
    for program, own in datasets.items():
        trainer = dict(tree["trainer"])
        if program == "vlm":
            del trainer["per_device_batch_size"]
        found[program] = tmp_path / f"{program}.yaml"
        found[program].write_text(json.dumps({**tree, "datasets": own, "trainer": trainer}))  # JSON is YAML
    return found


@pytest.fixture
def words(home, yamls, tmp_path):
    """`words(program, *more)`: the options of the seeds' commands."""

    def made(program, *more, run_id="seeds"):
        return [
            *("--config_yaml", str(yamls[program])),
            *("--framework.framework_py", "QwenGR00T"),
            *("--framework.qwenvl.base_vlm", str(home / "tiny")),
            *("--run_root_dir", str(tmp_path / "runs")),
            *("--run_id", run_id),
            *more,
        ]

    return made


def losses(run):
    return [row["loss"] for row in read_metrics(run / "metrics.jsonl") if "loss" in row]


ACCOUNT = ("--wandb_project", "your_project", "--wandb_entity", "your_name")


@pytest.mark.parametrize("program", PROGRAMS)
def test_each_command_runs_under_accelerate_launch(words, program, tmp_path):
    """The FAQ's "Train with a smaller VLM", on one process."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "WANDB_MODE": "offline",
    }
    environment |= {"WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "1",
        "--num_machines",
    ]
    launch += ["1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command = [*launch, "-m", f"vla_bench.training.{program}", *words(program, *ACCOUNT)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "runs" / "seeds"
    assert str(run) in done.stdout and len(losses(run)) == 2
    if program != "vlm":
        assert type(Framework.from_pretrained(run)).__name__ == "GR00T"


@pytest.mark.parametrize("program", ["imitation", "cotrain"])
def test_modules_are_frozen_by_the_seeds_paths(words, program):
    """ "Can I freeze the VLM via parameters?" """
    paths = "qwen_vl_interface.model.model.visual,dino_encoder"
    cfg = parse_cli(words(program, "--trainer.freeze_modules", paths), "")
    others = {"imitation": {}, "cotrain": {"read_others": cotrain.read_conversations}}[program]
    run = set_up(cfg, **others)
    visual = [
        p.requires_grad
        for n, p in run.framework.named_parameters()
        if n.startswith("vlm.model.model.visual.")
    ]
    assert visual and not any(visual)
    assert any(p.requires_grad for n, p in run.framework.named_parameters() if ".language_model." in n)


@pytest.mark.parametrize("program", ["imitation", "cotrain"])
def test_modules_have_rates_of_their_own(words, program):
    """ "Can I set different learning rates for different modules?" """
    rates = ("base", "1e-05", "qwen_vl_interface", "2.0e-05", "action_model", "1.0e-04")
    options = [
        word
        for name, rate in zip(rates[::2], rates[1::2])
        for word in (f"--trainer.learning_rate.{name}", rate)
    ]
    cfg = parse_cli(words(program, *options), "")
    others = {"imitation": {}, "cotrain": {"read_others": cotrain.read_conversations}}[program]
    groups = {
        group["name"].removesuffix("/no_decay"): group["initial_lr"]
        for group in set_up(cfg, **others).optimizer.param_groups
    }
    assert groups == {"vlm": 2e-5, "action_model": 1e-4} or groups == {
        "base": 1e-5,
        "vlm": 2e-5,
        "action_model": 1e-4,
    }


@pytest.mark.parametrize("reload", ["action_model", "qwen_vl_interface", None])
def test_weights_are_taken_from_another_run(words, reload, tmp_path):
    """ "Can I resume training from a checkpoint?": some modules, or all of them where none is named."""
    first = imitation.train(parse_cli(words("imitation", "--seed", "1", run_id="first"), ""))
    checkpoint = list_checkpoints(first)[-1] / "model.safetensors"
    options = ["--trainer.pretrained_checkpoint", str(checkpoint)]
    options += ["--trainer.reload_modules", reload] if reload else []
    run = set_up(parse_cli(words("imitation", *options, run_id="second"), ""))
    theirs, ours = load_file(checkpoint), run.framework.state_dict()
    same = {key for key, value in theirs.items() if torch.equal(ours[key], value)}
    prefix = {"action_model": "action_model.", "qwen_vl_interface": "vlm.", None: ""}[reload]
    assert {key for key in theirs if key.startswith(prefix)} <= same
    assert (
        reload is None
        or not {key for key in theirs if not key.startswith(prefix) and theirs[key].std() > 0} <= same
    )


def test_an_argument_of_ones_own_may_be_added(words):
    """ "Can I override or add parameters via the terminal?": a key for one's own code begins with +."""
    cfg = parse_cli(words("imitation", "--+framework.action_model.new_module", "mine"), "")
    assert set_up(cfg).step == 0 and cfg.get("framework.action_model.new_module") == "mine"


def test_the_loss_of_language_has_the_seeds_weight(words):
    run = cotrain.train(parse_cli(words("cotrain", "--trainer.loss_scale.vlm", "0.1"), ""))
    row = next(row for row in read_metrics(run / "metrics.jsonl") if "loss" in row)
    assert row["loss"] == pytest.approx(row["action_loss"] + 0.1 * row["language_loss"], rel=1e-5)
