"""From a configuration to members: each takes its own numbers from its own dataset, and each key reaches its place."""

import shutil
from dataclasses import replace

import numpy as np
import pytest

from vla_bench.config import ConfigError
from vla_bench.data.action_modes import encode_actions, encode_state, make_encoding
from vla_bench.data.layout import Layout
from vla_bench.data.lerobot import LeRobotDataset
from vla_bench.data.mixture import MixtureEntry
from vla_bench.data.normalize import Normalizer, compute_statistics
from vla_bench.data.robots import read_robot
from vla_bench.data.viewed import viewed_statistics
from vla_bench.data.windows import window_rows
from vla_bench.data.writer import LeRobotWriter
from vla_bench.training.data import (
    Data,
    DataSettings,
    check_modes,
    config_key,
    member_spec,
    open_data,
    open_dataset,
    open_member,
    policy_specs,
    sources,
)
from vla_bench.training.loop import split_episodes

ARM = """
description: a position, a rotation and a gripper
sources: []
rates: [12.5]
cameras: {head: [top, cam0], hand: [cam1]}
state:
  - {name: place, dims: [x, y], kind: position, unit: m, frame: base}
  - {name: turn, dims: [r0, r1, r2], kind: rotation, rotation: axis_angle, frame: base}
  - {name: gripper, dims: [gripper], kind: gripper, gripper: positive_opens}
action:
  - {name: gripper, dims: [gripper], kind: gripper, gripper: positive_opens}
  - {name: turn, dims: [r0, r1, r2], kind: rotation, rotation: axis_angle, frame: base}
  - {name: place, dims: [x, y], kind: position, unit: m, frame: base}
"""
LENGTHS = {"arm": (5, 9, 6, 7), "legs": (8, 6, 7)}
SIZES = {"arm": {"cam0": (32, 48), "cam1": (48, 32)}, "legs": {"eye": (32, 32)}}
JOINTS = Layout(("hip", "knee"), kind="delta", units="rad", frame="joint")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Two recordings that share nothing: an arm of 12.5 Hz with two cameras, and legs of 20 Hz without a robot file."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(3)
    (folder / "arm.yaml").write_text(ARM)
    robot = read_robot(folder / "arm.yaml")
    layouts = {"arm": (robot.state_layout, robot.action_layout), "legs": (JOINTS, JOINTS)}
    for name, (state, action) in layouts.items():
        told = {"fps": {"arm": 12.5, "legs": 20}[name], "benchmark": {"arm": "desk", "legs": ""}[name]}
        told |= {"cameras": SIZES[name], "version": {"arm": "v3.0", "legs": "v2.1"}[name]}
        with LeRobotWriter(folder / name, state=state, action=action, **told) as writer:
            for number, frames in enumerate(LENGTHS[name]):
                films = {
                    key: rng.integers(0, 255, (frames, *size, 3), np.uint8)
                    for key, size in SIZES[name].items()
                }
                numbers = {
                    key: rng.normal(size=(frames, layout.dim)) + 3 * (name == "legs")
                    for key, layout in (("state", state), ("action", action))
                }
                writer.add_episode(images=films, task=f"{name} task {number % 2}", **numbers)
    return folder


def arm(home, **change) -> DataSettings:
    return DataSettings(str(home / "arm"), robot=str(home / "arm.yaml"), held_out=0.25, **change)


def both(home, first=(), second=(), **change) -> DataSettings:
    """The legs and then the arm; the first of a mixture is not the first of the alphabet."""
    legs = {"dataset": str(home / "legs"), **dict(first)}
    entries = [legs, {"dataset": str(home / "arm"), "robot": str(home / "arm.yaml"), **dict(second)}]
    return DataSettings(mixture=entries, **{"held_out": 0.25, **change})


