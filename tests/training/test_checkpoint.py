"""A process that is killed while it writes a checkpoint leaves the one before, whole."""

import json
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from vla_bench.config import load_config
from vla_bench.data.lerobot_files import read_files
from vla_bench.serving.policy import Policy
from vla_bench.training.checkpoint import (
    check_checkpoint,
    check_finite,
    columns_hash,
    data_identity,
    find_checkpoint,
    identity_differences,
    last_good_checkpoint,
    latest_checkpoint,
    list_checkpoints,
    load_progress,
    load_trainer,
    read_spec,
    remove_leftovers,
    rng_state,
    save_checkpoint,
    save_trainer,
    set_aside,
    set_rng_state,
    tensor_bytes,
    touched_videos,
)
from vla_bench.training.imitation import train
from vla_bench.training.run import save, set_up

KILLED = """
import os, sys
from pathlib import Path
from vla_bench.config import load_config
from vla_bench.training import checkpoint, imitation

where, source = sys.argv[1:]
owner = {"save_trainer": checkpoint, "replace": os}[where]
real = getattr(owner, where)

def killed(*args, **kwargs):
    if "step_000004" in Path(args[-1]).name:  # the folder itself, not a file in it
        os.kill(os.getpid(), 9)
    return real(*args, **kwargs)

setattr(owner, where, killed)
imitation.train(load_config(source))
"""


