"""Two robots in one run: modes, scales, masks and images are the same in training, after a restart, and in serving."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vla_bench.config import ConfigError, load_config
from vla_bench.data.lerobot import LeRobotDataset
from vla_bench.data.robots import read_robot
from vla_bench.data.windows import History
from vla_bench.data.writer import LeRobotWriter
from vla_bench.serving.policy import Policy, sample_from
from vla_bench.training.checkpoint import latest_checkpoint, load_progress
from vla_bench.training.data import DataSettings, open_data
from vla_bench.training.imitation import train
from vla_bench.training.loop import EvaluationView, read_metrics

TRANSFORMS = [
    {"type": "pad", "height": 48, "width": 48},
    {"type": "resize", "height": 32, "width": 32, "method": "pad"},
    {"type": "crop", "fraction": 0.9},
    {"type": "color_jitter", "brightness": 0.2},
]
ROBOTS = {"narrow": 2, "wide": 4}  # joints


def robot_file(joints: int, cameras: int) -> str:
    names = ", ".join(f"j{i}" for i in range(joints))
    return f"""
description: {joints} joints and a gripper
sources: []
rates: [10]
cameras: {{{", ".join(f"role{i}: [cam{i}]" for i in range(cameras))}}}
state: &parts
  - {{name: arm, dims: [{names}], kind: joint, unit: rad}}
  - {{name: gripper, dims: [gripper], kind: gripper, gripper: positive_opens}}
