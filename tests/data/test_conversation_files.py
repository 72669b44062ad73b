"""Files of conversations: what is read, and that every fault is one line with file, entry and field."""

import json
import os
import zlib
from pathlib import Path

import numpy as np
import pytest

from vla_bench.data.conversation_files import (
    DATASETS,
    ConversationError,
    ConversationSource,
    as_messages,
    check_entry,
    chosen_rows,
    find_source,
    image_path,
    parse_dataset_use,
    read_entries,
    register_conversations,
)

ASK, SAY = {"from": "human", "value": "Which colour?"}, {"from": "gpt", "value": "Red."}
SHOW = {"from": "human", "value": "<image>\nWhich colour?"}


def entry(*turns, **fields):
    return {"conversations": list(turns), **fields}


GOOD = {
    "one image": entry(SHOW, SAY, image="a.png"),
    "one image in a list": entry(SHOW, SAY, image=["a.png"]),
    "two images in one turn": entry(
        {"from": "human", "value": "<image><image> Same?"}, SAY, image=["a", "b"]
    ),
    "images in two rounds": entry(SHOW, SAY, SHOW, SAY, image=["a", "b"]),
    "text alone": entry(ASK, SAY),
    "no image, said so": entry(ASK, SAY, image=None),
    "an empty list of images": entry(ASK, SAY, image=[]),
    "a system text": entry({"from": "system", "value": "Be short."}, ASK, SAY),
    "the other names of the roles": entry(ASK | {"from": "user"}, SAY | {"from": "assistant"}),
    "fields of others": entry(ASK, SAY, id=7, source="somewhere"),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_sound_entry_is_accepted(name):
    check_entry(GOOD[name], "a.json entry 0")


FAULTS = {
    "no object": ([], "expected an object with 'conversations'"),
    "no conversations": ({"image": "a"}, "'conversations' is None, expected a list of turns"),
    "empty conversations": (entry(), "'conversations' is empty"),
    "conversations as a text": ({"conversations": "hello"}, "'conversations' is 'hello', expected a list"),
    "a turn that is a text": (entry(ASK, "Red."), "conversations[1] is 'Red.', expected"),
    "a turn without value": (entry(ASK, {"from": "gpt"}), "conversations[1].value is None, expected a text"),
    "a number as value": (entry(ASK, SAY | {"value": 3}), "conversations[1].value is 3, expected a text"),
    "a blank value": (entry(ASK, SAY | {"value": " \n"}), "conversations[1].value is empty"),
    "a wrong role": (
        entry(ASK, SAY | {"from": "gtp"}),
        "conversations[1].from is 'gtp'; did you mean 'gpt'?",
    ),
    "two questions": (entry(ASK, ASK, SAY), "conversations[1].from is 'human', expected 'gpt'"),
    "two answers": (entry(ASK, SAY, SAY), "conversations[2].from is 'gpt', expected 'human'"),
    "an answer first": (entry(SAY, ASK, SAY), "conversations[0].from is 'gpt', expected 'human'"),
    "a late system text": (
        entry(ASK, {"from": "system", "value": "Hm"}),
        "conversations[1].from is 'system'",
    ),
    "no answer": (entry(ASK), "'conversations' ends without an answer"),
    "a system text alone": (
        entry({"from": "system", "value": "Hm"}),
        "'conversations' ends without an answer",
    ),
    "a mark too many": (entry(SHOW, SAY), "holds 1 <image> mark, 'image' names 0 images"),
    "a mark too few": (entry(ASK, SAY, image="a"), "holds 0 <image> marks, 'image' names 1 image"),
    "a mark in an answer": (entry(ASK, SAY | {"value": "<image>"}), "conversations[1].value holds <image>"),
    "an image that is a number": (entry(SHOW, SAY, image=3), "'image' is 3, expected a path"),
    "a list with a hole": (entry(SHOW, SAY, image=["a", None]), "'image' is ['a', None], expected a path"),
    "a video": (entry(ASK, SAY, video="a.mp4"), "'video': videos are not read"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_one_line_with_file_entry_and_field(name):
    wrong, message = FAULTS[name]
    with pytest.raises(ConversationError) as error:
        check_entry(wrong, "folder/a.json entry 12")
    assert message in str(error.value)
    assert str(error.value).startswith("folder/a.json entry 12") and "\n" not in str(error.value)


def test_messages_keep_order_and_drop_the_space_around_marks():
    turn = {"from": "human", "value": " First <image>\nthen <image>. Which? "}
    content = as_messages(entry(turn, SAY, image=["a", "b"]))[0]["content"]
    assert [part.get("text", "IMAGE") for part in content] == ["First", "IMAGE", "then", "IMAGE", ". Which?"]


def test_json_and_json_lines_hold_the_same_entries(tmp_path):
    entries = [*GOOD.values(), entry(ASK, SAY | {"value": "line\u2028separator \x85 stays"})]
    (tmp_path / "a.json").write_text(json.dumps(entries), encoding="utf-8")
    lines = "\n".join(json.dumps(each, ensure_ascii=False) for each in entries)
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")  # without a line break at the end
    assert read_entries(tmp_path / "a.json") == read_entries(tmp_path / "a.jsonl") == entries


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'{"conversations": []}', "a.json holds a dict, expected a list"),
        ("a.json", b"[{]", "a.json is not JSON"),
        ("a.json", b"[]", "a.json holds no conversation"),
        ("a.json", b"[" * 200_000, "a.json is not JSON"),
        ("a.jsonl", b"\n\n", "a.jsonl holds no conversation"),
        ("a.jsonl", b"{}\n{]\n", "a.jsonl line 2 is not JSON"),
        ("a.jsonl", b'{}\n"\xff"\n', "a.jsonl line 2 is not JSON"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConversationError, match=message.replace(".", r"\.")) as error:
        read_entries(tmp_path / name)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named_with_the_nearest_one(tmp_path):
    (tmp_path / "captions.json").write_text("[1]")
    with pytest.raises(FileNotFoundError, match="captoins.json; did you mean 'captions.json'"):
        read_entries(tmp_path / "captoins.json")


def test_a_named_pipe_is_no_file_and_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(FileNotFoundError):
        read_entries(tmp_path / "a.json")


def test_a_dataset_of_the_configuration_stands_before_a_registered_one(monkeypatch, tmp_path):
    monkeypatch.setitem(DATASETS, "both", {"annotation_path": "old.json", "data_path": ""})
    here = {"both": {"annotation_path": str(tmp_path / "new.json")}}
    source = parse_dataset_use("both", here)[0]
    assert source == ConversationSource("both", tmp_path / "new.json", tmp_path)


def test_registering_twice_is_refused_unless_it_is_the_same(monkeypatch):
    monkeypatch.setitem(DATASETS, "mine", {"annotation_path": "a.json", "data_path": "b"})
    register_conversations("mine", annotation_path="a.json", data_path="b")
    with pytest.raises(ValueError, match="'mine' are registered already"):
        register_conversations("mine", annotation_path="other.json", data_path="b")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a%150", "'a%150' asks for 150%; expected 1 to 100"),
        ("a%-3", "asks for -3%"),
        ("a%", "asks for %; expected 1 to 100"),
        ("a%5.5", "asks for 5.5%"),
        ("b", "unknown dataset 'b'"),
        ("a,a%5", "names 'a' twice"),
        ("", "expected names"),
        ("odd", "nothing reads 'data_pth'; did you mean 'data_path'"),
        ("bare", "data_dict.bare is 'x.json', expected"),
    ],
)
def test_a_choice_of_datasets_that_cannot_be_meant_names_the_key(text, message):
    known = {"a": {"annotation_path": "a.json"}, "bare": "x.json"}
    known["odd"] = {"annotation_path": "a.json", "data_pth": "b"}
    with pytest.raises(ConversationError, match="^datasets.vlm_data.") as error:
        parse_dataset_use(text, known)
    assert message in str(error.value)