@pytest.fixture(scope="module", params=["save_trainer", "replace"])
def killed(request, home, tmp_path_factory) -> SimpleNamespace:
    """A run that was killed in the middle of step 4's checkpoint, or right before its last rename; and what it left."""
    folder = tmp_path_factory.mktemp("killed")
    source = load_config(home / "toy.yaml", f"--run_root_dir {folder} --trainer.save_interval 2")
    source.save(folder / "source.yaml")
    command = [sys.executable, "-c", KILLED, request.param, folder / "source.yaml"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        child = subprocess.run(command, capture_output=True, text=True)
    assert child.returncode == -signal.SIGKILL, child.stderr
    run = folder / "run"
    files = {str(path.relative_to(run / "checkpoints")) for path in (run / "checkpoints").rglob("*")}
    return SimpleNamespace(run=run, files=files, whole=[path.name for path in list_checkpoints(run)])


def test_the_unfinished_checkpoint_is_no_checkpoint(killed):
    assert ".step_000004.tmp/model.safetensors" in killed.files
    assert killed.whole == ["step_000002"]


def test_the_one_before_can_be_served(killed, observation):
    assert np.isfinite(Policy.from_pretrained(killed.run).predict(observation(), seed=0)).all()


def test_a_restart_removes_the_unfinished_one_and_goes_on(killed, losses, tmp_path):
    run = shutil.copytree(killed.run, tmp_path / "run")
    train(load_config(run, f"--run_root_dir {tmp_path} --trainer.resume true"))
    assert not (run / "checkpoints/.step_000004.tmp").exists()
    assert [p.name for p in list_checkpoints(run)] == ["step_000002", "step_000004", "step_000006"]
    assert [step for step, _, _ in losses(run)] == [1, 2, 3, 4, 5, 6]


def draws() -> list:
    """Numbers of all three generators; numpy keeps half of a pair for the next call."""
    numbers = [torch.randn(3).tolist(), np.random.standard_normal(3).tolist(), random.gauss(0, 1)]
    return [*numbers, np.random.rand(), random.random()]


def test_all_three_generators_come_back():
    np.random.standard_normal()
    state = json.loads(json.dumps(rng_state()))
    first = draws()
    assert draws() != first
    set_rng_state(state)
    assert draws() == first


@pytest.fixture
def three(tmp_path):
    """A run with checkpoints of steps 2, 10 and 1,000,000."""
    for step in (2, 10, 1_000_000):
        (tmp_path / f"checkpoints/step_{step:06d}").mkdir(parents=True)
    return tmp_path


def test_the_newest_checkpoint_is_the_one_with_the_most_steps(three):
    assert latest_checkpoint(three).name == find_checkpoint(three).name == "step_1000000"
    assert find_checkpoint(three, 10).name == find_checkpoint(three, "step_000010").name == "step_000010"
    assert latest_checkpoint(three / "elsewhere") is None


def test_only_checkpoints_beyond_the_step_are_set_aside(three):
    assert set_aside(three, 10) == ["step_1000000.damaged"]
    assert [path.name for path in list_checkpoints(three)] == ["step_000002", "step_000010"]


@pytest.mark.parametrize("part, name", [("metadata", "meta/tasks.parquet"), ("columns", "data/a.parquet")])
def test_a_file_that_a_dataset_lacks_is_named(part, name):
    parts = {"metadata": {}, "columns": {}, "videos": {}}
    saved = {**parts, part: {name: "5f", "kept": "00"}}
    assert identity_differences(saved, {**parts, part: {"kept": "00"}}) == [f"{name} is missing"]
    assert identity_differences({**parts, part: {"kept": "00"}}, saved) == [f"{name} is new"]


def test_a_checkpoint_that_is_asked_for_and_not_there_is_named(three):
    with pytest.raises(FileNotFoundError, match="has no checkpoint 'step_000011'.*step_000010"):
        find_checkpoint(three, "11")
    with pytest.raises(FileNotFoundError, match="has no checkpoint 'newest'"):
        find_checkpoint(three, "newest")
    with pytest.raises(FileNotFoundError, match="holds no checkpoint; a run folder has"):
        find_checkpoint(three / "checkpoints")


def test_a_checkpoint_stands_for_itself(three):
    (three / "checkpoints/step_000010/policy.json").write_text("{}")
    assert find_checkpoint(three / "checkpoints/step_000010").name == "step_000010"
    assert find_checkpoint(three / "checkpoints/step_000010", 2).name == "step_000010"


def test_only_unfinished_checkpoints_are_leftovers(three):
    for name in (".step_000011.tmp", ".step_000012.tmp", "step_000011.tmp", ".other.tmp"):
        (three / "checkpoints" / name).mkdir()
        (three / "checkpoints" / name / "model.safetensors").touch()
    assert remove_leftovers(three) == [".step_000011.tmp", ".step_000012.tmp"]
    left = {path.name for path in (three / "checkpoints").iterdir()}
    assert left == {"step_000002", "step_000010", "step_1000000", "step_000011.tmp", ".other.tmp"}


def test_names_of_what_is_set_aside_do_not_meet(three):
    for number in range(3):
        (three / "checkpoints/step_000010").mkdir(exist_ok=True)
        expected = [f"step_000010.damaged{f'_{number + 1}' if number else ''}"]
        expected += ["step_1000000.damaged"] if number == 0 else []
        assert set_aside(three, 9) == expected
    assert set_aside(three, 2) == []


def test_a_run_without_checkpoints_has_no_good_one_and_one_of_damaged_ones_is_refused(three, capsys):
    assert last_good_checkpoint(three / "elsewhere") is None
    with pytest.raises(ValueError, match="none of its 3 checkpoints is whole"):
        last_good_checkpoint(three)
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in said] == [
        f"not continued from {name}" for name in ("step_1000000", "step_000010", "step_000002")
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 1, 3])
def test_a_weight_that_is_not_finite_is_found_wherever_it_stands(value, place):
    module = torch.nn.Linear(2, 2)
    check_finite(module, "here")
    module.weight.data.view(-1)[place] = value
    with pytest.raises(ValueError, match="^here: 'weight' holds numbers that are not finite"):
        check_finite(module, "here")


def test_weights_without_numbers_and_whole_numbers_are_finite():
    module = torch.nn.Module()
    module.empty = torch.nn.Parameter(torch.zeros(0, 3))
    module.counts = torch.nn.Parameter(torch.arange(3), requires_grad=False)
    check_finite(module, "here")


