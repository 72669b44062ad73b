"""Runs of several heads: each learns what it learns alone, is served by its name, kept alone, or replaced by a new one."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vla_bench.config import load_config
from vla_bench.files import list_checkpoints
from vla_bench.models.frameworks.framework import Framework
from vla_bench.models.heads import flow_matching
from vla_bench.serving.policy import Policy
from vla_bench.training.export import keep_head
from vla_bench.training.imitation import train
from vla_bench.training.loop import read_metrics
from vla_bench.training.run import set_up

HEADS = {
    "oft": {"type": "MLP", "hidden_size": 32, "num_queries": 2},
    "gr00t": {"type": "FlowMatching", "hidden_size": 32, "num_layers": 1, "num_heads": 2},
}
SOLO = {"oft": "OFT", "gr00t": "GR00T"}


@pytest.fixture
def heads(config):
    """`heads(overrides, weights)`: both heads on the toy data; `heads.alone(name)` one of them."""

    def made(overrides="", weights=None, only=None):
        tree = config("").to_dict()
        several = {name: {**head, "weight": (weights or {}).get(name, 1.0)} for name, head in HEADS.items()}
        tree["framework"] |= {"name": "GR00T", "action_model": several}
        if only:
            tree["framework"] |= {"name": SOLO[only], "action_model": HEADS[only]}
        return load_config(tree, overrides)

    return made


def logged(run, *names):
    return [[row[name] for name in names] for row in read_metrics(run / "metrics.jsonl") if "loss" in row]


@pytest.mark.parametrize("name", HEADS)
def test_with_the_others_weight_zero_a_run_is_that_of_the_head_alone(heads, name, tmp_path):
    """Losses, gradients and weights to 1e-6: the gradient's norm is summed in another order."""
    alone = train(heads(f"--run_id alone --framework.name {SOLO[name]}", only=name))
    weights = {other: float(other == name) for other in HEADS}
    several = train(heads("--run_id several", weights))
    for ours, theirs in zip(
        logged(several, "loss", "grad_norm"), logged(alone, "loss", "grad_norm"), strict=True
    ):
        assert ours == pytest.approx(theirs, rel=1e-6)
    kept = keep_head(several, tmp_path / "kept", name)
    ours, theirs = (load_file(list_checkpoints(run)[-1] / "model.safetensors") for run in (kept, alone))
    assert ours.keys() == theirs.keys()
    for key, weight in theirs.items():
        torch.testing.assert_close(ours[key], weight, atol=1e-6, rtol=1e-6)


def test_each_loss_is_logged_by_the_name_of_its_head(heads):
    run = train(heads("", {"oft": 0.5, "gr00t": 2.0}))
    for loss, oft, gr00t in logged(run, "loss", "oft/action_loss", "gr00t/action_loss"):
        assert loss == pytest.approx(0.5 * oft + 2.0 * gr00t, rel=1e-5)


MODES = {"ddp": {}, "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}}


@pytest.mark.parametrize("mode", MODES)
def test_two_processes_learn_like_one(heads, launched, mode, monkeypatch):
    """The noise and the times are made of the actions, so that a sample has the same ones in any process."""

    def of_the_actions(actions, *_):
        return torch.sin(50 * actions * torch.arange(1, 4)), torch.sigmoid(3 * actions.mean((1, 2)))

    monkeypatch.setattr(flow_matching, "noise_and_time", of_the_actions)
    sized = "--run_id {} --trainer.per_device_batch_size {} --framework.action_model.gr00t.dropout 0"
    alone, cfg = train(heads(sized.format("alone", 4))), heads(sized.format("pair", 2))
    pair, *_ = launched(lambda: train(cfg), 2, MODES[mode])
    names = ("loss", "oft/action_loss", "gr00t/action_loss")
    ours, theirs = logged(pair, *names), logged(alone, *names)
    for mine, others in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(others, abs=1e-5)
    assert theirs[0] != pytest.approx(theirs[-1], abs=1e-2)


def test_a_continued_run_is_the_uninterrupted_one(heads):
    straight, stopped = (train(heads(f"--run_id {name}")) for name in ("straight", "stopped"))
    list_checkpoints(stopped)[-1].rename(stopped / "put_away")
    train(load_config(stopped, "--trainer.resume true"))
    names = ("loss", "grad_norm", "oft/action_loss", "gr00t/action_loss")
    assert logged(stopped, *names) == logged(straight, *names)
    ours, theirs = (load_file(list_checkpoints(run)[-1] / "model.safetensors") for run in (stopped, straight))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_head_is_served_by_its_name_and_kept_alone(heads, observation, tmp_path):
    run, found = train(heads()), {}
    for name in HEADS:
        served = Policy.from_pretrained(run, head=name)
        kept = Policy.from_pretrained(keep_head(run, tmp_path / name, name))
        found[name] = served.predict(observation(), seed=3)
        np.testing.assert_array_equal(kept.predict(observation(), seed=3), found[name])
        assert type(kept.framework).__name__ == SOLO[name] and served.fingerprint != kept.fingerprint
    np.testing.assert_array_equal(Policy.from_pretrained(run).predict(observation(), seed=3), found["oft"])
    assert np.abs(found["oft"] - found["gr00t"]).max() > 1e-3
    with pytest.raises(ValueError, match="no head 'groot'; did you mean 'gr00t'"):
        Policy.from_pretrained(run, head="groot")


def test_the_kept_run_trains_on(heads, tmp_path):
    kept = keep_head(train(heads()), tmp_path / "kept", "gr00t")
    options = f"--run_id next --trainer.pretrained_checkpoint {kept}"
    run = set_up(heads(options, only="gr00t"))
    theirs = Framework.from_pretrained(kept)
    assert all(torch.equal(run.framework.state_dict()[k], v) for k, v in theirs.state_dict().items())


def test_a_new_head_begins_on_the_backbone_of_others(heads, config):
    run = train(heads())
    options = f"--run_id new --trainer.pretrained_checkpoint {run} --trainer.reload_modules vlm"
    added = set_up(config(options, "GR00T"))
    theirs = load_file(list_checkpoints(run)[-1] / "model.safetensors")
    ours = added.framework.state_dict()
    assert all(torch.equal(ours[key], value) for key, value in theirs.items() if key.startswith("vlm."))


@pytest.mark.parametrize(
    "path, trained", [("action_model.oft", "gr00t"), ("action_model", None), ("parts", "gr00t")]
)
def test_the_parts_have_paths_of_their_own(heads, path, trained):
    run = set_up(heads(f"--trainer.freeze_modules {path}"))
    learned = {name for name, p in run.framework.named_parameters() if p.requires_grad}
    assert not [name for name in learned if name.startswith(f"{path}.")]
    assert trained is None or [name for name in learned if name.startswith(f"action_model.{trained}.")]