COMMON = {
    "robot": "aloha",
    "action_key": "other",
    "state_key": None,
    "cameras": ["front", "wrist"],
    "action_mode": "relative",
}
AS_READ = {**COMMON, "cameras": ("front", "wrist")}
OWN = {
    "robot": ("bridge_widowx", "bridge_widowx"),
    "action_key": ("mine", "mine"),
    "state_key": ("mine", "mine"),
    "cameras": (["top"], ("top",)),
    "action_mode": ("delta", "delta"),
}


@pytest.mark.parametrize("key", COMMON)
def test_what_an_entry_does_not_say_the_section_says(key):
    needed = {"robot": "aloha"} if key == "action_mode" else {}
    given = {**needed, key: COMMON[key]}
    value, read = OWN[key]
    for entries in ([{"dataset": "a"}, {"dataset": "b", key: value}], [{"dataset": "b"}]):
        found = sources(DataSettings(mixture=entries, **given))
        own = [read if key in entry else AS_READ[key] for entry in entries]
        assert [vars(entry)[key] for entry in found] == own
        others = {f: getattr(MixtureEntry("b"), f) for f in vars(found[-1]) if f not in (key, *needed)}
        assert {f: v for f, v in vars(found[-1]).items() if f in others} == {**others, "dataset": "b"}
    (alone,) = sources(DataSettings("b", **given))
    assert alone == replace(MixtureEntry("b"), **needed, **{key: AS_READ[key]})


def test_weight_name_prompt_and_modes_are_an_entrys_own():
    own = {"weight": 2.0, "name": "mine", "prompt": "go: {lang}", "normalization": {"state": "q99"}}
    first, second = sources(DataSettings(mixture=[{"dataset": "a", **own}, {"dataset": "b", "weight": 1}]))
    assert {key: vars(first)[key] for key in own} == own
    assert second == MixtureEntry("b", weight=1)


def test_the_dataset_of_a_mixture_that_is_opened_as_a_whole_is_the_first(home):
    whole = open_dataset(both(home), horizon=3)
    assert (whole.name, len(whole), whole.horizon, whole.cameras) == ("legs", 21, 3, ("eye",))
    named = open_dataset(arm(home, cameras=["hand"]), horizon=2)
    assert (named.name, len(named), named.horizon, named.cameras) == ("arm", 27, 2, ("cam1",))


def test_a_horizon_of_one_is_the_default(home):
    assert open_dataset(arm(home)).horizon == 1


@pytest.mark.parametrize("cameras", [["hand", "head"], ["head"], ["cam1", "cam0"]])
def test_cameras_are_asked_for_by_role_or_name_in_any_order(home, cameras):
    names = {"hand": "cam1", "head": "cam0"}
    expected = tuple(names.get(camera, camera) for camera in cameras)
    data = open_data(arm(home, cameras=cameras), 2, 0)
    assert data.members[0].dataset.cameras == expected
    spec = policy_specs(data)["arm"]
    sizes = [SIZES["arm"][name] for name in expected]
    assert spec.cameras == expected
    assert spec.image_size == (tuple(sizes) if len(sizes) > 1 else sizes[0])
    assert [image.size[::-1] for image in data.train[0]["image"]] == sizes


