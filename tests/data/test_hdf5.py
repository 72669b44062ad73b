"""Demonstrations of LIBERO and robomimic become the same numbers, the same images and the same instruction."""

import json
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from vla_bench.data.hdf5 import convert_hdf5, main
from vla_bench.data.lerobot import LeRobotDataset
from vla_bench.data.lerobot_files import read_files
from vla_bench.data.paths import DatasetError
from vla_bench.data.validation import validate
from vla_bench.registry import RegistryError

LENGTHS = (4, 7, 3)
LIBERO = {"language_instruction": "put the bowl on the plate"}
RATE = {"env_kwargs": {"control_freq": 20}}
CAMERAS = {"agentview_rgb": (48, 64), "eye_in_hand_rgb": (32, 32)}
STATE = {"ee_states": 6, "gripper_states": 2}


def frame(demo: int, step: int, size: tuple[int, int]) -> np.ndarray:
    """An image whose upper half, upper left and lower right differ, as OpenGL gives it: the last row first."""
    height, width = size
    image = np.full((height, width, 3), 16 * demo + 4 * step, np.uint8)
    image[: height // 2] += 100
    image[: height // 2, : width // 2] += 60
    return image[::-1]


def write(
    path: Path,
    *,
    problem=LIBERO,
    env=RATE,
    lengths=LENGTHS,
    numbers=None,
    state=STATE,
    cameras=CAMERAS,
    bias=0.0,
) -> Path:
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        for name, content in (("problem_info", problem), ("env_args", env)):
            if content is not None:
                data.attrs[name] = content if isinstance(content, str) else json.dumps(content)
        for number, length in zip(numbers or range(len(lengths)), lengths):
            demo = data.create_group(f"demo_{number}")
            demo["actions"] = rng.normal(size=(length, 7)) + bias
            for name, size in cameras.items():
                images = np.stack([frame(number, t, size) for t in range(length)])
                demo.create_dataset(f"obs/{name}", data=images, compression="gzip")
            for name, width in state.items():
                demo[f"obs/{name}"] = rng.normal(size=(length, width))
            demo["obs/joint_states"] = rng.normal(size=(length, 7))
    return path


@pytest.fixture
def libero(tmp_path):
    return write(tmp_path / "bowl_demo.hdf5")


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_numbers_are_the_same(version, libero, tmp_path):
    report = convert_hdf5([libero], tmp_path / "new", images="flip", version=version)
    assert report == {"episodes": 3, "frames": 14, "left_out": ["joint_states"]}
    assert validate(tmp_path / "new", every_frame=True) == []
    data = LeRobotDataset(tmp_path / "new")
    with h5py.File(libero) as file:
        for which, column in (("actions",), "action"), (("obs/ee_states", "obs/gripper_states"), "state"):
            parts = [np.hstack([file[f"data/demo_{i}/{name}"][()] for name in which]) for i in range(3)]
            assert (data.columns[column] == np.concatenate(parts).astype(np.float32)).all()
    assert data.fps == 20 and np.diff(data.starts).tolist() == list(LENGTHS)
    assert read_files(tmp_path / "new").tasks == {0: "put the bowl on the plate"}


UPRIGHT = {
    "flip": (lambda i: i[::-1], 160, 100),
    "as_is": (lambda i: i, 0, 0),
    "rotate180": (lambda i: i[::-1, ::-1], 100, 160),
}


@pytest.mark.parametrize("how", UPRIGHT)
def test_images_stand_as_they_were_told_to(how, libero, tmp_path):
    turn, upper_left, upper_right = UPRIGHT[how]
    convert_hdf5([libero], tmp_path / "new", images=how, crf=0)
    data = LeRobotDataset(tmp_path / "new")
    assert data.cameras == ("agentview", "eye_in_hand")
    for i, (demo, step) in enumerate((d, t) for d, n in enumerate(LENGTHS) for t in range(n)):
        for image, size in zip(data[i]["image"], CAMERAS.values()):
            assert np.abs(np.asarray(image).astype(int) - turn(frame(demo, step, size))).max() <= 3
    first = np.asarray(data[0]["image"][0]).astype(int)
    assert abs(first[2, 2, 0] - upper_left) <= 3 and abs(first[2, -2, 0] - upper_right) <= 3
    assert json.loads((tmp_path / "new/meta/source.json").read_text()) == {
        "files": ["bowl_demo.hdf5"],
        "images": how,
    }


def test_which_way_is_up_is_never_assumed(libero, tmp_path):
    with pytest.raises(TypeError, match="images"):
        convert_hdf5([libero], tmp_path / "new")


@pytest.mark.parametrize(
    "text", ["open it", '"open it"', list("open it"), list('"open it"'), " open it "], ids=str
)
def test_the_instruction_in_every_form(text, tmp_path):
    path = write(tmp_path / "a.hdf5", problem={"language_instruction": text})
    convert_hdf5([path], tmp_path / "new", images="flip")
    assert read_files(tmp_path / "new").tasks == {0: "open it"}


def test_several_files_are_several_instructions(libero, tmp_path):
    other = write(
        tmp_path / "cup.hdf5", problem={"language_instruction": "lift the cup"}, lengths=(5,), bias=9
    )
    report = convert_hdf5([libero, other], tmp_path / "new", images="flip")
    assert report["episodes"] == 4
    data = LeRobotDataset(tmp_path / "new")
    assert data[13]["lang"] == "put the bowl on the plate" and data[14]["lang"] == "lift the cup"


def test_demonstrations_are_in_the_order_of_their_numbers(tmp_path):
    path = write(tmp_path / "a.hdf5", numbers=[10, 9, 1])
    convert_hdf5([path], tmp_path / "new", images="flip")
    assert np.diff(LeRobotDataset(tmp_path / "new").starts).tolist() == [3, 7, 4]


def test_robomimic_is_read_with_an_instruction_of_ours(tmp_path):
    state = {"robot0_eef_pos": 3, "robot0_eef_quat": 4, "robot0_gripper_qpos": 2}
    path = write(tmp_path / "lift.hdf5", problem=None, state=state, cameras={"agentview_image": (48, 48)})
    convert_hdf5([path], tmp_path / "new", images="as_is", task="lift the cube")
    data = LeRobotDataset(tmp_path / "new")
    assert data.columns["state"].shape == (14, 9) and data.cameras == ("agentview",)


def test_a_robot_names_the_numbers(libero, tmp_path):
    convert_hdf5([libero], tmp_path / "new", images="flip", robot="libero_franka")
    data = LeRobotDataset(tmp_path / "new")
    assert data.action_layout.gripper == "positive_closes" and data.action_layout.kind == "delta"
    assert "gripper" in data.action_layout.names[-1]
    with pytest.raises(ValueError, match="the action has 7 numbers, the robot aloha declares 14"):
        convert_hdf5([libero], tmp_path / "other", images="flip", robot="aloha")


def shorter(file):
    images = file["data/demo_1/obs/agentview_rgb"][:5]
    del file["data/demo_1/obs/agentview_rgb"]
    file["data/demo_1/obs/agentview_rgb"] = images


def floating(file):
    images = file["data/demo_2/obs/eye_in_hand_rgb"][()] / 255
    del file["data/demo_2/obs/eye_in_hand_rgb"]
    file["data/demo_2/obs/eye_in_hand_rgb"] = images


def not_finite(file):
    file["data/demo_1/actions"][2, 3] = np.nan


def renamed(file):
    file["data/demo_1"].move("actions", "action")


def linked(file):
    del file["data/demo_0/actions"]
    file["data/demo_0/actions"] = h5py.ExternalLink("other.hdf5", "/actions")


def without(file):
    del file["data/demo_1/obs/ee_states"]


def dangling(file):
    file["data"].attrs["problem_info"] = "{"


FAULTS = {
    shorter: r"demo_1/obs/agentview_rgb has shape \[5, 48, 64, 3\], expected \[7, any, any, 3\]",
    floating: "demo_2/obs/eye_in_hand_rgb holds float64, expected uint8",
    not_finite: "episode 1: action holds values that are not finite",
    renamed: "demo_1/actions is missing; did you mean 'action'",
    linked: "demo_0/actions is a link to another file",
    without: "demo_1/obs/ee_states is missing",
    dangling: "attribute 'problem_info' of data is not JSON",
}


@pytest.mark.parametrize("damage", FAULTS, ids=lambda f: f.__name__)
def test_what_is_wrong_is_named_and_leaves_nothing(damage, libero, tmp_path):
    with h5py.File(libero, "r+") as file:
        damage(file)
    with pytest.raises(ValueError, match=FAULTS[damage]) as told:
        convert_hdf5([libero], tmp_path / "new", images="flip")
    assert "\n" not in str(told.value)
    assert [p.name for p in tmp_path.iterdir()] == [libero.name]


def test_a_truncated_file_is_named(libero, tmp_path):
    libero.write_bytes(libero.read_bytes()[:3000])
    with pytest.raises(DatasetError, match="bowl_demo.hdf5 cannot be read as HDF5"):
        convert_hdf5([libero], tmp_path / "new", images="flip")


def test_files_of_two_rates_are_refused(libero, tmp_path):
    other = write(tmp_path / "slow.hdf5", env={"env_kwargs": {"control_freq": 10}})
    with pytest.raises(DatasetError, match="slow.hdf5: demo_0 runs at 10 Hz, the files before it at 20 Hz"):
        convert_hdf5([libero, other], tmp_path / "new", images="flip")
    convert_hdf5([libero, other], tmp_path / "new", images="flip", fps=15)
    assert LeRobotDataset(tmp_path / "new").fps == 15


def test_without_h5py_the_line_to_run_is_told(libero, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(RegistryError, match=r'HDF5 files need \'h5py\': pip install "vla_bench\[hdf5\]"'):
        convert_hdf5([libero], tmp_path / "new", images="flip")


def test_the_program_says_what_it_left_out(libero, tmp_path, capsys):
    main([str(libero), str(tmp_path / "new"), "--images", "flip", "--cameras", "agentview_rgb"])
    told = capsys.readouterr().out.strip()
    assert told == f"{tmp_path / 'new'}: 3 episodes, 14 frames; left out: eye_in_hand_rgb, joint_states"