action: *parts
"""


@pytest.fixture(scope="module")
def robots(home, tmp_path_factory):
    """A folder with two robots and a recording of each: v2.1 with one camera, v3.0 with two."""
    folder = tmp_path_factory.mktemp("robots")
    rng = np.random.default_rng(0)
    for (name, joints), version in zip(ROBOTS.items(), ("v2.1", "v3.0")):
        cameras = {f"cam{i}": (32, 48) for i in range(joints // 2)}
        (folder / f"{name}.yaml").write_text(robot_file(joints, len(cameras)))
        layout = read_robot(folder / f"{name}.yaml").action_layout
        with LeRobotWriter(
            folder / name, fps=10, cameras=cameras, state=layout, action=layout, version=version
        ) as writer:
            for frames in (9, 7, 8, 6):
                images = {key: rng.integers(0, 255, (frames, 32, 48, 3), np.uint8) for key in cameras}
                state = np.cumsum(0.1 * joints * rng.normal(size=(frames, joints + 1)), axis=0)
                action = state + 0.01 * rng.normal(size=state.shape)
                writer.add_episode(images=images, state=state, action=action, task="close the box")
    return folder


def settings(robots, **more) -> dict:
    entries = [{"dataset": str(robots / name), "robot": str(robots / f"{name}.yaml")} for name in ROBOTS]
    entries[0] |= {"weight": 3, "prompt": "narrow arm: {lang}"}
    entries[1] |= {"weight": 1}
    common = {"mixture": entries, "action_mode": "relative", "image_transforms": TRANSFORMS, "held_out": 0.25}
    return common | more


def mixed(config, robots, overrides="", framework="GR00T", **more):
    tree = config("", framework).to_dict()
    tree["datasets"] = {"vla_data": settings(robots, **more)}
    return load_config(tree, overrides)


@pytest.fixture(scope="module", params=["GR00T", "OFT", "PI05"])
def trained(request, robots, home, losses, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        tree = load_config(home / "toy.yaml").to_dict()
        heads = {
            "GR00T": {"type": "FlowMatching", "hidden_size": 32, "num_layers": 1, "num_heads": 2},
            "OFT": {"type": "MLP", "hidden_size": 32, "num_queries": 2},
            "PI05": {"type": "ActionExpert", "hidden_size": 32, "intermediate_size": 64, "num_heads": 4},
        }
        tree["framework"] |= {"name": request.param, "action_model": heads[request.param]}
        data = settings(robots)
        if request.param == "PI05":  # its prompt holds the state
            data["normalization"] = {"action": "q99", "state": "q99"}
        tree["datasets"] = {"vla_data": data}
        tree |= {"run_root_dir": str(tmp_path_factory.mktemp("runs")), "run_id": request.param}
        cfg = load_config(tree, "--trainer.max_train_steps 4 --trainer.save_interval 2")
        run = train(cfg)
    return SimpleNamespace(folder=run, losses=losses(run))


def test_a_mixture_resumes_to_the_same_losses(trained, losses):
    newest = latest_checkpoint(trained.folder)
    expected = (newest / "model.safetensors").read_bytes()
    shutil.rmtree(newest)
    train(load_config(trained.folder, "--trainer.resume true"))
    assert losses(trained.folder) == trained.losses
    assert (newest / "model.safetensors").read_bytes() == expected


def test_held_out_errors_are_measured_by_dataset(trained):
    row = next(row for row in read_metrics(trained.folder / "metrics.jsonl") if "eval/action_error" in row)
    own = [row[f"eval/{name}/action_error"] for name in ROBOTS]
    assert row["eval/action_error"] == pytest.approx(np.mean(own))
    assert "eval/wide/action_error/j3" in row and "eval/narrow/action_error/j3" not in row


def test_what_a_checkpoint_saw_is_remembered_by_dataset(trained):
    saved = load_progress(latest_checkpoint(trained.folder))
    assert saved["held_out"].keys() == ROBOTS.keys()
    assert {name.split("/")[0] for name in saved["data"]["metadata"]} == set(ROBOTS)


@pytest.mark.parametrize("name", ROBOTS)
def test_a_policy_sees_what_was_trained_on_bit_for_bit(trained, robots, name):
    """A recorded observation, handed to the policy, becomes the tensors of the training data without their jitter."""
    policy = Policy.from_pretrained(trained.folder, dataset=name)
    cfg = load_config(trained.folder)
    data = open_data(cfg.section("datasets.vla_data").into(DataSettings), horizon=4, seed=0)
    which = list(ROBOTS).index(name)
    recorded = LeRobotDataset(robots / name).select(data.members[which].train.episodes)
    view = EvaluationView(data.train, data.transforms)
    for row in (0, 5, len(recorded) - 1):
        physical = recorded[row]
        observation = {key: physical[key] for key in ("image", "lang", "state")}
        served = sample_from(observation, policy.spec, policy.normalizers)
        learned = view[int(data.train.starts[which]) + row]
        prepare = policy.framework.prepare
        ours = prepare([served])
        theirs = prepare(
            [{k: v for k, v in learned.items() if k not in ("action", "action_is_pad", "origin")}]
        )
        assert ours["lang"] == theirs["lang"]
        assert ours["lang"] == (["narrow arm: close the box"] if name == "narrow" else ["close the box"])
        for key in ours["inputs"].keys() | theirs["inputs"].keys():
            assert torch.equal(ours["inputs"][key], theirs["inputs"][key]), key
        for key in {"state", "action_mask"} & (ours.keys() | theirs.keys()):
            assert torch.equal(ours[key], theirs[key]), key


@pytest.mark.parametrize("name", ROBOTS)
def test_a_policy_moves_the_robot_in_its_own_numbers(trained, robots, name):
    """What was learned of a chunk comes back as the recorded chunk; what is predicted has the robot's width."""
    policy = Policy.from_pretrained(trained.folder, dataset=name)
    cfg = load_config(trained.folder)
    data = open_data(cfg.section("datasets.vla_data").into(DataSettings), horizon=4, seed=0)
    which, width = list(ROBOTS).index(name), ROBOTS[name] + 1
    recorded = LeRobotDataset(robots / name, horizon=4).select(data.members[which].train.episodes)
    if policy.spec.normalization["action"] == "min_max":
        for row in range(len(recorded)):
            learned = data.train[int(data.train.starts[which]) + row]["action"]
            assert (learned[:, width:] == 0).all()
            back = policy.view.physical(learned[:, :width], recorded[row]["state"][None])
            np.testing.assert_allclose(back, recorded[row]["action"], atol=1e-5)
    observation = {key: recorded[3][key] for key in ("image", "lang", "state")}
    predicted = policy.predict(observation, seed=0)
    assert predicted.shape == (4, width)
    moved = {**observation, "state": observation["state"] + np.float32(0)}
    np.testing.assert_array_equal(policy.predict(moved, seed=0), predicted)