def test_each_member_has_its_own_dataset_split_statistics_and_names(home):
    options = {"normalization": {"action": "min_max", "state": "mean_std"}}
    second = {"normalization": {"state": "q99"}, "name": "robot arm", "weight": 1}
    data = open_data(both(home, {"weight": 2}, second, **options), horizon=4, seed=5)
    legs, arm_ = data.members
    assert [m.dataset.name for m in data.members] == ["legs", "robot arm"] == list(data.statistics)
    for member, folder in ((legs, "legs"), (arm_, "arm")):
        whole = LeRobotDataset(home / folder, horizon=4)
        train, held = split_episodes(whole.episodes, 0.25, 5)
        assert (member.train.episodes, member.held_out.episodes) == (train, held)
        own = whole.select(train).columns
        for name in ("action", "state"):
            expected = compute_statistics(own[name])
            np.testing.assert_array_equal(member.statistics[name].mean, expected.mean)
            np.testing.assert_array_equal(member.normalizers[name].statistics.max, expected.max)
        assert data.statistics[member.dataset.name] is member.statistics
        assert member.statistics["num_transitions"] == len(member.train)
        assert member.statistics["num_trajectories"] == len(train)
    assert legs.normalization == {"action": "min_max", "state": "mean_std"}
    assert arm_.normalization == {"action": "min_max", "state": "q99"}
    assert [n.modes for n in arm_.normalizers.values()] == [("min_max",) * 6, ("q99",) * 6]
    assert (legs.robot, arm_.robot.name) == (None, "arm")
    assert legs.action_names == ("hip", "knee")
    assert arm_.action_names == ("gripper", "r0", "r1", "r2", "x", "y")
    assert data.held_out_episodes() == {m.dataset.name: m.held_out.episodes for m in data.members}
    assert {name: files.root.name for name, files in data.files().items()} == {
        "legs": "legs",
        "robot arm": "arm",
    }


def test_the_names_of_actions_are_those_that_the_model_sees(home):
    (member,) = open_data(arm(home, rotation="rotation_6d"), 2, 0).members
    assert member.action_names == ("gripper", *(f"turn_{i}" for i in range(6)), "x", "y")
    (plain,) = open_data(DataSettings(str(home / "legs")), 2, 0).members
    assert plain.action_names == ("hip", "knee")


def test_the_first_member_speaks_for_a_single_dataset(home):
    """Two members that differ in everything, without a mixture: what a single dataset is asked for is the first's."""
    settings = arm(home, image_transforms=[{"type": "crop", "fraction": 0.5}])
    first = open_member(sources(settings)[0], settings, 4, 0)
    other = DataSettings(str(home / "legs"))
    second = open_member(sources(other)[0], other, 2, 0)
    data = Data((first, second), None)
    assert data.horizon == 4 and data.train is first.train and data.dims == (6, 6)
    assert data.transforms == first.train.view.transforms and data.transforms.steps[0].fraction == 0.5
    assert data.held_out_episodes() == first.held_out.episodes
    assert data.order(0) is None


def test_a_mixture_has_the_widths_of_the_widest_and_the_order_of_its_weights(home):
    data = open_data(both(home, {"weight": 3}, {"weight": 1}), horizon=4, seed=0)
    assert data.dims == (6, 6) and data.train is data.mixture and data.horizon == 4
    rows = tuple(len(m.train) for m in data.members)
    order = data.order(7)
    assert (order.rows, order.seed, order.shares) == (rows, 7, (3, 1))
    assert sum(order.counts()) == sum(rows) and abs(order.counts()[0] - 0.75 * sum(rows)) <= 1


def test_without_weights_the_frames_decide(home):
    assert open_data(both(home), horizon=2, seed=0).order(0).shares is None


@pytest.mark.parametrize("weights", [({"weight": 2}, ()), ((), {"weight": 2})])
def test_a_weight_for_one_alone_is_refused(home, weights):
    with pytest.raises(ConfigError, match="has no weight and others have one"):
        both(home, *weights)


def test_what_is_held_out_has_the_models_widths_and_images_as_a_policy_sees_them(home):
    crop = [{"type": "crop", "fraction": 0.5}]
    data = open_data(both(home, image_transforms=crop, held_out=0.3), horizon=2, seed=0)
    held = data.held_out()
    assert list(held) == ["legs", "arm"]
    sample = held["legs"][0]
    assert sample["action"].shape == (2, 6) and sample["action_mask"].tolist() == [True] * 2 + [False] * 4
    assert sample["image_mask"].tolist() == [True, False] and sample["state"].shape == (6,)
    expected = data.transforms.eval([data.members[0].held_out.dataset[0]["image"][0]])[0]
    assert np.array_equal(np.asarray(sample["image"][0]), np.asarray(expected))
    assert "action_mask" not in held["arm"][0]


