"""Training keeps its promises: the same numbers for the same seed, after a restart, and after a kill; and it refuses."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from vla_bench.config import ConfigError, load_config
from vla_bench.data.layout import Layout
from vla_bench.data.lerobot import LeRobotDataset
from vla_bench.data.writer import LeRobotWriter
from vla_bench.models.backbones.tiny import write_tiny
from vla_bench.models.backbones.tiny_composed import write_tiny_composed
from vla_bench.serving.policy import Policy
from vla_bench.training import imitation
from vla_bench.training.checkpoint import latest_checkpoint, list_checkpoints
from vla_bench.training.imitation import train, update
from vla_bench.training.run import set_up
from vla_bench.training.loop import AugmentedView, make_loader, read_metrics

HEADS = {
    "OFT": {"type": "MLP", "hidden_size": 32, "num_queries": 2},
    "GR00T": {"type": "FlowMatching", "hidden_size": 32, "num_layers": 1, "num_heads": 2},
    "OpenVLA": {"type": "Bins", "first_token_id": 0},
    "PI05": {"type": "ActionExpert", "hidden_size": 32, "intermediate_size": 64, "num_heads": 4},
}
LENGTHS = (9, 7, 8, 6, 9, 7)  # frames per episode
ACTION = Layout(("dx", "dy", "gripper"), kind="delta", frame="world", units="m", gripper="positive_closes")
STATE = Layout(("x", "y"), frame="world", units="m")


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a dataset of random pictures and a tiny VLM."""
    home = tmp_path_factory.mktemp("training")
    rng = np.random.default_rng(0)
    cameras = {"front": (32, 32), "wrist": (32, 32)}
    with LeRobotWriter(home / "toy", fps=10, cameras=cameras, state=STATE, action=ACTION) as writer:
        for frames in LENGTHS:
            images = {name: rng.integers(0, 255, (frames, 32, 32, 3), np.uint8) for name in cameras}
            action = (rng.normal(size=(frames, 3)) * [0.01, 0.1, 1.0] + [0.5, 0.0, 0.0]).astype(np.float32)
            state = rng.normal(size=(frames, 2)).astype(np.float32)
            writer.add_episode(images=images, state=state, action=action, task="close the box")
    size = {
        "image_size": 32,
        "hidden_size": 32,
        "num_layers": 1,
        "vision_hidden_size": 32,
        "vision_layers": 1,
    }
    write_tiny("qwen2_5_vl", home / "tiny", corpus=["close the box"], **size)
    return home


def config(home: Path, overrides: str = "", framework: str = "OFT"):
    """Six steps on the toy data; every step logged."""
    tree = {
        "run_root_dir": str(home / "runs"),
        "run_id": "run",
        "seed": 0,
        "framework": {
            "name": framework,
            "vlm": {"base_vlm": str(home / "tiny")},
            "action_horizon": 4,
            "action_model": HEADS[framework],
        },
        "datasets": {
            "vla_data": {"root": str(home / "toy"), "held_out": 0.3, "shift_pixels": 2, "state_noise": 0.02}
        },
        "trainer": {
            "max_train_steps": 6,
            "per_device_batch_size": 4,
            "learning_rate": {"base": 1e-3, "vlm": 1e-4},
            "weight_decay": 0.01,
            "warmup_steps": 2,
            "num_workers": 0,
            "log_interval": 1,
            "eval_interval": 1000,
            "save_interval": 3,
        },
    }
    return load_config(tree, overrides)


def losses(run: Path) -> list[tuple[int, float, float]]:
    """Step, loss and gradient norm of each logged step."""
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "loss" in row]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows]


