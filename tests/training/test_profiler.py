"""A recorded step: the right names for its time, all of its time, and the same training."""

import gzip
import json

import pytest
import torch
from torch.profiler import profile

from vla_bench.config import ConfigError, load_config
from vla_bench.training import imitation
from vla_bench.training.checkpoint import latest_checkpoint
from vla_bench.training.imitation import train
from vla_bench.training.profiler import (
    BETWEEN,
    PHASES,
    StepProfiler,
    part_modules,
    profile_table,
    read_spans,
    step_profiler,
)
from vla_bench.training.run import set_up

SOME = "--trainer.profile '{skip: 1, steps: 2}'"


def traces(run) -> list[str]:
    return sorted(path.name for path in (run / "profile").iterdir())


@pytest.fixture
def recorded(config, straight):
    """A run of which steps 2 and 3 were recorded."""
    return train(config(f"{SOME} --trainer.num_workers 1", straight.framework))


def test_what_is_recorded_learns_the_same_bit_for_bit(recorded, straight, losses):
    assert losses(recorded) == straight.losses
    assert traces(recorded) == ["step_000002.json.gz", "step_000003.json.gz"]
    assert not (straight.folder / "profile").exists()


def test_all_of_a_step_has_a_phase_and_every_part_a_forward_and_a_backward_pass(recorded):
    table = profile_table(recorded)
    assert list(dict.fromkeys(table.index.get_level_values("phase"))) == list(PHASES)
    lasted = []
    for name in traces(recorded):
        spans = read_spans(recorded / "profile" / name)
        step = next(span for span in spans if span.name == "step")
        lasted.append((step.end - step.begin) / 1000)
        assert min(span.own for span in spans) > -0.01
    assert table["cpu_ms"].sum() == pytest.approx(sum(lasted) / 2, rel=1e-4)
    assert table["percent"].sum() == pytest.approx(100)
    for phase in ("forward", "backward"):
        found = table.loc[phase]
        parts = set(found.index[found["calls"] > 0])
        assert any(name.startswith("action_model: ") for name in parts)
        assert {"vlm: vision encoder", "vlm: language model"} <= parts
        assert {name.partition(":")[0] for name in parts - {BETWEEN}} <= {
            "vlm",
            "action_model",
            "state_encoder",
        }


def test_the_operators_of_the_backward_pass_belong_to_the_part_of_their_forward_pass(recorded):
    table = profile_table(recorded, by=("operator", "part"))["calls"]
    forward, backward = table["aten::addmm"], table["AddmmBackward0"]
    assert len(forward) > 1 and backward.to_dict() == forward[backward.index].to_dict()


def test_a_part_that_is_computed_again_is_still_that_part(config):
    options = "--trainer.gradient_checkpointing true --trainer.gradient_accumulation_steps 2"
    run = train(config(f"{SOME} {options}"))
    table = profile_table(run, by=("operator", "phase", "part"))["calls"]
    softmax = table["aten::scaled_dot_product_attention"]
    assert softmax["backward"].to_dict() == softmax["forward"].to_dict()  # once more each
    assert BETWEEN not in softmax["backward"].index


def test_a_run_that_goes_on_records_its_own_first_steps(config, straight, losses):
    run = train(config("", straight.framework))
    latest_checkpoint(run).rename(run / "gone")
    train(load_config(run, "--trainer.resume true --trainer.profile '{skip: 0, steps: 1}'"))
    assert losses(run) == straight.losses and traces(run) == ["step_000004.json.gz"]


def test_of_two_processes_the_first_records_itself(config, launched):
    cfg = config(SOME + " --trainer.per_device_batch_size 2")

    def child():
        run = set_up(cfg)
        imitation.fit(run)
        return run.folder, run.profiler is not None

    answers = launched(child)
    assert [mine for _, mine in answers] == [True, False]
    assert traces(answers[0][0]) == ["step_000002.json.gz", "step_000003.json.gz"]
    assert {"data", "forward", "backward", "optimizer", "rest"} == set(
        profile_table(answers[0][0], by="phase").index
    )


def test_a_step_that_fails_leaves_no_trace_no_hook_and_no_profiler(config, monkeypatch):
    run = set_up(config("--trainer.profile '{skip: 0, steps: 1}'"))
    hooks = lambda: sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in run.framework.modules())
    before = hooks()

    def fails(run, batches):
        run.model(batches[0])
        raise FloatingPointError("the loss is nan")

    monkeypatch.setattr(imitation, "update", fails)
    with pytest.raises(FloatingPointError):
        imitation.fit(run)
    assert hooks() == before and not (run.folder / "profile").exists()
    with profile() as another:  # there is never more than one
        torch.ones(2).sum()
    assert any(event.key == "aten::sum" for event in another.key_averages())


def test_hooks_are_on_parts_and_blocks_and_on_nothing_within_a_block(config):
    framework = set_up(config()).framework
    found = part_modules(framework)
    assert set(found.values()) >= {"vlm: vision encoder", "vlm: language model"}
    blocks = [path for path in found if path.endswith(("layers.0", "blocks.0"))]
    assert len(blocks) >= 2  # of the vision encoder and of the language model
    assert not any(path.startswith(f"{block}.") for path in found for block in blocks)


@pytest.mark.parametrize(
    "section, said",
    [
        (3, "trainer.profile must be a section of skip, steps"),
        ({"step": 3}, "did you mean 'steps'"),
        ({"skip": -1}, "trainer.profile.skip must be"),
        ({"steps": 0}, "trainer.profile.steps must be"),
        ({"steps": 1.5}, "trainer.profile.steps must be"),
    ],
)
def test_a_section_that_cannot_be_meant_is_refused(section, said):
    with pytest.raises(ConfigError, match=said):
        step_profiler(section)


def test_without_a_section_nothing_is_recorded_and_an_empty_one_means_three_steps():
    assert step_profiler(None) is None
    profiler = step_profiler({})
    assert [n for n in range(1, 12) if profiler.begins()] == [4, 5, 6]
    assert vars(StepProfiler()) == {"skip": 3, "steps": 3, "seen": 0}


@pytest.mark.parametrize(
    "content",
    [b"", b"text", gzip.compress(b"{"), gzip.compress(json.dumps({"traceEvents": []}).encode())],
    ids=["empty", "plain", "cut", "without a step"],
)
def test_a_damaged_trace_is_named(tmp_path, content):
    path = tmp_path / "step_000001.json.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="step_000001.json.gz is no trace of a step"):
        profile_table(path)


def test_a_run_that_recorded_nothing_says_how(straight):
    with pytest.raises(FileNotFoundError, match="--trainer.profile '{steps: 3}'"):
        profile_table(straight.folder)