def test_a_policy_of_another_dataset_is_refused_with_the_nearest_name(trained):
    with pytest.raises(ValueError, match="was not trained on 'wied'; did you mean 'wide'"):
        Policy.from_pretrained(trained.folder, dataset="wied")


def test_a_head_without_masks_refuses_robots_of_different_width(config, robots):
    cfg = mixed(config, robots, "--run_id tokens", "OpenVLA", normalization={"action": "q99", "state": "q99"})
    with pytest.raises(ValueError, match="some robots lack numbers of an action"):
        train(cfg)


def test_one_robot_with_history_is_served_with_history(config, robots):
    more = {"root": str(robots / "wide"), "robot": str(robots / "wide.yaml"), "action_mode": "delta"}
    more |= {"observation_steps": 2, "cameras": ["role1", "role0"], "image_transforms": TRANSFORMS}
    tree = config("--run_id history").to_dict()
    tree["datasets"] = {"vla_data": more}
    policy = Policy.from_pretrained(train(load_config(tree, "--trainer.max_train_steps 3")))
    assert policy.spec.cameras == ("cam1", "cam0") and policy.framework.state_dim == 10
    dataset = LeRobotDataset(robots / "wide", cameras=["cam1", "cam0"])
    history = History(policy.spec.observation_steps, policy.spec.observation_stride)
    for row in range(3):
        seen = {key: dataset[row][key] for key in ("image", "lang", "state")}
        assert policy.predict(history.add(seen), seed=0).shape == (4, 5)
    with pytest.raises(ValueError, match="2 images each"):
        policy.predict(seen, seed=0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"robot": "aloha"}, "the action has 5 numbers, the robot declares 14"),
        ({"robot": None}, "needs datasets.vla_data.robot"),
        ({"action_mode": {"arm": "relativ"}}, "did you mean 'relative'"),
        ({"action_mode": {"gripper": "delta"}}, "stays absolute"),
        ({"rotation": "rotation_7d"}, "did you mean 'rotation_6d'"),
        ({"image_transforms": [{"type": "resize", "height": 32}]}, "image_transforms"),
        ({"mixture": [{"dataset": "a"}]}, "both of root and mixture"),
        ({"cameras": ["role7"]}, "no camera 'role7'"),
    ],
)
def test_a_setting_that_cannot_be_is_one_line(config, robots, change, message):
    tree = config("").to_dict()
    whole = {"root": str(robots / "wide"), "robot": str(robots / "wide.yaml"), "action_mode": "relative"}
    tree["datasets"] = {"vla_data": whole | change}
    with pytest.raises(ValueError) as error:
        train(load_config(tree))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("trained", ["OFT"], indirect=True)