@pytest.fixture(scope="module", params=["OFT", "GR00T"])
def straight(request, home) -> tuple[str, Path, list]:
    """An uninterrupted run of each framework: its name, folder and losses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        run = train(config(home, f"--run_id straight_{request.param}", request.param))
    return request.param, run, losses(run)


def test_the_same_seed_gives_the_same_losses_and_evaluation_changes_nothing(home, straight):
    name, _, expected = straight
    same = f"--run_id same_{name} --trainer.eval_interval 1 --trainer.num_workers 1"
    run = train(config(home, same, name))
    assert [step for step, _, _ in expected] == [1, 2, 3, 4, 5, 6]
    assert losses(run) == expected
    evaluated = [row for row in read_metrics(run / "metrics.jsonl") if "eval/action_error" in row]
    assert [row["step"] for row in evaluated] == [1, 2, 3, 4, 5, 6]
    assert losses(train(config(home, f"--run_id other_{name} --seed 1", name))) != expected


def test_a_resumed_run_repeats_the_losses_and_the_weights(home, straight):
    name, run, expected = straight
    weights = load_file(latest_checkpoint(run) / "model.safetensors")
    shutil.rmtree(latest_checkpoint(run))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "loss": 9.0, "grad_norm": 9.0}\n{"step": 8, "lo')
    train(load_config(run, "--trainer.resume true"))
    assert losses(run) == expected
    again = load_file(latest_checkpoint(run) / "model.safetensors")
    assert weights.keys() == again.keys()
    assert all(torch.equal(weights[key], again[key]) for key in weights)


def test_a_policy_in_bfloat16_leaves_the_training_in_float32(home, straight):
    name, _, expected = straight
    half = f"--run_id half_{name} --framework.inference_model.vlm.dtype bfloat16"
    run = train(config(home, half, name))
    weights = load_file(latest_checkpoint(run) / "model.safetensors")
    shutil.rmtree(latest_checkpoint(run))
    train(load_config(run, "--trainer.resume true"))
    assert losses(run) == expected
    again = load_file(latest_checkpoint(run) / "model.safetensors")
    assert all(torch.equal(weights[key], again[key]) for key in weights)
    served = Policy.from_pretrained(run).framework
    assert {p.dtype for p in served.vlm.parameters()} == {torch.bfloat16}


KILLED = """
import os, sys
from vla_bench.config import load_config
from vla_bench.training import checkpoint, imitation

where, source, overrides = sys.argv[1:]
owner = {"save_trainer": checkpoint, "replace": os}[where]
real = getattr(owner, where)

def killed(*args, **kwargs):
    second = "step_000004" in " ".join(map(str, args))
    if second:
        os.kill(os.getpid(), 9)
    return real(*args, **kwargs)

