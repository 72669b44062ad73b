"""The average of the weights: its closed form, where it is measured, saved and continued from."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from vla_bench.config import ConfigError, load_config
from vla_bench.models.frameworks.framework import Framework
from vla_bench.training.checkpoint import list_checkpoints
from vla_bench.training.ema import averaged
from vla_bench.training.imitation import evaluate, micro_batches, train, update
from vla_bench.training.loop import read_metrics
from vla_bench.training.run import set_up

EMA = "--trainer.ema_decay 0.8 --trainer.warmup_steps 0"


@pytest.mark.parametrize(
    "options, decays", [("", [0.8] * 4), ("--trainer.ema_warmup true", [2 / 11, 3 / 12, 4 / 13, 5 / 14])]
)
def test_the_average_equals_its_closed_form(config, options, decays):
    run = set_up(config(f"{EMA} {options} --trainer.freeze_modules vlm.model.model.visual"))
    stream, named = micro_batches(run), dict(run.framework.named_parameters())
    run.model.train()
    expected = {name: p.detach().double() for name, p in named.items()}
    for decay in decays:
        update(run, [next(stream)])
        expected = {name: decay * expected[name] + (1 - decay) * p.double() for name, p in named.items()}
    assert run.ema.averages.keys() == {name for name, p in named.items() if p.requires_grad}
    for name, average in run.ema.averages.items():
        assert torch.allclose(average.double(), expected[name], rtol=0, atol=1e-6), name


def test_an_average_changes_nothing_of_the_training(config, losses):
    plain = train(config("--run_id plain --trainer.warmup_steps 0", "GR00T"))
    run = train(config(EMA, "GR00T"))
    assert losses(run) == losses(plain)
    first, second = (load_file(list_checkpoints(each)[-1] / name) for each, name in
                     ((plain, "model.safetensors"), (run, "trainer/weights.safetensors")))  # fmt: skip
    both = first.keys() & second.keys()  # of tied weights each file has one name
    assert len(both) > 40 and all(torch.equal(first[name], second[name]) for name in both)
    assert not (list_checkpoints(plain)[-1] / "trainer/weights.safetensors").exists()


def test_what_is_measured_and_served_is_the_average(config):
    run = train(config(f"{EMA} --trainer.eval_interval 6"))
    (measured,) = [
        row["eval/action_error"] for row in read_metrics(run / "metrics.jsonl") if "loss" not in row
    ]
    served, fresh = Framework.from_pretrained(run), set_up(config("--run_id fresh"))
    fresh.framework.load_state_dict(served.state_dict())
    assert evaluate(fresh)["eval/action_error"] == measured
    fresh.framework.load_state_dict(
        load_file(list_checkpoints(run)[-1] / "trainer/weights.safetensors"), strict=False
    )
    assert evaluate(fresh)["eval/action_error"] != measured


@pytest.mark.parametrize("framework", ["OFT", "GR00T"])
def test_a_continued_run_has_the_same_weights_and_the_same_average(config, framework, losses):
    run = train(config(f"{EMA} --trainer.ema_warmup true", framework))
    first, last = list_checkpoints(run)
    names = ("model.safetensors", "trainer/weights.safetensors")
    whole, seen = [load_file(last / name) for name in names], losses(run)
    shutil.rmtree(last)
    train(load_config(run, "--trainer.resume true"))
    assert losses(run) == seen
    for before, name in zip(whole, names):
        after = load_file(last / name)
        assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    raw, mean = whole[1], whole[0]
    assert any(not torch.equal(raw[n], mean[n]) for n in raw if n in mean)


def test_the_weights_come_back_bit_for_bit_after_a_measurement(config):
    run = set_up(config(EMA))
    update(run, [next(micro_batches(run))])
    raw = {name: value.clone() for name, value in run.framework.state_dict().items()}
    mean = {name: value.clone() for name, value in run.ema.averages.items()}
    with averaged(run.ema):
        inside = run.framework.state_dict()
        assert all(torch.equal(inside[name], mean[name]) for name in mean)
    assert all(torch.equal(value, raw[name]) for name, value in run.framework.state_dict().items())
    assert all(torch.equal(value, mean[name]) for name, value in run.ema.averages.items())


def test_a_run_is_continued_with_its_decay_only(config):
    run = train(config(f"{EMA} --trainer.max_train_steps 3"))
    with pytest.raises(ConfigError, match="trainer.ema_decay is 0.8 there and 0.9 here"):
        set_up(load_config(run, "--trainer.resume true --trainer.ema_decay 0.9"))


@pytest.mark.parametrize("value", ["1.0", "-0.1", "true", "slow"])
def test_what_is_no_decay_is_refused(config, value):
    with pytest.raises(ConfigError, match="trainer.ema_decay"):
        set_up(config(f"--trainer.ema_decay {value}"))