def test_nothing_held_out_is_no_view_and_an_empty_list(home):
    none = open_data(DataSettings(str(home / "arm"), held_out=0), 2, 0)
    assert (none.held_out(), none.held_out_episodes(), none.members[0].held_out) == ({}, [], None)
    mixed = open_data(both(home, held_out=0), 2, 0)
    assert (mixed.held_out(), mixed.held_out_episodes()) == ({}, {"legs": [], "arm": []})


ENCODINGS = [
    ({"action_mode": "relative"}, ("absolute", "relative", "relative"), ""),
    ({"action_mode": {"place": "delta"}}, ("absolute", "absolute", "delta"), ""),
    ({"action_mode": {"turn": "relative", "place": "delta"}}, ("absolute", "relative", "delta"), ""),
    ({"rotation": "rotation_6d"}, ("absolute", "absolute", "absolute"), "rotation_6d"),
    (
        {"rotation": "quaternion_wxyz", "action_mode": "delta"},
        ("absolute", "delta", "delta"),
        "quaternion_wxyz",
    ),
]


@pytest.mark.parametrize("change, modes, rotation", ENCODINGS)
def test_mode_and_rotation_reach_samples_statistics_and_specification(home, change, modes, rotation):
    """A sample's action is the physical chunk, encoded and scaled by hand."""
    data = open_data(arm(home, **change), horizon=4, seed=0)
    (member,), robot = data.members, read_robot(home / "arm.yaml")
    names = [part.name for part in robot.action]
    encoding = make_encoding(robot.action, robot.state, dict(zip(names, modes)), rotation)
    assert member.train.view.encoding == encoding and encoding.modes == modes
    recorded = LeRobotDataset(home / "arm", horizon=4).select(member.train.episodes)
    statistics = viewed_statistics([recorded], encoding)
    scale = {
        "action": Normalizer(statistics["action"], "min_max"),
        "state": Normalizer(statistics["state"], "mean_std"),
    }
    for row in (0, 3, len(recorded) - 1):
        physical, learned = recorded[row], data.train[row]
        expected = encode_actions(encoding, physical["action"], physical["state"])
        np.testing.assert_allclose(learned["action"], scale["action"].normalize(expected), atol=1e-6)
        state = encode_state(encoding, physical["state"])
        np.testing.assert_allclose(learned["state"], scale["state"].normalize(state), atol=1e-6)
    spec = policy_specs(data)["arm"]
    assert spec.encoding["modes"] == list(modes) and spec.encoding["rotation"] == rotation
    assert (spec.action, spec.state) == (robot.action_layout, robot.state_layout)
    assert data.dims == (expected.shape[-1], state.shape[-1])


def test_absolute_actions_as_they_are_stored_need_no_encoding(home):
    assert open_data(arm(home), 2, 0).members[0].train.view.encoding is None


def test_a_relative_action_needs_a_state(home):
    with pytest.raises(ValueError, match="the state has no part of this name"):
        open_data(arm(home, action_mode="relative", state_key=None), 2, 0)
    data = open_data(arm(home, rotation="rotation_6d", state_key=None), 2, 0)
    assert data.members[0].statistics["state"] is None and "state" not in data.train[0]
    assert policy_specs(data)["arm"].state is None and data.dims == (9, 0)
    assert data.members[0].normalization == {"action": "min_max"}