setattr(owner, where, killed)
imitation.train(load_config(source, overrides))
"""


@pytest.mark.parametrize("where", ["save_trainer", "replace"])
def test_kill_during_a_checkpoint_leaves_the_previous_one(home, where):
    run_id = f"--run_id killed_{where}"
    cfg = config(home, f"{run_id} --trainer.save_interval 2")
    source = home / f"killed_{where}.yaml"
    cfg.save(source)
    child = subprocess.run(
        [sys.executable, "-c", KILLED, where, source, run_id], capture_output=True, text=True
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    run = home / "runs" / f"killed_{where}"
    hidden = run / "checkpoints/.step_000004.tmp"
    assert (hidden / "model.safetensors").exists()
    assert [p.name for p in list_checkpoints(run)] == ["step_000002"]
    assert np.isfinite(Policy.from_pretrained(run).predict(observation(), seed=0)).all()
    train(load_config(run, "--trainer.resume true"))
    assert not hidden.exists()
    assert [p.name for p in list_checkpoints(run)] == ["step_000002", "step_000004", "step_000006"]
    assert [step for step, _, _ in losses(run)] == [1, 2, 3, 4, 5, 6]


def test_a_loss_that_is_not_finite_stops_and_names_the_samples(home, monkeypatch):
    cfg = config(home, "--run_id infinite --trainer.save_interval 1")
    run = set_up(config(home, "--run_id probe"))
    guilty = run.view[run.sampler().batch(2)[1]]["origin"]
    clean = AugmentedView.__getitem__

    def spoilt(self, key):
        sample = clean(self, key)
        return (
            {**sample, "action": sample["action"] + np.float32(3e38)}
            if sample["origin"] == guilty
            else sample
        )

    monkeypatch.setattr(AugmentedView, "__getitem__", spoilt)
    with pytest.raises(FloatingPointError) as error:
        train(cfg)
    assert guilty in str(error.value)
    others = {run.data.train[row]["origin"] for row in range(len(run.data.train))} - {guilty}
    assert not any(f"{origin};" in f"{error.value};" for origin in others)
    stopped = home / "runs/infinite"
    step = len(losses(stopped))
    assert f"still those of step {step}" in str(error.value)
    assert [int(p.name[5:]) for p in list_checkpoints(stopped)] == list(range(1, step + 1))


@pytest.mark.parametrize(
    "overrides, names",
    [
        ("--trainer.warmup_step 3", "'trainer.warmup_steps'"),
        ("--trainer.learning_rates.vlm 1e-4", "nothing reads"),
        ("--trainer.learning_rate.vml 1e-4", "did you mean 'vlm'"),
        ("--trainer.freeze_modules vlm.vision", "trainer.freeze_modules"),
        ("--datasets.vla_data.horizon 8", "framework.action_horizon is 4"),
        ("--datasets.vla_data.held_out 1.0", "nothing to train on"),
        ("--datasets.vla_data.cameras [frnt]", "front"),
        ("--framework.action_model.hiden_size 8", "hidden_size"),
        ("--trainer.warmup_steps 6", "trainer.max_train_steps"),
        ("--framework.vlm.dtype bfloat16", "framework.inference_model.vlm.dtype"),
        (
            "--trainer.learning_rate.vlm.model 1e-4 --trainer.learning_rate.vlm.base 1e-5",
            "learning_rate.vlm is",
        ),
    ],
)
def test_a_wrong_key_or_value_is_refused_before_anything_is_written(home, overrides, names):
    with pytest.raises(ValueError, match=".*") as error:
        train(config(home, f"--run_id refused {overrides}"))
    assert names in str(error.value)
    assert not (home / "runs/refused").exists()


def test_an_existing_run_is_not_trained_over(home, straight):
    name, run, _ = straight
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    with pytest.raises(ConfigError, match="--trainer.resume true"):
        train(config(home, f"--run_id straight_{name}", name))
    with pytest.raises(ConfigError, match="trainer.weight_decay is 0.01 there and 0.5 here"):
        train(load_config(run, "--trainer.resume true --trainer.weight_decay 0.5"))
    assert before == {p: p.stat().st_mtime_ns for p in run.rglob("*")}


def test_a_dataset_that_changed_is_not_continued_with(home, tmp_path):
    run = train(config(home, f"--run_root_dir {tmp_path} --run_id changed --trainer.max_train_steps 3"))
    progress = latest_checkpoint(run) / "trainer/progress.json"
    progress.write_text(progress.read_text().replace('"statistics_hash": "', '"statistics_hash": "0'))
    with pytest.raises(ValueError, match="statistics_hash was '0"):
        train(load_config(run, "--trainer.resume true"))


def test_each_module_learns_at_its_own_rate(home):
    """With a rate of zero the VLM stands still; without weight decay the first AdamW step has the size of the rate."""
    rates = "--trainer.learning_rate.vlm 0.0 --trainer.weight_decay 0.0 --trainer.warmup_steps 0"
    run = set_up(config(home, f"--run_id rates {rates} --trainer.learning_rate.base 0.01"))
    before = {name: p.detach().clone() for name, p in run.framework.named_parameters()}
    stream = iter(make_loader(run.view, run.sampler(), run.framework.prepare))
    rate = max(group["lr"] for group in run.optimizer.param_groups)
    update(run, [next(stream)])
    moved = {
        name: (p.detach() - before[name]).abs().max().item() for name, p in run.framework.named_parameters()
    }
    assert all(step == 0.0 for name, step in moved.items() if name.startswith("vlm."))
    heads = [step for name, step in moved.items() if name.startswith("action_model.")]
    assert len(heads) > 2 and max(heads) == pytest.approx(rate, rel=1e-3)


def test_a_rate_reaches_a_part_by_its_other_name(home):
    """A composed backbone keeps its parts deeper than the names that frameworks and rates call them by."""
    sizes = {
        "image_size": 32,
        "hidden_size": 32,
        "num_layers": 1,
        "vision_hidden_size": 32,
        "vision_layers": 2,
    }
    write_tiny_composed("prismatic", home / "prismatic", **sizes)
    rates = "--trainer.learning_rate.vlm.vision_backbone 1e-6 --trainer.learning_rate.vlm.base 1e-5"
    run = set_up(config(home, f"--run_id parts --framework.vlm.base_vlm {home}/prismatic {rates}"))
    vlm = run.framework.vlm
    parts = {"vlm.vision_backbone": vlm.model.model.vision_backbone, "vlm": vlm, "base": run.framework}
    left = set(run.framework.parameters())
    for name, part in parts.items():
        groups = [g for g in run.optimizer.param_groups if g["name"].removesuffix("/no_decay") == name]
        held = {p for group in groups for p in group["params"]}
        assert held and held == {p for p in part.parameters() if p.requires_grad and p in left}, name
        left -= held


def test_a_model_wider_than_the_robot_is_measured_on_the_robots_numbers(home):
    wide = "--framework.max_action_dim 8 --framework.max_state_dim 6 --trainer.eval_interval 3"
    run = train(config(home, f"--run_id wide --trainer.max_train_steps 3 {wide}", "GR00T"))
    (row,) = [row for row in read_metrics(run / "metrics.jsonl") if "eval/action_error" in row]
    each = [row[f"eval/action_error/{name}"] for name in ACTION.names]
    assert row["eval/action_error"] == pytest.approx(np.mean(each)) and np.isfinite(each).all()


@pytest.mark.parametrize(
    "framework, modes, field, reader",
    [
        ("PI05", {"action": "min_max", "state": "mean_std"}, "state", "the prompt"),
        ("OpenVLA", {"action": "mean_std", "state": "min_max"}, "action", "BinsHead"),
        ("OpenVLA", {"action": ["min_max", "q99", "identity"]}, "action", "BinsHead"),
    ],
)
def test_bins_are_refused_numbers_that_lie_outside(home, tmp_path, framework, modes, field, reader):
    words = " ".join(
        f"--datasets.vla_data.normalization.{key} {str(mode).replace(' ', '')}" for key, mode in modes.items()
    )
    with pytest.raises(ConfigError, match="min_max or q99") as error:
        set_up(config(home, f"--run_id refused {words}", framework))
    assert f"datasets.vla_data.normalization.{field} is" in str(error.value) and reader in str(error.value)
    bounded = words.replace("mean_std", "q99").replace("identity", "binary")
    assert set_up(config(home, f"--run_root_dir {tmp_path} {bounded}", framework)).step == 0


def test_a_head_without_weights_may_keep_its_rate(home):
    words = "--run_id words --trainer.learning_rate.action_model 1e-3"
    groups = set_up(config(home, words, "OpenVLA")).optimizer.param_groups
    assert "action_model" not in {group["name"].removesuffix("/no_decay") for group in groups}


def test_a_model_that_is_frozen_as_a_whole_is_refused(home):
    frozen = "--run_id refused --framework.freeze_vlm_backbone true"
    with pytest.raises(ConfigError, match="framework.freeze_vlm_backbone.* leave no parameter"):
        set_up(config(home, frozen, "OpenVLA"))


def test_frozen_modules_stand_still(home):
    frozen = "--trainer.freeze_modules qwen_vl_interface --trainer.warmup_steps 0"
    run = set_up(config(home, f"--run_id frozen {frozen}"))
    before = {name: p.detach().clone() for name, p in run.framework.named_parameters()}
    update(run, [next(iter(make_loader(run.view, run.sampler(), run.framework.prepare)))])
    same = {name for name, p in run.framework.named_parameters() if torch.equal(p, before[name])}
    assert {name for name in before if name.startswith("vlm.")} <= same
    assert any(not name.startswith("vlm.") for name in before.keys() - same)


def test_held_out_episodes_are_never_trained_on(home, monkeypatch):
    seen = []
    clean = AugmentedView.__getitem__

    def watched(self, key):
        seen.append(clean(self, key)["origin"])
        return clean(self, key)

    monkeypatch.setattr(AugmentedView, "__getitem__", watched)
    run = train(config(home, "--run_id watched --trainer.max_train_steps 30"))
    held_out = json.loads((latest_checkpoint(run) / "trainer/progress.json").read_text())["held_out"]
    assert len(held_out) == 2
    whole = LeRobotDataset(home / "toy", horizon=4)
    trained = whole.select([e for e in range(len(LENGTHS)) if e not in held_out])
    assert set(seen) == {trained[row]["origin"] for row in range(len(trained))}
    assert not set(seen) & {
        s["origin"] for s in (whole.select(held_out)[r] for r in range(sum(LENGTHS) - len(trained)))
    }
    statistics = json.loads((run / "dataset_statistics.json").read_text())["toy"]["action"]
    np.testing.assert_allclose(statistics["max"], trained.columns["action"].max(0), rtol=1e-6)
    np.testing.assert_allclose(
        statistics["std"], trained.columns["action"].astype(np.float64).std(0), rtol=1e-6
    )


def test_accumulation_is_exact_although_chunks_hold_padding(home):
    """Two micro-batches of four against plain autograd on the eight samples at once."""
    unclipped = "--trainer.gradient_clipping 1e9 --trainer.gradient_accumulation_steps 2"
    run = set_up(config(home, f"--run_id accumulated {unclipped}"))
    stream = iter(make_loader(run.view, run.sampler(), run.framework.prepare))
    batches = [next(stream), next(stream)]
    valid = [int((~batch["action_is_pad"]).sum()) for batch in batches]
    assert valid[0] != valid[1], "choose another seed: this test needs unequal padding"
    run.model.eval()
    keys = run.sampler().batch(0) + run.sampler().batch(1)
    expected_loss = run.framework.forward([run.view[key] for key in keys])["action_loss"]
    expected_loss.backward()
    expected = [p.grad.clone() for p in run.framework.parameters()]
    run.framework.zero_grad()
    run.optimizer.zero_grad = lambda: None
    loss, norm = update(run, batches)
    for parameter, gradient in zip(run.framework.parameters(), expected):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-4)
    assert loss == pytest.approx(expected_loss.item(), rel=1e-5)
    assert norm == pytest.approx(torch.cat([g.flatten() for g in expected]).norm().item(), rel=1e-4)


def test_two_processes_train_like_one(home):
    """Two processes with batch 2 see in each step what one process with batch 4 sees."""
    alone = train(config(home, "--run_id alone --trainer.per_device_batch_size 4"))
    config(home, "--run_id pair --trainer.per_device_batch_size 2").save(home / "pair.yaml")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "vla_bench.training.imitation", "--config_yaml", home / "pair.yaml"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert result.returncode == 0, result.stderr[-3000:]
    pair = home / "runs/pair"
    np.testing.assert_allclose(losses(pair), losses(alone), rtol=1e-3)
    assert len(json.loads((latest_checkpoint(pair) / "trainer/rng.json").read_text())) == 2


def observation(**change) -> dict:
    rng = np.random.default_rng(7)
    images = [Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)) for _ in range(2)]
    return {"image": images, "lang": "close the box", "state": [0.5, -0.5], **change}


def test_the_policy_unnormalises_exactly(home, straight):
    _, run, _ = straight
    policy = Policy.from_pretrained(run)
    physical = policy.predict(observation(), seed=3)
    assert physical.shape == (4, 3) and physical.dtype == np.float64
    statistics = json.loads((run / "dataset_statistics.json").read_text())["toy"]
    low, high = (np.array(statistics["action"][key]) for key in ("min", "max"))
    mean, std = (np.array(statistics["state"][key]) for key in ("mean", "std"))
    given = observation()
    sample = {
        **given,
        "state": ((np.array(given["state"]) - mean) / std).astype(np.float32),
        "dataset": "toy",
    }
    generator = torch.Generator().manual_seed(3)
    raw = policy.framework.predict_action([sample], generator=generator)["normalized_actions"][0]
    np.testing.assert_allclose(physical, low + (raw.astype(np.float64) + 1) / 2 * (high - low), atol=1e-6)
    np.testing.assert_array_equal(policy.predict(observation(), seed=3), physical)


def test_a_policy_refuses_what_it_was_not_trained_on(home, straight):
    _, run, _ = straight
    policy = Policy.from_pretrained(run)
    pictures = observation()["image"]
    for change, message in [
        ({"image": pictures[:1]}, "in this order: front, wrist"),
        ({"image": [pictures[0], pictures[1].resize((64, 64))]}, "'wrist' is (64, 64)"),
        ({"state": [0.1, 0.2, 0.3]}, "expected [2]: x, y"),
        ({"state": None}, "the policy reads x, y"),
        ({"imgae": pictures}, "unknown key 'imgae'"),
    ]:
        with pytest.raises(ValueError) as error:
            policy.predict(observation(**change), seed=0)
        assert message in str(error.value)


@pytest.mark.parametrize("file", ["framework.json", "vlm/tokenizer_config.json"])
def test_the_fingerprint_covers_all_that_a_policy_is_loaded_from(home, straight, tmp_path, file):
    _, run, _ = straight
    copy = shutil.copytree(run, tmp_path / "copy")
    before = Policy.from_pretrained(run).fingerprint
    assert Policy.from_pretrained(copy).fingerprint == before
    path = latest_checkpoint(copy) / file
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prompt": "Please {lang}"}))
    assert Policy.from_pretrained(copy).fingerprint != before


def test_a_policy_refuses_statistics_that_are_not_its_own(home, straight, tmp_path):
    _, run, _ = straight
    copy = shutil.copytree(run, tmp_path / "copy")
    path = copy / "dataset_statistics.json"
    statistics = json.loads(path.read_text())
    statistics["toy"]["action"]["mean"][1] += 1e-6
    path.write_text(json.dumps(statistics))
    with pytest.raises(ValueError, match="restore the file of the original run"):
        Policy.from_pretrained(copy)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="dataset_statistics.json"):
        Policy.from_pretrained(copy)


def test_the_program_reports_an_error_of_the_user_in_one_line(home, capsys):
    config(home).save(home / "program.yaml")
    with pytest.raises(SystemExit) as stop:
        imitation.main(["--config_yaml", str(home / "program.yaml"), "--trainer.max_train_step", "3"])
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and "trainer.max_train_steps" in err and "Traceback" not in err


def test_bfloat16_keeps_float32_weights(home):
    run = train(config(home, "--run_id bf16 --trainer.mixed_precision bf16 --trainer.eval_interval 3"))
    rows = read_metrics(run / "metrics.jsonl")
    assert all(np.isfinite(list(row.values())).all() for row in rows)
    assert {value.dtype for value in load_file(latest_checkpoint(run) / "model.safetensors").values()} == {
        torch.float32
    }
    exact = losses(train(config(home, "--run_id float32")))
    assert losses(run)[0] != exact[0] and losses(run)[0][1] == pytest.approx(exact[0][1], rel=0.05)
