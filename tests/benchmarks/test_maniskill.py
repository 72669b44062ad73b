"""ManiSkill without questions, and its step without images beside its own step; `make simpler` runs what needs it."""

import os
import subprocess
import sys

import numpy as np
import pytest

from vla_bench.benchmarks import maniskill
from vla_bench.benchmarks.maniskill import ASSETS_VARIABLE, assets_folder, check_assets
from vla_bench.benchmarks.simulated import fit_image
from vla_bench.registry import RegistryError

CARROT = "PutCarrotOnPlateInScene-v1"


@pytest.mark.parametrize("ours, theirs, found", [("a", "b", "a"), (None, "b", "b"), ("", "b", "b")])
def test_our_variable_names_the_assets_before_theirs(ours, theirs, found, tmp_path, monkeypatch):
    monkeypatch.delenv(ASSETS_VARIABLE, raising=False)
    if ours is not None:
        monkeypatch.setenv(ASSETS_VARIABLE, ours and str(tmp_path / ours))
    monkeypatch.setenv("MS_ASSET_DIR", str(tmp_path / theirs))
    assert assets_folder() == tmp_path / found


def test_assets_that_are_not_there_are_named_with_the_command_and_nothing_is_asked(tmp_path, monkeypatch):
    monkeypatch.setenv(ASSETS_VARIABLE, str(tmp_path))
    (tmp_path / "data/one").mkdir(parents=True)
    with pytest.raises(FileNotFoundError) as caught:
        check_assets({"first": "one", "second": "two", "third": "three"})
    told = str(caught.value)
    assert "no assets second, third in" in told and "download_asset second && " in told
    assert "download_asset first" not in told and "\n" not in told


def test_a_missing_package_is_named_with_the_line_to_run(monkeypatch):
    monkeypatch.setitem(sys.modules, "mani_skill", None)
    monkeypatch.setitem(sys.modules, "mani_skill.envs", None)
    with pytest.raises(RegistryError, match=r'pip install "vla_bench\[maniskill\]"'):
        maniskill.load_maniskill()


@pytest.mark.parametrize(
    "error, kind",
    [("vk::createInstanceUnique: ErrorIncompatibleDriver", OSError), ("a wrong joint", RuntimeError)],
)
def test_only_a_fault_of_vulkan_is_told_as_one(error, kind, monkeypatch):
    class Gym:
        @staticmethod
        def make(name, **arguments):
            raise RuntimeError(error)

    monkeypatch.setattr(maniskill, "load_maniskill", lambda: (Gym, None))
    with pytest.raises(kind) as caught:
        maniskill.make_environment("PickCube-v1")
    assert type(caught.value) is kind and ("VK_ICD_FILENAMES" in str(caught.value)) == (kind is OSError)


def test_an_image_of_another_size_is_the_whole_image():
    frame = np.zeros((40, 60, 3), np.uint8)
    frame[:20, :30], frame[20:, 30:] = (255, 0, 0), (0, 0, 255)
    small = fit_image(frame, (20, 20)).astype(int)
    assert small[5, 5].tolist() == [255, 0, 0] and small[15, 15].tolist() == [0, 0, 255]
    assert small[5, 15].max() == 0 and fit_image(frame, (40, 60)) is frame


def test_a_step_is_that_of_the_environment_itself(maniskill_installed):
    """Bit for bit: states, images and success, whether somebody looks in between or not."""
    import torch

    ours = maniskill.ManiSkillSimulator(
        "carrot", CARROT, ["3rd_view_camera"], (480, 640), obs_mode="rgb+segmentation"
    )
    theirs = maniskill.make_environment(CARROT, obs_mode="rgb+segmentation")
    theirs.reset(seed=0, options={"episode_id": torch.tensor([5]), "reconfigure": True})
    ours._reset(0, {"episode_id": torch.tensor([5])})
    rng = np.random.default_rng(1)
    for i in range(8):
        action = np.float32([*rng.uniform(-0.03, 0.03, 3), *rng.uniform(-0.1, 0.1, 3), rng.choice([-1, 1])])
        seen, _, _, _, info = theirs.step(action)
        assert ours.step(action) == bool(info["success"][0])
        assert torch.equal(ours.env.get_state(), theirs.get_state())
        if i % 3 == 2:
            rgb = seen["sensor_data"]["3rd_view_camera"]["rgb"][0].numpy()
            np.testing.assert_array_equal(ours.frames()[0], rgb)
    assert int(ours.env._elapsed_steps[0]) == int(theirs._elapsed_steps[0]) == 8
    ours.close()
    theirs.close()


def test_a_machine_without_vulkan_is_told_what_to_install(maniskill_installed):
    code = f"""from vla_bench.benchmarks.maniskill import make_environment
try:
    make_environment({CARROT!r}, obs_mode="rgb+segmentation").reset()
except OSError as error:
    print("told:", error)"""
    bare = {k: v for k, v in os.environ.items() if k not in ("VK_ICD_FILENAMES", "LD_LIBRARY_PATH")}
    bare["VK_ICD_FILENAMES"] = "/nowhere.json"
    done = subprocess.run([sys.executable, "-c", code], env=bare, capture_output=True, text=True)
    assert done.returncode == 0 and "told: no Vulkan here" in done.stdout, done.stderr[-800:]
    assert "lavapipe" in done.stdout