def test_bytes_of_tensors_are_counted_once_wherever_they_stand():
    one, two = torch.zeros(3, 5), torch.zeros(7, dtype=torch.float64)
    assert tensor_bytes([one, {"a": (two,), "b": {"c": one}}, 3, "text", None]) == 60 + 56
    assert tensor_bytes({"a": one, "b": one.view(5, 3)}) == 60 + 60  # one memory, of two shapes
    assert tensor_bytes([]) == 0


FIXED = pa.list_(pa.float32(), 2)
PARTS = {
    "action": pa.array([[1.0, 2], [3, 4], [5, 6]], FIXED),
    "length": pa.array([[1], [2, 3], []], pa.list_(pa.int64())),
    "text": pa.array(["a", "b", "c"]),
    "holes": pa.array([1, None, 3]),
    "index": pa.array([1, 2, 3], pa.int64()),
    "image": pa.array([{"bytes": b"a"}, {"bytes": b"b"}, {"bytes": b"c"}]),
    "raw": pa.array([b"a", b"b", b"c"]),
}
CHANGED = {
    "a number of a vector": {"action": pa.array([[1.0, 2], [3, 4], [5, 7]], FIXED)},
    "two vectors in another order": {"action": pa.array([[3.0, 4], [1, 2], [5, 6]], FIXED)},
    "the type of a vector": {"action": pa.array([[1.0, 2], [3, 4], [5, 6]], pa.list_(pa.float64(), 2))},
    "where lists end": {"length": pa.array([[1, 2], [3], []], pa.list_(pa.int64()))},
    "a number of a list": {"length": pa.array([[1], [2, 4], []], pa.list_(pa.int64()))},
    "a text": {"text": pa.array(["a", "b", "d"])},
    "which row is empty": {"holes": pa.array([1, 3, None])},
    "a number beside an empty row": {"holes": pa.array([1, None, 4])},
    "a whole number": {"index": pa.array([1, 2, 4], pa.int64())},
    "the type of whole numbers": {"index": pa.array([1, 2, 3], pa.int32())},
    "a column more": {"more": pa.array([0, 0, 0])},
}
NOT_CHANGED = {
    "an image": {"image": pa.array([{"bytes": b"a"}, {"bytes": b"b"}, {"bytes": b"d"}])},
    "an image in bytes": {"raw": pa.array([b"a", b"b", b"d"])},
    "an image more": {"more": pa.array([b"a", b"b", b"d"])},
}


def hash_of(folder, columns: dict, **options) -> str:
    pq.write_table(pa.table(columns), folder / "table.parquet", **options)
    return columns_hash(folder / "table.parquet")


@pytest.mark.parametrize("what", CHANGED)
def test_a_change_of_a_column_changes_its_hash(tmp_path, what):
    assert hash_of(tmp_path, PARTS | CHANGED[what]) != hash_of(tmp_path, PARTS)


@pytest.mark.parametrize("what", NOT_CHANGED)
def test_images_count_elsewhere(tmp_path, what):
    assert hash_of(tmp_path, PARTS | NOT_CHANGED[what]) == hash_of(tmp_path, PARTS)


def test_the_hash_of_columns_is_one_of_numbers_not_of_the_file(tmp_path):
    expected = hash_of(tmp_path, PARTS)
    assert hash_of(tmp_path, dict(reversed(PARTS.items()))) == expected
    assert hash_of(tmp_path, PARTS, compression="none", row_group_size=1) == expected
    assert (
        hash_of(tmp_path, {**{k: v for k, v in PARTS.items() if k != "text"}, "txet": PARTS["text"]})
        != expected
    )


