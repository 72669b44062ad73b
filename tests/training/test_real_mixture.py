"""Co-training on what a simulator shows and tells: its experts' demonstrations, and talk about the frames of them."""

import json

import pytest

from vla_bench.benchmarks.metaworld import record
from vla_bench.config import load_config
from vla_bench.data.lerobot import LeRobotDataset
from vla_bench.models.backbones.tiny import write_tiny
from vla_bench.training.cotrain import train
from vla_bench.training.loop import read_metrics

pytest.importorskip("metaworld")
TASKS = ("drawer-open-v3", "window-open-v3")
TINY = {"image_size": 32, "hidden_size": 64, "num_layers": 2, "vision_hidden_size": 32, "vision_layers": 1}
ASKED = {"task": "what is the robot to do", "hand": "is the hand left or right"}
STEPS = 60


def conversations(dataset, folder, rows, hand_middle):
    """Of each frame, two questions: the instruction, and on which side the simulator says that the hand is."""
    found = []
    for row in rows:
        sample = dataset[row]
        name = f"{row:04}.png"
        sample["image"][0].save(folder / name)
        told = {"task": sample["lang"], "hand": "left" if sample["state"][0] < hand_middle else "right"}
        for key, answer in told.items():
            turns = [{"from": "human", "value": f"<image>\n{ASKED[key]}"}, {"from": "gpt", "value": answer}]
            found.append({"image": name, "conversations": turns})
    return found


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A demonstration of each task, conversations about every fourth frame, others about frames between them."""
    home = tmp_path_factory.mktemp("mixture")
    record(home / "robots", TASKS, episodes=1, image_size=32, first_seed=3, show_progress=False)
    dataset = LeRobotDataset(home / "robots", horizon=1)
    corpus = [*ASKED.values(), *{dataset[row]["lang"] for row in range(len(dataset))}, "left", "right"]
    middle = sorted(dataset[row]["state"][0] for row in range(len(dataset)))[len(dataset) // 2]
    for name, first, each in (("talk", 0, 4), ("asked", 2, 16)):
        (home / name).mkdir()
        entries = conversations(dataset, home / name, range(first, len(dataset), each), middle)
        (home / name / "talk.json").write_text(json.dumps(entries))
    write_tiny("qwen2_5_vl", home / "tiny", corpus=corpus, **TINY)
    return home


def test_co_training_lowers_both_losses_on_a_real_mixture(home, tmp_path):
    """On what is learned from, and on conversations that are held out."""
    place = {name: {"annotation_path": str(home / name / "talk.json"), "data_path": str(home / name)}
             for name in ("talk", "asked")}  # fmt: skip
    talk = {"dataset_use": "talk", "eval_dataset": "asked", "data_dict": place, "per_device_batch_size": 8}
    trainer = {
        "max_train_steps": STEPS,
        "per_device_batch_size": 16,
        "learning_rate": 4e-3,
        "loss_scale": {"vla": 1.0, "vlm": 1.0},
        "warmup_steps": 4,
        "num_workers": 0,
        "log_interval": 1,
        "eval_interval": STEPS,
        "eval_samples": 32,
        "save_interval": STEPS,
    }
    cfg = {
        "run_root_dir": str(tmp_path),
        "run_id": "run",
        "framework": {
            "name": "OFT",
            "vlm": {"base_vlm": str(home / "tiny")},
            "action_horizon": 4,
            "action_model": {"type": "MLP", "hidden_size": 64, "num_queries": 2},
        },
        "datasets": {"vla_data": {"root": str(home / "robots"), "held_out": 0}, "vlm_data": talk},
        "trainer": trainer,
    }
    rows = read_metrics(train(load_config(cfg)) / "metrics.jsonl")
    learned = [row for row in rows if "loss" in row]
    mean = lambda name, part: sum(row[name] for row in part) / len(part)
    for name, most in (("action_loss", 0.6), ("language_loss", 0.25)):
        assert mean(name, learned[-5:]) < most * mean(name, learned[:5]), name
    first, last = (row for row in rows if "eval/language_loss" in row)
    assert last["eval/language_loss"] < 0.25 * first["eval/language_loss"]
    assert first["eval/answer_accuracy"] < 0.1 and last["eval/answer_accuracy"] > 0.4