def test_a_part_of_a_file_is_the_same_always_and_grows_with_the_percentage(tmp_path):
    part = lambda percent, name="a": set(
        chosen_rows(ConversationSource(name, tmp_path, tmp_path, percent), 400)
    )
    assert part(25) == part(25) and len(part(25)) == 100
    assert part(25) < part(50) < part(100) == set(range(400))
    assert part(25) != part(25, "b")
    assert (np.diff(chosen_rows(ConversationSource("a", tmp_path, tmp_path, 30), 400)) > 0).all()


@pytest.mark.parametrize("name", ["../a.png", "x/../../a.png", "/etc/hostname", "", "..", "x/.."])
def test_a_path_that_leaves_the_folder_is_refused(tmp_path, name):
    with pytest.raises(ConversationError, match="here: 'image' is .*, which is not inside"):
        image_path(tmp_path / "images", name, "here: 'image'")


def test_a_folder_whose_name_begins_alike_is_another_folder(tmp_path):
    with pytest.raises(ConversationError):
        image_path(tmp_path / "images", str(tmp_path / "images2/a.png"), "here")


@pytest.mark.parametrize(
    "percent, count, wanted", [(100, 7, 7), (50, 7, 4), (50, 10, 5), (1, 7, 1), (1, 1000, 10), (33, 10, 3)]
)
def test_so_many_entries_stand_for_a_percentage(tmp_path, percent, count, wanted):
    source = ConversationSource("a name", tmp_path, tmp_path, percent)
    rows = chosen_rows(source, count)
    order = np.random.default_rng(zlib.crc32(b"a name")).permutation(count)
    assert rows.tolist() == sorted(order[:wanted].tolist())


@pytest.mark.parametrize("word, percent", [("a", 100), (" a%1 ", 1), ("a%50", 50), ("a%100", 100)])
def test_a_name_with_a_part(word, percent):
    found = find_source(word, {"a": {"annotation_path": "x/a.json", "data_path": "y"}})
    assert found == ConversationSource("a", Path("x/a.json"), Path("y"), percent)


@pytest.mark.parametrize("word", ["a%0", "a%101", "a%", "a%-1", "a%1.5", "a%x"])
def test_a_part_that_cannot_be_is_refused(word):
    with pytest.raises(
        ConversationError, match="key.dataset_use: .* asks for .*expected 1 to 100, as in a%50"
    ):
        find_source(word, {"a": {"annotation_path": "a.json"}}, "key")


def test_images_lie_beside_the_annotations_where_nothing_is_said():
    assert find_source("a", {"a": {"annotation_path": "x/a.json"}}).data_path == Path("x")


@pytest.mark.parametrize(
    "name, place", [("a.png", "a.png"), ("x/./b.png", "x/b.png"), ("x/../c.png", "c.png")]
)
def test_a_path_below_the_folder_is_found(tmp_path, name, place):
    assert image_path(tmp_path, name, "here") == tmp_path / place