@pytest.mark.parametrize("steps, stride, offsets", [(1, 3, [0]), (2, 1, [-1, 0]), (3, 2, [-4, -2, 0])])
def test_history_reaches_images_states_and_specification(home, steps, stride, offsets):
    data = open_data(arm(home, observation_steps=steps, observation_stride=stride), horizon=2, seed=0)
    spec = policy_specs(data)["arm"]
    assert spec.observation_steps == steps and spec.observation_stride == (stride if steps > 1 else 1)
    (member,) = data.members
    recorded = LeRobotDataset(home / "arm").select(member.train.episodes)
    starts = recorded.starts
    for row in (0, int(starts[1]) - 1, int(starts[1]), int(starts[1]) + 3):
        episode = int(np.searchsorted(starts, row, side="right")) - 1
        rows, is_pad = window_rows(row, int(starts[episode]), int(starts[episode + 1]), offsets)
        sample = data.train[row]
        states = np.stack([recorded[int(r)]["state"] for r in rows])
        expected = member.normalizers["state"].normalize(states).reshape(-1)
        np.testing.assert_allclose(sample["state"], expected, atol=1e-6)
        images = [recorded[int(r)]["image"][camera] for camera in (0, 1) for r in rows]
        assert [np.asarray(i).tolist() for i in sample["image"]] == [np.asarray(i).tolist() for i in images]
        mask = sample.get("image_mask")
        assert (
            (mask is None and not is_pad.any()) or mask.tolist() == [*~is_pad, *~is_pad]
            if steps > 1
            else mask is None
        )
    assert data.dims == (6, 6 * steps)


def test_later_images_are_those_of_the_frames_that_are_named(home):
    data = open_data(arm(home, future_frames=[1, 4]), horizon=2, seed=0)
    recorded = LeRobotDataset(home / "arm").select(data.members[0].train.episodes)
    last = int(recorded.starts[1]) - 1
    for row in (0, last - 2):
        rows = [min(row + offset, last) for offset in (1, 4)]
        expected = [np.asarray(recorded[r]["image"][camera]) for camera in (0, 1) for r in rows]
        sample = data.train[row]
        assert all(np.array_equal(np.asarray(i), e) for i, e in zip(sample["future"], expected, strict=True))
        assert sample["future_is_pad"].tolist() == [row + 1 > last, row + 4 > last] * 2


def test_a_policys_specification_says_what_its_dataset_is(home):
    crop = [{"type": "crop", "fraction": 0.75}]
    data = open_data(both(home, second={"prompt": "arm: {lang}"}, image_transforms=crop), horizon=3, seed=0)
    legs, arm_ = (member_spec(data, member) for member in data.members)
    assert policy_specs(data) == {"legs": legs, "arm": arm_}
    assert (legs.dataset, legs.control_rate, legs.benchmark, legs.prompt) == ("legs", 20.0, "", "{lang}")
    assert (arm_.dataset, arm_.control_rate, arm_.benchmark) == ("arm", 12.5, "desk")
    assert arm_.prompt == "arm: {lang}" and data.members[1].train[0]["lang"] == "arm: arm task 0"
    assert (legs.action, legs.state) == (JOINTS, JOINTS) and arm_.horizon == legs.horizon == 3
    assert arm_.widths == legs.widths == (6, 6, 2) and legs.cameras == ("eye",)
    assert [dict(step)["fraction"] for step in legs.image_transforms] == [0.75]
    assert legs.statistics_hash == arm_.statistics_hash and legs.encoding is None
    alone = policy_specs(open_data(arm(home), 3, 0))["arm"]
    assert (
        alone.widths == () and alone.image_transforms == () and alone.statistics_hash != arm_.statistics_hash
    )


@pytest.mark.parametrize(
    "modes", [{"action": "q99"}, {"action": ["min_max", "q99"]}, {"state": ("binary", "identity")}, {}]
)
def test_modes_that_exist_are_taken(modes):
    check_modes(modes, "key")


@pytest.mark.parametrize(
    "modes, message",
    [
        ({"action": "q98"}, "key.action is 'q98'; did you mean 'q99'"),
        ({"action": ["q99", "q98"]}, "key.action is 'q98'"),
        ({"action": "q99", "stat": "q99"}, "nothing reads 'key.stat'; did you mean 'state'"),
    ],
)
def test_modes_that_do_not_exist_are_refused(modes, message):
    with pytest.raises(ConfigError) as error:
        check_modes(modes, "key")
    assert message in str(error.value)


