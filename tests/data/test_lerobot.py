"""What a dataset promises across its modules: the right frame, always, from any process."""

import json
import shutil

import av
import numpy as np
import pytest
import torch

from vla_bench.data.layout import Layout
from vla_bench.data.lerobot import DatasetError, LeRobotDataset, validate
from vla_bench.data.lerobot import main as check_program
from vla_bench.data.normalize import Normalizer
from vla_bench.data.writer import LeRobotWriter

LENGTHS = (9, 4, 13, 6, 8)
LAYOUT = Layout(("number", "noise"), kind="absolute", frame="world")


def image_of(number: int) -> np.ndarray:
    """A frame that carries its number as ten squares, black or white, which survive compression."""
    bits = np.array([number >> b & 1 for b in range(16)], np.uint8).reshape(4, 4)
    return np.repeat((bits * 255).repeat(16, 0).repeat(16, 1)[..., None], 3, axis=2)


def number_in(image) -> int:
    pixels = np.asarray(image).astype(int).mean(-1)[8::16, 8::16].ravel()
    return sum(int(value > 127) << b for b, value in enumerate(pixels))


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    found = {}
    for version in ("v2.1", "v3.0"):
        rng, count = np.random.default_rng(0), 0
        found[version] = tmp_path_factory.mktemp("data") / "numbered"
        cameras = {"front": (64, 64), "wrist": (64, 64)}
        writer = LeRobotWriter(
            found[version],
            fps=12.5,
            cameras=cameras,
            state=LAYOUT,
            action=LAYOUT,
            version=version,
            episodes_per_file=2,
        )
        with writer:
            for length in LENGTHS:
                numbers = np.arange(count, count + length)
                values = np.stack([numbers, rng.normal(size=length)], axis=1)
                images = {
                    "front": [image_of(n) for n in numbers],
                    "wrist": [image_of(n + 512) for n in numbers],
                }
                writer.add_episode(images=images, state=values, action=values, task=f"count to {length}")
                count += length
    return found


@pytest.fixture(params=["v2.1", "v3.0"])
def dataset(roots, request):
    return LeRobotDataset(roots[request.param], horizon=3)


def test_the_recording_has_several_episodes_per_video_and_several_videos(roots):
    files = LeRobotDataset(roots["v3.0"]).files
    assert len({path for e in files.episodes for path, _ in e.videos.values()}) == 2 * 3


def test_every_frame_is_the_right_one(dataset):
    assert len(dataset) == sum(LENGTHS)
    for i in np.random.default_rng(1).permutation(len(dataset)):
        assert [number_in(image) for image in dataset[int(i)]["image"]] == [i, i + 512]


def test_every_frame_has_its_numbers_and_its_instruction(dataset):
    for i in np.random.default_rng(1).permutation(len(dataset)):
        sample = dataset[int(i)]
        assert sample["state"][0] == i and sample["action"][0, 0] == i
        length = LENGTHS[np.searchsorted(np.cumsum(LENGTHS), i, side="right")]
        assert sample["lang"] == f"count to {length}"


def test_images_are_near_what_was_recorded(dataset):
    for i in range(len(dataset)):
        for c, image in enumerate(dataset[i]["image"]):
            assert np.abs(np.asarray(image).astype(int) - image_of(i + 512 * c)).mean() < 4


def test_cameras_are_in_the_order_that_is_asked_for(roots):
    dataset = LeRobotDataset(roots["v3.0"], cameras=["wrist", "observation.images.front"])
    assert dataset.cameras == ("wrist", "front")
    assert [number_in(image) for image in dataset[3]["image"]] == [515, 3]


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_read_what_the_parent_reads(roots, context):
    dataset = LeRobotDataset(roots["v3.0"], horizon=2)
    here = [
        dataset[i] for i in range(len(dataset))
    ]  # leaves open readers behind, which a fork must not share
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=4, collate_fn=list, num_workers=2, multiprocessing_context=context
    )
    there = [sample for batch in loader for sample in batch]
    for a, b in zip(here, there, strict=True):
        assert a["origin"] == b["origin"] and np.array_equal(a["action"], b["action"])
        assert all(
            np.array_equal(np.asarray(x), np.asarray(y)) for x, y in zip(a["image"], b["image"], strict=True)
        )


def test_statistics_are_numpys_on_the_raw_columns(roots):
    dataset = LeRobotDataset(roots["v3.0"]).select([0, 2, 4])
    rows = np.concatenate([np.arange(0, 9), np.arange(13, 26), np.arange(32, 40)]).astype(np.float64)
    found = dataset.statistics()["action"]
    for name, value in {"min": rows.min(), "max": rows.max(), "mean": rows.mean(), "std": rows.std()}.items():
        assert getattr(found, name)[0] == pytest.approx(value, abs=1e-12)
    assert found.q99[0] == pytest.approx(np.quantile(rows, 0.99), abs=1e-12)


def test_statistics_decode_no_video(roots, monkeypatch):
    monkeypatch.setattr(av, "open", lambda *a, **k: pytest.fail("a video was opened"))
    LeRobotDataset(roots["v3.0"]).select([0, 2, 4]).statistics()


def test_scaled_actions_come_back(roots):
    dataset = LeRobotDataset(roots["v3.0"])
    scale = Normalizer(dataset.statistics()["action"], "q99")
    action = dataset.columns["action"]
    assert np.abs(scale.unnormalize(scale.normalize(action)) - action).max() < 1e-4


def test_a_damaged_video_is_named_when_a_sample_needs_it(roots, tmp_path):
    shutil.copytree(roots["v2.1"], tmp_path / "numbered")
    path = next((tmp_path / "numbered").rglob("*wrist/episode_000002.mp4"))
    path.write_bytes(path.read_bytes()[:400])
    dataset = LeRobotDataset(tmp_path / "numbered")
    with pytest.raises(DatasetError, match="episode 2 frame 0.*wrist.*episode_000002.mp4"):
        dataset[int(dataset.starts[2])]
    assert len(validate(tmp_path / "numbered")) == 1


def test_the_program_prints_what_a_sound_dataset_holds(roots, capsys):
    check_program([str(roots["v2.1"])])
    assert "5 episodes, 40 frames" in capsys.readouterr().out


def test_the_program_says_what_is_wrong_and_exits_1(roots, tmp_path, capsys):
    shutil.copytree(roots["v2.1"], tmp_path / "numbered")
    info = tmp_path / "numbered/meta/info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"fps": 25}))
    with pytest.raises(SystemExit) as stop:
        check_program([str(tmp_path / "numbered")])
    lines = capsys.readouterr().out.splitlines()
    assert stop.value.code == 1 and any("time stamps do not run at 25 Hz" in line for line in lines)


def test_the_program_checks_some_episodes_alone(roots, tmp_path, capsys):
    shutil.copytree(roots["v2.1"], tmp_path / "numbered")
    for path in (tmp_path / "numbered").rglob("*episode_000004.*"):
        path.unlink()
    check_program([str(tmp_path / "numbered"), "--episodes", "0", "3"])
    assert "2 episodes, 15 frames" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        check_program([str(tmp_path / "numbered")])
    assert "it holds episode 4" in capsys.readouterr().out