@pytest.fixture
def with_images(home, tmp_path):
    """The toy dataset with a third camera whose images stand in the parquet file: its folder, and how to write them."""
    root = shutil.copytree(home / "toy", tmp_path / "toy")
    info = json.loads((root / "meta/info.json").read_text())
    info["features"]["hand"] = {
        "dtype": "image",
        "shape": [4, 4, 3],
        "names": ["height", "width", "channels"],
    }
    (root / "meta/info.json").write_text(json.dumps(info))
    file = root / "data/chunk-000/file-000.parquet"
    table = pq.read_table(file)

    def write(seed: int) -> None:
        rng = np.random.default_rng(seed)
        column = pa.array([{"bytes": rng.bytes(64), "path": None} for _ in range(len(table))])
        pq.write_table(table.append_column("hand", column), file, compression="none")

    write(0)
    return root, write


def test_images_within_parquet_files_are_part_of_what_tells_a_dataset(with_images):
    root, write = with_images
    before = data_identity(read_files(root))
    name = "data/chunk-000/file-000.parquet"
    assert name in before["videos"] and name in before["columns"]
    write(1)
    after = data_identity(read_files(root))
    assert after["columns"] == before["columns"]
    assert identity_differences(before, after) == [f"{name} has other content"]


def test_files_without_images_are_no_videos(home):
    found = data_identity(read_files(home / "toy"))
    assert list(found["columns"]) == ["data/chunk-000/file-000.parquet"]
    assert {name.split("/")[0] for name in found["videos"]} == {"videos"} and len(found["videos"]) == 2
    assert set(found["metadata"]) == {
        "meta/info.json", "meta/modality.json", "meta/stats.json", "meta/tasks.parquet",
        "meta/episodes/chunk-000/file-000.parquet",
    }  # fmt: skip


def test_hidden_files_are_no_metadata(home, tmp_path):
    root = shutil.copytree(home / "toy", tmp_path / "toy")
    (root / "meta/.DS_Store").write_text("x")
    assert data_identity(read_files(root))["metadata"] == data_identity(read_files(home / "toy"))["metadata"]


VIDEO = {"size": 5, "modified_ns": 1, "sample": "aa", "sha256": "ee"}
WITHOUT = {key: value for key, value in VIDEO.items() if key != "sha256"}
VIDEOS = [
    (VIDEO, VIDEO, None),
    (VIDEO, {**VIDEO, "size": 6}, "has 6 bytes and had 5"),
    (VIDEO, {**VIDEO, "sha256": "ff"}, "has other content"),
    (VIDEO, {**VIDEO, "sample": "bb"}, None),  # every byte is the same
    (WITHOUT, {**WITHOUT, "sample": "bb"}, "has other content"),
    (WITHOUT, {**VIDEO, "sample": "bb"}, "has other content"),
    (VIDEO, {**WITHOUT, "sample": "bb"}, "has other content"),
    (WITHOUT, VIDEO, None),
    (VIDEO, {**VIDEO, "modified_ns": 2}, None),
]


@pytest.mark.parametrize("saved, now, change", VIDEOS)
def test_a_video_is_compared_by_all_that_both_know(saved, now, change):
    parts = {"metadata": {"meta/a": "1"}, "columns": {"data/a": "2"}}
    lines = identity_differences({**parts, "videos": {"a.mp4": saved}}, {**parts, "videos": {"a.mp4": now}})
    assert lines == ([f"a.mp4 {change}"] if change else [])


@pytest.mark.parametrize("part", ["metadata", "columns"])
def test_each_file_of_each_part_is_compared(part):
    parts = {"metadata": {"a": "1", "b": "2"}, "columns": {"c": "3", "d": "4"}, "videos": {}}
    for name in parts[part]:
        changed = {**parts, part: {**parts[part], name: "9"}}
        assert identity_differences(parts, changed) == [f"{name} has other content"]


def test_a_video_is_missing_or_new_but_for_files_that_counted_as_columns_before():
    nothing = {"metadata": {}, "columns": {}, "videos": {}}
    seen = {**nothing, "videos": {"a.mp4": VIDEO}}
    assert identity_differences(seen, nothing) == ["a.mp4 is missing"]
    assert identity_differences(nothing, seen) == ["a.mp4 is new"]
    assert (
        identity_differences({**nothing, "columns": {"a.mp4": "1"}}, {**seen, "columns": {"a.mp4": "1"}})
        == []
    )


