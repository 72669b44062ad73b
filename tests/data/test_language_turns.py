"""Language columns of a LeRobot dataset as conversations: which answer at which frame, its images, its labels."""

import json
import pickle

import numpy as np
import pytest

from vla_bench.config import load_config
from vla_bench.data.conversation_files import ConversationError, LanguageTurns
from vla_bench.data.conversations import ConversationSettings, main, open_conversations
from vla_bench.data.language_turns import LanguageEntries
from vla_bench.data.lerobot import validate
from vla_bench.models.backbones.chat import ConversationPrepare, load_prepare
from vla_bench.models.backbones.tiny import write_tiny

LENGTHS = (6, 5)
SUBTASKS = {0: "reach", 2: "grasp", 5: "lift"}  # frame at which it begins, in both episodes
TEXT = {"dtype": "language", "shape": [1], "names": None}


def turn(text, style="subtask", frame=None, role="assistant", camera=None):
    said = {"role": role, "content": text, "style": style, "camera": camera}
    return said | ({} if frame is None else {"timestamp": float(np.float32(frame / 30))})


def persistent(row):
    return [turn(text, frame=frame) for frame, text in SUBTASKS.items() if frame < LENGTHS[row >= LENGTHS[0]]]


def events(row):
    return [turn("Is it held?", "vqa", role="user"), turn(f"No, {row}.", "vqa")] if row % 4 == 3 else []


@pytest.fixture(scope="module")
def robot(make, tmp_path_factory):
    columns = {"language_persistent": persistent, "language_events": events}
    features = make.PLAIN | {name: TEXT for name in columns}
    extra = {"action": make.counting(3), "observation.state": make.counting(3), **columns}
    told = {"codebase_version": "v3.1"}
    return make.v30(tmp_path_factory.mktemp("robot") / "arm", features=features, extra=extra, info=told)


def test_every_frame_has_the_subtask_that_lerobot_says_is_active(robot):
    """The last one that began by then: LeRobot's `active_at`."""
    found = {
        (p.episode, p.frame): p.answer for p in LanguageEntries(LanguageTurns(robot, ("subtask",))).places
    }
    expected = {
        (episode, frame): SUBTASKS[max(begin for begin in SUBTASKS if begin <= frame)]
        for episode, length in enumerate(LENGTHS)
        for frame in range(length)
    }
    assert found == expected


def test_the_images_are_those_of_the_frame(robot, make):
    entries = LanguageEntries(LanguageTurns(robot))
    for row, place in enumerate(entries.places):
        images = list(entries.images(row))
        number = sum(LENGTHS[: place.episode]) + place.frame
        assert [make.level_of(image) for image in images] == [number % 16]


def test_events_are_asked_and_answered_at_their_own_frame(robot):
    places = LanguageEntries(LanguageTurns(robot, ("vqa",), stride=100)).places
    assert [(p.episode, p.frame, p.question, p.answer) for p in places] == [
        (0, 3, "Is it held?", "No, 3."),
        (1, 1, "Is it held?", "No, 7."),
    ]


def test_a_part_is_the_same_in_every_run(robot):
    data = {"arm": {"lerobot": str(robot)}}
    first, second = (open_conversations(ConversationSettings("arm%30", data)) for _ in range(2))
    origins = [sample["origin"] for sample in first]
    assert origins == [sample["origin"] for sample in second]
    assert len(origins) == round(0.3 * (sum(LENGTHS) + 2))


def test_a_copy_in_another_process_gives_the_same(robot):
    dataset = open_conversations(ConversationSettings("arm", {"arm": {"lerobot": str(robot)}}))
    copied = pickle.loads(pickle.dumps(dataset))
    for row in (0, 7):
        assert copied[row]["messages"] == dataset[row]["messages"]
        assert np.array_equal(np.asarray(copied[row]["image"][0]), np.asarray(dataset[row]["image"][0]))


def test_the_labels_are_on_the_answer_alone(robot, tmp_path):
    path = write_tiny("qwen3_vl", tmp_path / "vlm", image_size=64, hidden_size=32, num_layers=1)
    prepare = load_prepare(path)
    settings = ConversationSettings("arm", {"arm": {"lerobot": str(robot), "styles": ["subtask"]}})
    batch = ConversationPrepare(prepare)([open_conversations(settings)[3]])
    decode = prepare.processor.tokenizer.decode
    trained = decode([token for token in batch["labels"][0].tolist() if token != -100])
    assert trained == "grasp<|im_end|>"
    assert "do it\nWhat is the subtask now?" in decode(batch["inputs"]["input_ids"][0])


def test_the_program_checks_and_prints_one(robot, tmp_path, capsys):
    section = {"dataset_use": "arm", "data_dict": {"arm": {"lerobot": str(robot), "styles": ["subtask"]}}}
    (tmp_path / "c.yaml").write_text(json.dumps({"datasets": {"vlm_data": section}}))
    main(["--config_yaml", str(tmp_path / "c.yaml"), "--sample", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "arm: 11 conversations, 11 rounds, 11 images, 0 about text alone"
    assert "episode 0 frame 2 (subtask), images: 64 x 48" in lines[1]
    assert lines[2].startswith("  user      <image> do it") and lines[-2] == "  assistant grasp"


def test_a_dataset_in_which_nothing_is_said_is_refused(make, tmp_path):
    make.v21(tmp_path / "arm")
    settings = load_config(
        {
            "datasets": {
                "vlm_data": {"dataset_use": "arm", "data_dict": {"arm": {"lerobot": str(tmp_path / "arm")}}}
            }
        }
    )
    with pytest.raises(ConversationError, match="arm holds no conversation"):
        open_conversations(settings.section("datasets.vlm_data").into(ConversationSettings))


def test_turns_that_are_none_are_found_by_validate(make, tmp_path):
    features = make.PLAIN | {"language_events": TEXT}
    extra = {"action": make.counting(3), "observation.state": make.counting(3)}
    extra["language_events"] = lambda row: [{"role": "user", "content": row}] if row == 8 else []
    make.v30(tmp_path / "arm", features=features, extra=extra, info={"codebase_version": "v3.1"})
    lines = validate(tmp_path / "arm")
    assert len(lines) == 1 and "episode 1, column 'language_events': [2][0].content is 8" in lines[0]


def test_subtasks_by_number_are_read_in_both_versions(make, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    features = make.PLAIN | {"subtask_index": {"dtype": "int64", "shape": [1], "names": None}}
    extra = {"action": make.counting(3), "observation.state": make.counting(3)}
    extra["subtask_index"] = lambda row: row % 2
    for write in (make.v21, make.v30):
        root = write(tmp_path / write.__name__, features=features, extra=extra)
        pq.write_table(
            pa.table({"subtask_index": [1, 0], "subtask": ["odd", "even"]}), root / "meta/subtasks.parquet"
        )
        entries = LanguageEntries(LanguageTurns(root))
        assert [place.answer for place in entries.places] == ["even", "odd"] * 5 + ["even"]
        assert validate(root) == []
