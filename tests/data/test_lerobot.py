"""What a dataset promises across its modules: the right frame, always, from any process."""

import json
import shutil

import av
import numpy as np
import pytest
import torch

from vla_bench.data.layout import Layout
from vla_bench.data.lerobot import DatasetError, LeRobotDataset, made_up_dataset, validate
from vla_bench.data.lerobot import main as check_program
from vla_bench.data.normalize import Normalizer
from vla_bench.data.video import VideoReader
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


@pytest.mark.parametrize("row", [0, 8, 9, 12, 39])
def test_a_sample_holds_these_keys_and_values(dataset, row):
    sample = dataset[row]
    ends = np.cumsum((0, *LENGTHS))
    episode = int(np.searchsorted(ends, row, side="right")) - 1
    rows = np.minimum(row + np.arange(3), ends[episode + 1] - 1)
    assert set(sample) == {"image", "lang", "action", "action_is_pad", "dataset", "origin", "state"}
    assert sample["dataset"] == "numbered" == dataset.name
    assert sample["origin"] == f"numbered episode {episode} frame {row - ends[episode]}"
    assert sample["action"].tolist() == dataset.columns["action"][rows].tolist()
    assert sample["action_is_pad"].tolist() == [row + step >= ends[episode + 1] for step in range(3)]
    assert sample["state"].tolist() == dataset.columns["state"][row].tolist()
    assert sample["action"].dtype == sample["state"].dtype == np.float32


@pytest.mark.parametrize("row", [-1, 40])
def test_a_row_outside_of_the_dataset_is_refused(dataset, row):
    with pytest.raises(IndexError, match=rf"numbered: sample {row} is outside 0..39"):
        dataset[row]


def test_arguments_reach_what_they_name(roots):
    plain = LeRobotDataset(roots["v3.0"])
    assert (plain.horizon, plain.name, plain.fps, plain.benchmark) == (1, "numbered", 12.5, "")
    assert (plain.cameras, plain.image_size, plain.image_sizes) == (
        ("front", "wrist"),
        (64, 64),
        ((64, 64),) * 2,
    )
    assert plain.action_layout == plain.state_layout == LAYOUT and plain.episodes == [0, 1, 2, 3, 4]
    named = LeRobotDataset(roots["v3.0"], name="other", horizon=2, state_key=None, episodes=[3, 1])
    assert (named.name, named.horizon, named.state_layout, named.episodes) == ("other", 2, None, [3, 1])
    assert "state" not in named[0] and named[0]["dataset"] == "other" and len(named) == 10
    assert named[0]["action"][0, 0] == 26 and named[6]["action"][0, 0] == 9
    swapped = LeRobotDataset(roots["v3.0"], action_key="observation.state", state_key="action")
    assert swapped.columns["action"].tolist() == plain.columns["state"].tolist()
    with pytest.raises(ValueError, match="horizon must be at least 1, got 0"):
        LeRobotDataset(roots["v3.0"], horizon=0)


def test_a_selection_and_scales_leave_the_dataset_as_it_was(roots):
    whole = LeRobotDataset(roots["v3.0"], horizon=2)
    scales = {"action": Normalizer(whole.statistics()["action"], "min_max")}
    scaled, some = whole.with_normalizers(scales), whole.select([4, 0])
    assert (len(whole), len(some), some.episodes, some.starts.tolist()) == (40, 17, [4, 0], [0, 8, 17])
    assert whole.normalizers == {} and scaled.normalizers == scales and some.normalizers == {}
    np.testing.assert_array_equal(scaled[3]["action"], scales["action"].normalize(whole[3]["action"]))
    np.testing.assert_array_equal(scaled[3]["state"], whole[3]["state"])
    assert some.columns["action"][:, 0].tolist() == [*range(32, 40), *range(9)]
    assert LeRobotDataset(roots["v3.0"], normalizers=scales)[0]["action"][0, 0] == -1
    found = some.statistics()
    assert (found["num_transitions"], found["num_trajectories"]) == (17, 2)
    assert LeRobotDataset(roots["v3.0"], state_key=None).statistics()["state"] is None