def test_a_touched_video_is_one_with_another_time():
    saved = {"videos": {"a": VIDEO, "b": VIDEO, "gone": VIDEO}}
    now = {"videos": {"a": VIDEO, "b": {**VIDEO, "modified_ns": 3}, "new": VIDEO}}
    assert touched_videos(saved, now) == ["b"]


def test_every_byte_of_a_video_counts_when_it_is_to_be_verified(home):
    files = read_files(home / "toy")
    for verify in (False, True):
        videos = data_identity(files, verify=verify)["videos"]
        assert {"sha256" in video for video in videos.values()} == {verify}


OTHER_KINDS = {
    "action": 3, "state": 3, "cameras": "front", "image_size": "big", "horizon": "4", "control_rate": "fast",
    "normalization": "q99", "dataset": 3, "statistics_hash": None, "benchmark": 3, "hash": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(home, tmp_path_factory):
    """A run with a checkpoint at its first step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        folder = tmp_path_factory.mktemp("saved")
        run = set_up(load_config(home / "toy.yaml", f"--run_root_dir {folder}"))
        run.step = 1
        save(run)
        yield run


@pytest.mark.parametrize("field", OTHER_KINDS)
def test_a_field_of_another_kind_in_policy_json_is_named(saved, tmp_path, field):
    content = json.loads((latest_checkpoint(saved.folder) / "policy.json").read_text())
    assert field in content
    (tmp_path / "policy.json").write_text(json.dumps({**content, field: OTHER_KINDS[field]}))
    with pytest.raises(ValueError, match=f"policy.json.*'{field}'") as error:
        read_spec(tmp_path)
    assert "the file was edited" not in str(error.value) and "\n" not in str(error.value)


def test_a_specification_comes_back_from_its_file(saved):
    assert read_spec(latest_checkpoint(saved.folder)) == saved.spec


NEEDED = ["model.safetensors", "framework.json", "policy.json"]
RESUMED = ["trainer/optimizer.pt", "trainer/rng.json", "trainer/progress.json"]


@pytest.mark.parametrize("manifest", [True, False])
@pytest.mark.parametrize("name", [*NEEDED, *RESUMED])
def test_a_file_that_a_checkpoint_lacks_is_named(saved, tmp_path, name, manifest):
    copy = shutil.copytree(latest_checkpoint(saved.folder), tmp_path / "step_000001")
    if not manifest:
        (copy / "manifest.json").unlink()
    check_checkpoint(copy)
    check_checkpoint(copy, resume=True)
    (copy / name).unlink()
    with pytest.raises((FileNotFoundError, ValueError), match=Path(name).name):
        check_checkpoint(copy, resume=True)
    if name in RESUMED:
        check_checkpoint(copy)
        return
    with pytest.raises((FileNotFoundError, ValueError), match=name):
        check_checkpoint(copy)


def test_a_checkpoint_without_its_trainer_can_be_served_and_not_resumed(saved, tmp_path):
    copy = shutil.copytree(latest_checkpoint(saved.folder), tmp_path / "step_000001")
    shutil.rmtree(copy / "trainer")
    (copy / "manifest.json").unlink()
    check_checkpoint(copy)
    with pytest.raises(
        FileNotFoundError, match="no trainer/ to continue from; it can be served, not resumed"
    ):
        check_checkpoint(copy, resume=True)


def test_every_byte_is_compared_when_a_run_is_resumed_or_when_it_is_asked_for(saved, tmp_path):
    copy = shutil.copytree(latest_checkpoint(saved.folder), tmp_path / "step_000001")
    file = copy / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1  # of a number: the size is the same
    file.write_bytes(content)
    for options in ({"resume": True}, {"verify": True}):
        with pytest.raises(ValueError, match="model.safetensors"):
            check_checkpoint(copy, **options)


@pytest.mark.parametrize("name", ["framework.json", "trainer/progress.json", "trainer/rng.json"])
def test_a_file_that_is_no_json_is_named(saved, tmp_path, name):
    copy = shutil.copytree(latest_checkpoint(saved.folder), tmp_path / "step_000001")
    (copy / "manifest.json").unlink()
    (copy / name).write_text("{")
    with pytest.raises(ValueError, match=Path(name).name):
        check_checkpoint(copy, resume=True)


def test_the_last_good_checkpoint_is_the_newest_whole_one(saved, tmp_path, capsys):
    first = latest_checkpoint(saved.folder)
    for step in (2, 3, 4):
        shutil.copytree(first, tmp_path / f"run/checkpoints/step_{step:06d}")
    assert last_good_checkpoint(tmp_path / "run").name == "step_000004" and capsys.readouterr().out == ""
    (tmp_path / "run/checkpoints/step_000004/policy.json").unlink()
    (tmp_path / "run/checkpoints/step_000002/policy.json").unlink()
    assert last_good_checkpoint(tmp_path / "run").name == "step_000003"
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("not continued from step_000004: ") and "policy.json" in line


def test_weights_that_were_gathered_are_those_that_are_saved(saved, tmp_path):
    weights = {name: tensor + 1 for name, tensor in saved.framework.state_dict().items()}
    parts = {
        "framework": saved.framework,
        "spec": saved.spec,
        "optimizer": saved.optimizer,
        "scheduler": saved.scheduler,
    }
    folder = save_checkpoint(
        tmp_path, 12, **parts, rng=[rng_state()], progress={"step": 12, "more": [1]}, weights=weights
    )
    assert folder == tmp_path / "checkpoints/step_000012"
    found = load_file(folder / "model.safetensors")
    assert all(torch.equal(found[name], weights[name]) for name in found) and found.keys() <= weights.keys()
    assert json.loads((folder / "trainer/progress.json").read_text()) == {"step": 12, "more": [1]}
    check_checkpoint(folder, resume=True)


def test_optimizer_and_schedule_come_back(saved, tmp_path):
    model = torch.nn.Linear(3, 2)
    make = lambda: torch.optim.AdamW(model.parameters(), lr=0.5)
    optimizer = make()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    for _ in range(3):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        schedule.step()
    save_trainer(
        tmp_path,
        optimizer=optimizer,
        scheduler=schedule,
        rng=[rng_state(), rng_state()],
        progress={"step": 3},
    )
    expected = draws()
    other = make()
    again = torch.optim.lr_scheduler.LambdaLR(other, lambda step: 1 / (step + 1))
    load_trainer(tmp_path, optimizer=other, scheduler=again, rank=1)
    assert draws() == expected and again.last_epoch == 3
    ours, theirs = optimizer.state_dict(), other.state_dict()
    assert ours["param_groups"] == theirs["param_groups"] and theirs["param_groups"][0]["lr"] == 0.125
    for key, state in ours["state"].items():
        assert all(torch.equal(value, theirs["state"][key][name]) for name, value in state.items())
    assert load_progress(tmp_path) == {"step": 3}


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_texts_are_hashed_by_what_they_say(tmp_path, kind):
    """Whatever objects hold them, and whether one of them is missing."""

    def hashed(*texts):
        pq.write_table(
            pa.table({"text": pa.array(["".join(list(t)) if t else t for t in texts], kind)}), path
        )
        return columns_hash(path)

    path = tmp_path / "file.parquet"
    assert hashed("open the drawer", "close it") == hashed("open the drawer", "close it")
    assert hashed("open the drawer", "close it") != hashed("open the drawer", "shut it")
    assert hashed("open the drawer", None) == hashed("open the drawer", None) != hashed("open the drawer", "")