@pytest.mark.parametrize("error", [ValueError("a"), FileNotFoundError("a")])
def test_an_error_in_a_key_is_one_of_the_configuration(error):
    with pytest.raises(ConfigError, match="^a$") as found, config_key():
        raise error
    assert found.value.__cause__ is error
    own = ConfigError("b")
    with pytest.raises(ConfigError) as kept, config_key():
        raise own
    assert kept.value is own
    with pytest.raises(KeyError), config_key():
        raise KeyError("c")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"normalization": {"action": "q98"}}, "mixture: .*legs: normalization.action is 'q98'"),
        ({"action_mode": "relativ"}, "did you mean 'relative'"),
        ({"action_mode": "relative"}, "action_mode is 'relative', which needs datasets.vla_data.robot"),
        ({"robot": "alha"}, "did you mean 'aloha'"),
    ],
)
def test_an_entry_that_cannot_be_is_refused_before_it_is_opened(home, change, message):
    with pytest.raises(ValueError, match=message):
        open_data(both(home, change), 2, 0)


def test_a_rotation_without_a_robot_is_refused():
    with pytest.raises(ConfigError, match="rotation is 'rotation_6d', which needs datasets.vla_data.robot"):
        DataSettings("a", rotation="rotation_6d")
    assert DataSettings("a", rotation="rotation_6d", robot="aloha").rotation == "rotation_6d"


@pytest.mark.parametrize(
    "key", ["observation_steps", "observation_stride", "horizon", "shift_pixels", "held_out", "state_noise"]
)
def test_the_least_that_can_be_meant(key):
    least = {"observation_steps": 1, "observation_stride": 1, "horizon": 1}.get(key, 0)
    assert vars(DataSettings("a", **{key: least}))[key] == least
    with pytest.raises(ConfigError, match=f"datasets.vla_data.{key} must be"):
        DataSettings("a", **{key: least - 1})


@pytest.mark.parametrize("horizon", [None, 4])
def test_a_horizon_may_be_left_out_or_agree(home, horizon):
    assert open_data(arm(home, horizon=horizon), 4, 0).horizon == 4
    with pytest.raises(ConfigError, match="horizon is 3 but framework.action_horizon is 4"):
        open_data(arm(home, horizon=3), 4, 0)


def test_links_are_followed_when_they_are_to_be_and_not_otherwise(home, tmp_path):
    root = shutil.copytree(home / "legs", tmp_path / "legs")
    shutil.move(root / "data", tmp_path / "elsewhere")
    (root / "data").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="is a link out of the dataset"):
        open_data(DataSettings(str(root)), 2, 0)
    assert len(open_data(DataSettings(str(root), follow_links=True), 2, 0).train) > 0


def test_another_column_may_be_the_action_or_the_state(home):
    swapped = open_data(DataSettings(str(home / "arm"), action_key="observation.state"), 2, 0)
    recorded = LeRobotDataset(home / "arm").select(swapped.members[0].train.episodes)
    back = swapped.members[0].normalizers["action"].unnormalize(swapped.train[3]["action"][:1])
    np.testing.assert_allclose(back[0], recorded[3]["state"], atol=1e-5)
    other = open_data(DataSettings(str(home / "arm"), state_key="action"), 2, 0)
    back = other.members[0].normalizers["state"].unnormalize(other.train[3]["state"][None])
    np.testing.assert_allclose(back, recorded[3]["action"], atol=1e-5)


def test_the_split_follows_from_the_seed(home):
    episodes = range(len(LENGTHS["arm"]))
    for seed in (0, 1, 2):
        data = open_data(arm(home), 2, seed)
        assert (data.train.episodes, data.held_out_episodes()) == split_episodes(episodes, 0.25, seed)