def test_a_task_that_is_none_is_named(roots, tmp_path):
    shutil.copytree(roots["v2.1"], tmp_path / "numbered")
    path = tmp_path / "numbered/meta/tasks.jsonl"
    path.write_text(path.read_text().replace("count to 4", "  "))
    dataset = LeRobotDataset(tmp_path / "numbered")
    assert dataset[0]["lang"] == "count to 9"
    with pytest.raises(
        DatasetError, match="episode_000001.parquet: episode 1 has task_index 1, which names no instr"
    ):
        dataset[9]


def of_program(capsys, *words: str) -> list[str]:
    check_program(list(words))
    return capsys.readouterr().out.splitlines()


def test_the_program_prints_these_lines(roots, capsys):
    root = str(roots["v3.0"])
    lines = of_program(capsys, root, "--horizon", "2", "--cameras", "wrist", "front", "--state_key", "none")
    sample = LeRobotDataset(root, horizon=2)[20]
    assert lines == [
        f"{root}: LeRobot v3.0, 5 episodes, 40 frames, 5 tasks",
        "  12.5 Hz, cameras wrist, front; action ('number', 'noise')",
        "  image         ['RGB 64 x 64', 'RGB 64 x 64']",
        "  lang          count to 13",
        f"  action        {sample['action'].astype(float).round(3).tolist()}",
        "  action_is_pad [False, False]",
        "  dataset       numbered",
        "  origin        numbered episode 2 frame 7",
    ]
    lines = of_program(capsys, root, "--action_key", "observation.state")
    assert len(lines) == 9 and lines[-1].startswith("  state         [20.0, ")
    assert lines[4].count("[") == 5  # four actions in a chunk


