"""A run goes on with another number of processes, or is refused with the numbers that would fit."""

import json

import pytest
import torch

from vla_bench.config import ConfigError, load_config
from vla_bench.training.checkpoint import latest_checkpoint, load_progress
from vla_bench.training.imitation import train
from vla_bench.training.resume import Split, check_samples, fresh_generators, samples_per_step, splits
from vla_bench.training.run import check_continuation, progress, save, set_up


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 5, 7, 12, 13])
@pytest.mark.parametrize("samples", [1, 6, 12, 24])
def test_every_way_to_share_a_global_batch_is_found_once(samples, processes):
    found = splits(samples, processes)
    expected = {
        (batch, accumulation)
        for batch in range(1, samples + 1)
        for accumulation in range(1, samples + 1)
        if batch * accumulation * processes == samples
    }
    assert [split.samples for split in found] == [samples] * len(expected)
    assert {(split.batch_size, split.accumulation) for split in found} == expected
    assert [split.batch_size for split in found] == sorted((b for b, _ in expected), reverse=True)


@pytest.fixture
def begun(config):
    """A run of one process with a checkpoint at step 2: four samples a step."""
    return train(config("--trainer.max_train_steps 6 --trainer.save_interval 2"))


def cut(run, step):
    """The run as if it had been killed after a step."""
    for checkpoint in (run / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step_")) > step:
            checkpoint.rename(run / f"gone_{checkpoint.name}")


def test_accumulation_and_batch_may_change_places(begun, losses):
    whole = losses(begun)
    cut(begun, 2)
    options = (
        "--trainer.resume true --trainer.per_device_batch_size 2 --trainer.gradient_accumulation_steps 2"
    )
    found = losses(train(load_config(begun, options)))
    assert [step for step, _, _ in found] == [1, 2, 3, 4, 5, 6] and found[:2] == whole[:2]
    for ours, theirs in zip(found, whole):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_another_global_batch_is_refused_before_the_model_is_loaded(begun, monkeypatch):
    cut(begun, 2)
    monkeypatch.setattr("vla_bench.training.run.load_framework", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(ConfigError) as error:
        set_up(load_config(begun, "--trainer.resume true --trainer.gradient_accumulation_steps 2"))
    assert "4 samples of 'vla' a step there, 8 here" in str(error.value)
    fitting = "set trainer.per_device_batch_size to 4 and trainer.gradient_accumulation_steps to 1"
    assert str(error.value).endswith(fitting)


def test_the_way_that_is_named_is_taken(begun):
    cut(begun, 2)
    options = "--trainer.resume true --trainer.per_device_batch_size 3"
    with pytest.raises(ConfigError) as error:
        set_up(load_config(begun, options))
    words = str(error.value).split()
    batch, accumulation = words[words.index("trainer.per_device_batch_size") + 2], words[-1]
    assert (batch, accumulation) == ("2", "2")
    named = f"--trainer.per_device_batch_size {batch} --trainer.gradient_accumulation_steps {accumulation}"
    assert set_up(load_config(begun, f"--trainer.resume true {named}")).step == 2


def test_a_checkpoint_of_other_processes_is_continued_with_fresh_noise_and_says_so(config, capsys):
    """The checkpoint of two processes, made by hand; the real ones are in `test_kills.py`."""
    run = set_up(config())
    run.step = 3
    save(run)
    checkpoint = latest_checkpoint(run.folder)
    (checkpoint / "manifest.json").unlink()
    path = checkpoint / "trainer/progress.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "processes": 2}))
    capsys.readouterr()
    drawn = []
    for _ in range(2):
        again = set_up(load_config(run.folder, "--trainer.resume true"))
        drawn.append(torch.rand(1).item())
        line = "step_000003: 2 as number of processes there, 1 here; the samples and their order are the same"
        assert capsys.readouterr().err.count(line) == 1
    fresh_generators(run.seed, 3, 0)
    assert drawn == [torch.rand(1).item()] * 2 and progress(again)["processes"] == 1


def test_a_source_that_the_checkpoint_does_not_know_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="nothing from the source 'vlm'"):
        check_samples(tmp_path, {"vla": 4}, {"vla": 4, "vlm": 4}, Split(1, 4, 1))


@pytest.mark.parametrize("world", [2, 3])
def test_the_number_of_processes_is_the_launchers(begun, monkeypatch, world):
    """What is compared before a group of processes exists; a launcher of two or three, of which this is the first."""
    cut(begun, 2)
    monkeypatch.setenv("WORLD_SIZE", str(world))
    checkpoint = latest_checkpoint(begun)
    saved = load_progress(checkpoint)
    fits = load_config(begun, "--trainer.per_device_batch_size 2")
    if world == 2:
        assert check_continuation(fits, checkpoint, saved) is None
    with pytest.raises(ConfigError, match="share 4" if world == 3 else "batch_size to 2 and .* to 1"):
        check_continuation(load_config(begun), checkpoint, saved)


OLD = {"step": 3, "position": 24, "processes": 1, "config": {"trainer": {"per_device_batch_size": 2}}}


@pytest.mark.parametrize(
    "change, expected",
    [
        ({}, {"vla": 8}),
        ({"config": None}, {"vla": 8}),
        ({"others": {"vlm": {"rows": 5, "batch_size": 3}}}, {"vla": 8, "vlm": 12}),
        ({"others": {"vlm": {"rows": 5, "batch_size": 3}}, "config": {}}, {"vla": 8, "vlm": 3}),
        ({"samples_per_step": {"vlm": 3}}, {"vlm": 3}),
    ],
)
def test_the_global_batch_of_an_older_checkpoint_follows_from_its_numbers(tmp_path, change, expected):
    assert samples_per_step({**OLD, **change}, tmp_path / "progress.json") == expected


@pytest.mark.parametrize(
    "change",
    [
        {"step": 0},
        {"position": "24"},
        {"processes": None},
        {"others": {"vlm": {}}},
        {"config": {"trainer": {"per_device_batch_size": 0}}, "others": {"vlm": {"batch_size": 1}}},
        {"samples_per_step": 8},
        {"samples_per_step": {"vla": None}},
    ],
)
def test_a_damaged_place_is_named(tmp_path, change):
    with pytest.raises(ValueError, match="progress.json"):
        samples_per_step({**OLD, **change}, tmp_path / "progress.json")
