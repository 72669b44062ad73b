"""Conversations as samples: images, the configuration's section, the sampler, and the program."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from vla_bench.config import ConfigError, load_config
from vla_bench.data.conversation_files import ConversationError, ConversationSource, parse_dataset_use
from vla_bench.data.conversations import (
    ConversationDataset,
    ConversationSettings,
    conversation_problems,
    fit_pixels,
    made_up_conversations,
    main,
    open_conversations,
    plain_text,
    read_image,
    summary,
)
from vla_bench.models.backbones.tiny import write_tiny
from vla_bench.training.loop import BatchSampler, make_loader

SIZES = [(32, 24), (16, 16), (40, 8)]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("conversations")
    (home / "images").mkdir()
    for number, size in enumerate(SIZES):
        pixels = np.random.default_rng(number).integers(0, 255, (*size[::-1], 3), np.uint8)
        Image.fromarray(pixels).save(home / f"images/{number}.png")
    turns = lambda *texts: [{"from": ("human", "gpt")[i % 2], "value": t} for i, t in enumerate(texts)]
    entries = [
        {"image": "0.png", "conversations": turns("<image>\nWhat is it?", "A carpet.", "Sure?", "Yes.")},
        {"image": ["2.png", "1.png"], "conversations": turns("<image> or <image>?", "The first.")},
        {"conversations": turns("What comes after two?", "Three.")},
    ]
    (home / "carpets.json").write_text(json.dumps(entries))
    (home / "many.jsonl").write_text("\n".join(json.dumps(entries[2]) for _ in range(40)))
    (home / "bad.json").write_text(json.dumps([entries[0] | {"image": "9.png"}, {"conversations": []}]))
    data_dict = {
        "carpets": {"annotation_path": str(home / "carpets.json"), "data_path": str(home / "images")}
    }
    data_dict["many"] = {"annotation_path": str(home / "many.jsonl")}
    data_dict["bad"] = {"annotation_path": str(home / "bad.json"), "data_path": str(home / "images")}
    section = {"dataset_py": "vlm_datasets", "dataformat": "llava_json", "dataset_use": "carpets,many%50"}
    config = {"datasets": {"vlm_data": section | {"data_dict": data_dict}}}
    (home / "train.yaml").write_text(json.dumps(config))
    return home


@pytest.fixture
def settings(home):
    return load_config(home / "train.yaml").section("datasets.vlm_data").into(ConversationSettings)


def test_a_configuration_as_the_seeds_write_it_opens_its_datasets(settings):
    dataset = open_conversations(settings)
    assert len(dataset) == 3 + 20
    assert [source.name for source in dataset.sources] == ["carpets", "many"]
    assert dataset[2]["image"] == [] and dataset[3]["dataset"] == "many"


def test_images_come_in_the_order_of_the_marks(settings):
    sample = open_conversations(settings)[1]
    assert [image.size for image in sample["image"]] == [SIZES[2], SIZES[1]]
    assert sum(part["type"] == "image" for part in sample["messages"][0]["content"]) == 2


def test_pixels_are_those_of_the_file(settings, home):
    image = open_conversations(settings)[0]["image"][0]
    np.testing.assert_array_equal(np.asarray(image), np.asarray(Image.open(home / "images/0.png")))


def test_max_pixels_bounds_every_image(settings):
    settings.max_pixels = 200
    images = [image for i in range(3) for image in open_conversations(settings)[i]["image"]]
    assert [image.width * image.height <= 200 for image in images] == [True] * 3


@pytest.mark.parametrize(
    ("mode", "pixel", "expected"),
    [("L", 77, (77, 77, 77)), ("1", 255, (255, 255, 255)), ("RGBA", (200, 0, 0, 0), (255, 255, 255))],
)
def test_other_colours_become_rgb(tmp_path, mode, pixel, expected):
    Image.new(mode, (3, 3), pixel).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", "here").getpixel((1, 1)) == expected


@pytest.mark.parametrize("mode", ["I;16", "F", "I"])
def test_an_image_that_is_not_made_of_colours_is_refused(tmp_path, mode):
    Image.new(mode, (3, 3)).save(tmp_path / "a.tiff")
    with pytest.raises(ConversationError, match="here: .*has mode"):
        read_image(tmp_path / "a.tiff", "here")


@pytest.mark.parametrize(
    "damage", [lambda b: b"", lambda b: b[:70], lambda b: b"\x00" * 99, lambda b: b[:-40]]
)
def test_an_image_that_does_not_decode_is_named(tmp_path, home, damage):
    (tmp_path / "a.png").write_bytes(damage((home / "images/0.png").read_bytes()))
    with pytest.raises(ConversationError, match="b.json entry 3: 'image': .*cannot be decoded") as error:
        read_image(tmp_path / "a.png", "b.json entry 3: 'image'")
    assert "\n" not in str(error.value)


def test_opening_names_the_first_faulty_entry(home):
    with pytest.raises(ConversationError, match=r"bad\.json entry 1: 'conversations' is empty"):
        ConversationDataset([ConversationSource("bad", home / "bad.json", home)])


def test_every_problem_is_listed(home, settings):
    found = conversation_problems(parse_dataset_use("bad", settings.data_dict)[0])
    assert ["entry 0: 'image': there is no image" in found[0], "entry 1: 'conversations'" in found[1]] == [
        True
    ] * 2


def test_the_images_of_some_entries_only_are_decoded(home, settings):
    assert len(conversation_problems(parse_dataset_use("bad", settings.data_dict)[0], images=0)) == 1


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("dataset_py", "lerobot", "dataset_py must be 'vlm_datasets'"),
        ("over_long", "truncate", "over_long must be 'drop' or 'refuse'"),
        ("model_max_length", 0, "model_max_length must be at least 1"),
        ("max_pixels", 1.5, "max_pixels"),
        ("model_max_lenght", 9, "did you mean 'datasets.vlm_data.model_max_length'"),
    ],
)
def test_a_setting_that_cannot_be_meant_names_its_key(key, value, message):
    config = load_config({"datasets": {"vlm_data": {"dataset_use": "a", key: value}}})
    with pytest.raises(ConfigError, match=message):
        config.section("datasets.vlm_data").into(ConversationSettings)


def rows_of(dataset, batches, workers):
    """Which conversations a loader gives, by worker processes or without."""
    keys = [[row for _, row in batch] for batch in batches]
    return [batch for batch in make_loader(dataset, keys, prepare=_origins, num_workers=workers)]


def _origins(samples):
    return [sample["origin"] for sample in samples]


def test_conversations_are_drawn_by_the_sampler_of_robot_data(settings):
    """Sample g is a function of seed and g: the same at any number of processes, and after a restart."""
    dataset = open_conversations(settings)
    alone = BatchSampler(len(dataset), seed=3, batch_size=4, stop=12)
    two = [BatchSampler(len(dataset), 3, batch_size=2, rank=r, processes=2) for r in range(2)]
    for number in range(12):
        assert alone.batch(number) == two[0].batch(number) + two[1].batch(number)
    whole, resumed = rows_of(dataset, alone, 0), BatchSampler(len(dataset), 3, 4, first=7, stop=12)
    assert rows_of(dataset, resumed, 0) == whole[7:]
    assert rows_of(dataset, alone, 2) == whole
    first, second = ([key[1] for b in range(6 * e, 6 * e + 6) for key in alone.batch(b)][:23] for e in (0, 1))
    assert sorted(first) == list(range(23)) and first != second


def run(capsys, *words):
    """Exit status and the lines of a run of the program."""
    try:
        main(words)
        status = 0
    except SystemExit as end:
        status = end.code
    printed = capsys.readouterr()
    return status, (printed.out + printed.err).splitlines()


def test_the_program_checks_and_prints_a_sample(capsys, home):
    status, lines = run(capsys, "--config_yaml", str(home / "train.yaml"), "--sample", "1")
    assert status == 0
    assert lines[0] == "carpets: 3 conversations, 4 rounds, 3 images, 1 about text alone"
    assert lines[1] == "many: 20 conversations (50% of the file), 20 rounds, 0 images, 20 about text alone"
    assert lines[3:5] == ["  user      <image> or <image> ?", "  assistant The first."]


def test_the_program_shows_what_a_backbone_is_trained_on(capsys, home, tmp_path):
    path = write_tiny("qwen3_vl", tmp_path / "vlm", image_size=64, hidden_size=32, num_layers=1)
    words = ("--config_yaml", str(home / "train.yaml"), "--framework.vlm.base_vlm", str(path))
    status, lines = run(capsys, *words)
    assert status == 0
    assert {"⟦A carpet.<|im_end|>⟧", "⟦Yes.<|im_end|>⟧"} <= set(lines)


def test_the_program_lists_problems_and_exits_with_1(capsys, home):
    words = ("--config_yaml", str(home / "train.yaml"), "--datasets.vlm_data.dataset_use", "bad")
    status, lines = run(capsys, *words)
    assert status == 1 and len(lines) == 2 and all(line.startswith("problem: ") for line in lines)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--datasets.vlm_data.dataset_use", "carpet"), "unknown dataset 'carpet'; did you mean 'carpets'"),
        (("--datasets.vlm_data.dataset_use", "many%150"), "asks for 150%"),
        (("--sample", "99"), "--sample is 99; there are 23"),
        (("--framework.vlm.base_vlm", "nowhere/at/all"), "nowhere/at/all"),
    ],
)
def test_the_program_says_in_one_line_what_cannot_be_meant(capsys, home, words, message):
    status, lines = run(capsys, "--config_yaml", str(home / "train.yaml"), *words)
    errors = [line for line in lines if line.startswith("error: ")]
    assert status == 2 and len(errors) == 1 and message in errors[0]


def test_a_dataset_of_conversations_can_be_given_to_worker_processes(settings):
    dataset = open_conversations(settings)
    loader = torch.utils.data.DataLoader(dataset, batch_size=2, num_workers=1, collate_fn=_origins)
    assert sum(map(len, loader)) == 23


ODD = [
    None,
    True,
    0,
    -1,
    1.5,
    "",
    " ",
    "<image>",
    "gtp",
    "../../x.png",
    [],
    {},
    [None],
    {"a": 1},
    "x" * 300,
    "\ud800",
]


def damaged(rng, entry):
    """An entry with one value, key or element changed somewhere."""
    entry = json.loads(json.dumps(entry))
    places = [(entry, key) for key in entry]
    for turn in entry["conversations"]:
        places += [(turn, key) for key in turn]
    places += [(entry["conversations"], place) for place in range(len(entry["conversations"]))]
    holder, key = places[rng.integers(len(places))]
    what = rng.integers(3)
    if what == 0:
        holder[key] = ODD[rng.integers(len(ODD))]
    elif what == 1:
        del holder[key]
    elif isinstance(holder, list):
        holder.insert(key, holder[key])
    else:
        holder["from" if rng.random() < 0.5 else "image"] = holder[key]
    return entry


@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_entry_is_read_or_named_in_one_line(home, tmp_path, seed):
    """A hundred damages each: nothing but one line that names the entry, and never another error."""
    rng, refused = np.random.default_rng(seed), 0
    entries = json.loads((home / "carpets.json").read_text())
    for _ in range(100):
        (tmp_path / "a.json").write_text(json.dumps([damaged(rng, entries[rng.integers(len(entries))])]))
        source = ConversationSource("a", tmp_path / "a.json", home / "images")
        problems = conversation_problems(source)
        try:
            dataset = ConversationDataset([source])
            assert [len(dataset[0]["messages"]) > 0, len(dataset)] == [True, 1]
            assert problems == []
        except ConversationError as error:
            refused += 1
            assert problems == [str(error)]
            assert "a.json entry 0" in str(error) and "\n" not in str(error)
    assert 30 < refused < 100


SIDES = [
    ((40, 30), None, None, (40, 30)),
    ((40, 30), 1200, 1200, (40, 30)),
    ((40, 30), None, 300, (20, 15)),
    ((40, 30), 4800, None, (80, 60)),
    ((40, 30), 4800, 100_000, (80, 60)),
    ((40, 30), 100, 300, (20, 15)),
    ((10, 1000), None, 100, (1, 100)),
    ((1000, 1), None, 10, (100, 1)),  # a side has one pixel at least, so this one stays above
    ((33, 17), 600, None, (35, 18)),  # rounded so that the bound is kept
    ((33, 17), None, 500, (31, 16)),
]


@pytest.mark.parametrize("size, least, most, expected", SIDES)
def test_images_are_fitted_between_the_bounds(size, least, most, expected):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8))
    found = fit_pixels(image, least, most)
    assert found.size == expected
    if size == expected:
        assert found is image
    else:
        assert np.array_equal(np.asarray(found), np.asarray(image.resize(expected, Image.Resampling.BICUBIC)))
        assert (least or 0) <= found.width * found.height and (
            not most or min(expected) == 1 or found.width * found.height <= most
        )


def test_a_summary_counts_conversations_rounds_and_images(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    ask, say = {"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}
    show = {"from": "human", "value": "<image> x"}
    entries = [
        {"conversations": [ask, say] * 3},
        {"conversations": [show, say, show, say], "image": ["a.png"] * 2},
    ]
    entries += [{"conversations": [{"from": "system", "value": "s"}, ask, say]}] * 2
    (tmp_path / "c.json").write_text(json.dumps(entries))
    sources = [
        ConversationSource(name, tmp_path / "c.json", tmp_path, part)
        for name, part in (("all", 100), ("half", 50))
    ]
    dataset = ConversationDataset(sources)
    assert list(summary(dataset))[0] == "all: 4 conversations, 7 rounds, 2 images, 3 about text alone"
    assert list(summary(dataset))[1].startswith("half: 2 conversations (50% of the file), ")
    sample = dataset[1]
    assert list(plain_text(sample)) == ["  user      <image> x", "  assistant y"] * 2
    assert (sample["dataset"], sample["origin"]) == ("all", f"{tmp_path / 'c.json'} entry 1")
    for row in (-1, 6):
        with pytest.raises(IndexError, match=f"conversation {row} is outside 0..5"):
            dataset[row]


def test_bounds_and_held_out_conversations_reach_the_dataset(tmp_path):
    config = made_up_conversations(tmp_path)["datasets"]["vlm_data"]
    plain = ConversationSettings(**config, min_pixels=64 * 64, max_pixels=64 * 64)
    assert [image.size for image in open_conversations(plain)[0]["image"]] == [(64, 64)]
    with pytest.raises(ConfigError, match="datasets.vlm_data.eval_dataset is not set"):
        open_conversations(plain, held_out=True)
    held = ConversationSettings(**config | {"eval_dataset": "made_up%50"})
    assert (len(open_conversations(held)), len(open_conversations(held, held_out=True))) == (2, 1)


def test_the_settings_of_conversations_are_checked_each_alone():
    plain = {"dataset_use": "a"}
    for key, bad in (
        ("model_max_length", 0), ("per_device_batch_size", 0), ("min_pixels", 0), ("max_pixels", 0), ("over_long", "cut"),
        ("dataset_py", "other"), ("dataformat", "other"), ("min_pixels", 1.5),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=f"datasets.vlm_data.{key} must be"):
            ConversationSettings(**plain, **{key: bad})
    for good in (
        {"min_pixels": 5, "max_pixels": 5},
        {"over_long": "refuse"},
        {"model_max_length": 1},
        {"max_pixels": 1},
    ):
        assert vars(ConversationSettings(**plain, **good)).items() >= good.items()
    with pytest.raises(
        ConfigError, match="max_pixels must be at least datasets.vlm_data.min_pixels, which is 6"
    ):
        ConversationSettings(**plain, min_pixels=6, max_pixels=5)


def test_images_of_evenly_spread_entries_are_decoded(tmp_path, monkeypatch):
    place = made_up_conversations(tmp_path)["datasets"]["vlm_data"]["data_dict"]["made_up"]
    file = tmp_path / "made_up.json"
    entries = json.loads(file.read_text())
    file.write_text(json.dumps([{**entries[i % 2], "image": f"{i}.png"} for i in range(9)]))
    source = ConversationSource("made_up", file, tmp_path, 100)
    assert place["annotation_path"] == str(file)
    for images, decoded in ((3, [0, 4, 8]), (1, [0]), (0, []), (100, list(range(9)))):
        lines = conversation_problems(source, images)
        assert [int(line.split("entry ")[1].split(":")[0]) for line in lines] == decoded