def test_a_mixture_whose_folders_moved_goes_on_by_the_new_ones(trained, robots, losses, tmp_path):
    """What counts is what the folders hold, and the names under which a checkpoint knows them."""
    newest = latest_checkpoint(trained.folder)
    expected = (newest / "model.safetensors").read_bytes()
    shutil.rmtree(newest)
    tree = load_config(trained.folder).to_dict()
    tree["trainer"]["resume"] = True
    entries = tree["datasets"]["vla_data"]["mixture"]
    for entry, name in zip(entries, ROBOTS):
        entry["dataset"] = str(shutil.copytree(robots / name, tmp_path / f"{name}_moved"))
    with pytest.raises(ConfigError, match=r"mixture\[0\].name is 'narrow' there and 'narrow_moved' here"):
        train(load_config(tree))
    for entry, name in zip(entries, ROBOTS):
        entry["name"] = name
    video = next((tmp_path / "narrow_moved").rglob("*.mp4"))
    content = video.read_bytes()
    video.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match="trained on other data: in .*narrow/.*mp4 has other content"):
        train(load_config(tree))
    video.write_bytes(content)
    train(load_config(tree))
    assert losses(trained.folder) == trained.losses
    assert (newest / "model.safetensors").read_bytes() == expected
    assert load_config(trained.folder)["datasets"]["vla_data"]["mixture"][0]["name"] == "narrow"


@pytest.fixture(scope="module")
def twins(robots, tmp_path_factory):
    """Two recordings of one robot whose numbers differ tenfold, and the robot's file."""
    folder, layout = tmp_path_factory.mktemp("twins"), read_robot(robots / "narrow.yaml").action_layout
    for scale, name in ((1, "small"), (10, "large")):
        rng = np.random.default_rng(scale)
        with LeRobotWriter(
            folder / name, fps=10, cameras={"cam0": (32, 48)}, state=layout, action=layout
        ) as writer:
            for frames in (9, 6, 7):
                numbers = scale * rng.normal(size=(frames, 3))
                images = {"cam0": np.zeros((frames, 32, 48, 3), np.uint8)}
                writer.add_episode(images=images, state=numbers, action=numbers + 1, task="go")
    return folder


def shared(twins, robots, how, robot=True):
    robot = {"robot": str(robots / "narrow.yaml")} if robot else {}
    entries = [{"dataset": str(twins / name), **robot} for name in ("small", "large")]
    entries.append({"dataset": str(robots / "wide"), "robot": str(robots / "wide.yaml")})
    return DataSettings(mixture=entries[: 2 if how == "shared" else 3], statistics=how)


@pytest.mark.parametrize("how", ["per_dataset", "per_robot", "shared"])
def test_statistics_are_shared_as_the_configuration_says(twins, robots, how):
    data = open_data(shared(twins, robots, how), horizon=3, seed=0)
    own = [member.dataset.select(member.train.episodes).columns["action"] for member in data.members]
    together = [np.concatenate(own[:2])] * 2 + own[2:] if how != "per_dataset" else own
    for member, rows in zip(data.members, together):
        found = data.statistics[member.dataset.name]["action"]
        np.testing.assert_allclose(found.mean, rows.astype(float).mean(0), rtol=1e-12)
        np.testing.assert_allclose(found.q99, np.quantile(rows.astype(float), 0.99, axis=0), rtol=1e-12)
        np.testing.assert_array_equal(member.normalizers["action"].statistics.max, found.max)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"statistics": "per_robots"},
            "statistics must be one of per_dataset, per_robot, shared, got 'per_robots'",
        ),
        ({"statistics": "per_robot", "robot": None}, "statistics is 'per_robot', and .* declares no robot"),
        ({"statistics": "shared", "mixture": None, "root": "a"}, "statistics must be per_dataset"),
    ],
)
def test_statistics_that_cannot_be_shared_are_refused_before_anything_is_opened(change, message):
    with pytest.raises(ConfigError, match=message):
        DataSettings(**{"mixture": [{"dataset": "a"}, {"dataset": "b"}], **change})


def test_robots_that_differ_share_no_statistics(twins, robots):
    settings = DataSettings(
        mixture=[{"dataset": str(twins / "small")}, {"dataset": str(robots / "wide")}], statistics="shared"
    )
    with pytest.raises(
        ValueError, match="small and wide cannot share statistics, one has action .'j0', 'j1', 'gripper'."
    ):
        open_data(settings, horizon=3, seed=0)