def test_the_program_takes_a_configuration_and_its_overrides(roots, capsys, tmp_path):
    root = str(roots["v3.0"])
    config = tmp_path / "c.yaml"
    config.write_text(
        f"framework: {{action_horizon: 3}}\ndatasets: {{vla_data: {{root: {root}, cameras: [wrist], state_key: null}}}}\n"
    )
    lines = of_program(capsys, "--config_yaml", str(config))
    assert (
        "cameras wrist;" in lines[1]
        and lines[4].count("[") == 4
        and not any("  state " in line for line in lines)
    )
    lines = of_program(
        capsys, "--config_yaml", str(config), "datasets.vla_data.cameras=[front]", "--horizon", "1"
    )
    assert "cameras front;" in lines[1] and lines[4].count("[") == 2
    config.write_text("datasets: {vla_data: {robot: aloha}}\n")
    with pytest.raises(SystemExit):
        check_program(["--config_yaml", str(config)])
    assert "datasets.vla_data.root" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "the dataset's folder is missing"),
        (["a", "b"], "unrecognized arguments: a b; expected the dataset's folder"),
        (["--horizn", "3"], "unrecognized arguments: --horizn 3"),
    ],
)
def test_the_program_says_what_is_wrong_with_its_words(capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        check_program(words)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_the_program_shows_a_made_up_dataset_where_none_is_named(capsys):
    check_program([], made_up=True)
    lines = capsys.readouterr().out.splitlines()
    assert "2 episodes, 20 frames, 2 tasks" in lines[0] and "lang          move right" in lines[3]


def test_a_made_up_square_moves_as_its_action_says(tmp_path):
    dataset = LeRobotDataset(made_up_dataset(tmp_path / "made_up"))
    assert (len(dataset), dataset.fps, dataset.cameras, dataset.image_size) == (20, 10.0, ("top",), (32, 32))
    assert (dataset.action_layout.kind, dataset.state_layout.kind) == ("delta", "absolute")
    for row in range(20):
        sample = dataset[row]
        down, right = (2 * (row % 10), 0) if row < 10 else (0, 2 * (row % 10))
        assert sample["state"].tolist() == [4 + down, 4 + right]
        assert sample["action"][0].tolist() == ([2, 0] if row < 10 else [0, 2])
        bright = np.argwhere(np.asarray(sample["image"][0]).mean(-1) > 127)
        assert (bright.min(0).tolist(), bright.max(0).tolist()) == (
            [4 + down, 4 + right],
            [7 + down, 7 + right],
        )


def test_the_program_writes_checksums_that_are_compared_from_then_on(roots, tmp_path, capsys):
    root = shutil.copytree(roots["v3.0"], tmp_path / "numbered")
    assert of_program(capsys, str(root), "--write_checksums")[0] == f"wrote {root / 'manifest.json'}"
    assert of_program(capsys, str(root))[0].startswith(f"{root}: LeRobot")
    (root / "meta/stats.json").write_text("{}")
    with pytest.raises(SystemExit):
        check_program([str(root)])
    assert "meta/stats.json" in capsys.readouterr().out


def test_every_frame_is_decoded_when_it_is_asked_for(roots, tmp_path, capsys, monkeypatch):
    seen = set()
    clean = VideoReader.read_at
    monkeypatch.setattr(
        VideoReader,
        "read_at",
        lambda self, start, length, frame, *rest: (seen.add(frame), clean(self, start, length, frame, *rest))[
            1
        ],
    )
    of_program(capsys, str(roots["v2.1"]))
    assert seen == {0, 3, 5, 7, 8, 12}  # the ends, and the printed sample
    of_program(capsys, str(roots["v2.1"]), "--every_frame")
    assert seen == set(range(13))


def test_the_program_checks_some_episodes_alone(roots, tmp_path, capsys):
    shutil.copytree(roots["v2.1"], tmp_path / "numbered")
    for path in (tmp_path / "numbered").rglob("*episode_000004.*"):
        path.unlink()
    check_program([str(tmp_path / "numbered"), "--episodes", "0", "3"])
    assert "2 episodes, 15 frames" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        check_program([str(tmp_path / "numbered")])
    assert "it holds episode 4" in capsys.readouterr().out


def test_the_program_prints_width_and_height_of_each_camera(make, tmp_path, capsys):
    features = make.PLAIN | {"observation.images.tall": make.camera((40, 20, 3))}
    root = make.v21(tmp_path / "ds", features=features)
    lines = of_program(capsys, str(root))
    assert lines[1].startswith("  30 Hz, cameras top, tall; action (")
    assert lines[2] == "  image         ['RGB 64 x 48', 'RGB 20 x 40']"


def configuration(path, **section):
    path.write_text(json.dumps({"datasets": {"vla_data": section}}))
    return ["--config_yaml", str(path)]


def test_the_program_checks_every_dataset_of_a_mixture_by_its_own_settings(roots, make, tmp_path, capsys):
    features = {"actions": make.vector(3), make.TOP: make.camera()}
    other = make.v21(tmp_path / "other", features=features, extra={"actions": make.counting(3)})
    entries = [{"dataset": str(roots["v3.0"]), "cameras": ["wrist"], "name": "first"}]
    entries.append({"dataset": str(other), "action_key": "actions", "state_key": None})
    check_program(configuration(tmp_path / "mixture.yaml", mixture=entries))
    printed = capsys.readouterr().out
    assert "5 episodes, 40 frames" in printed and "2 episodes, 11 frames" in printed
    assert "cameras wrist;" in printed
    next(other.rglob("*.mp4")).unlink()
    with pytest.raises(SystemExit) as stop:
        check_program(configuration(tmp_path / "mixture.yaml", mixture=entries))
    lines = capsys.readouterr().out.splitlines()
    assert stop.value.code == 1 and all(line.startswith("problem: ") and "other" in line for line in lines)


def test_the_program_knows_cameras_by_the_roles_of_a_robot(make, tmp_path, capsys):
    robot = tmp_path / "robot.yaml"
    robot.write_text(
        "description: an arm\nsources: []\nrates: [30]\ncameras: {overview: [top]}\n"
        "state: &parts [{name: arm, dims: [a, b, c], kind: joint, unit: rad}]\naction: *parts\n"
    )
    root = make.v21(tmp_path / "arm")
    words = configuration(tmp_path / "c.yaml", root=str(root), robot=str(robot), cameras=["overview"])
    check_program(words)
    assert "cameras top;" in capsys.readouterr().out
