"""Training a backbone on conversations alone: no robot, no policy, and what comes of it."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from vla_bench.config import ConfigError, load_config
from vla_bench.files import list_checkpoints
from vla_bench.models.backbones.loading import load_vlm
from vla_bench.models.frameworks.alone import BackboneAlone, export_backbone
from vla_bench.models.frameworks.framework import Framework
from vla_bench.serving.policy import Policy
from vla_bench.training import imitation
from vla_bench.training.checkpoint import check_checkpoint, find_checkpoint
from vla_bench.training.cotrain import read_conversations
from vla_bench.training.imitation import micro_batches, update
from vla_bench.training.loop import read_metrics
from vla_bench.training.run import set_up
from vla_bench.training.vlm import train


@pytest.fixture(scope="module")
def talk(tmp_path_factory):
    """Sections of three conversations and of two about an image."""
    folder = tmp_path_factory.mktemp("talk")
    Image.new("RGB", (32, 32), "red").save(folder / "red.png")
    turns = lambda asked, told: [{"from": "human", "value": asked}, {"from": "gpt", "value": told}]
    text = [{"conversations": turns("close the box", told)} for told in ("close", "the box", "box")]
    shown = [{"image": "red.png", "conversations": turns("<image>\nclose", told)} for told in ("box", "the")]
    found = {}
    for name, entries in {"vlm": text, "caption": shown}.items():
        (folder / f"{name}.json").write_text(json.dumps(entries))
        place = {"annotation_path": str(folder / f"{name}.json"), "data_path": str(folder)}
        own = {"dataset_use": name, "eval_dataset": name, "data_dict": {name: place}}
        found[f"{name}_data"] = own | {"per_device_batch_size": 2}
    return found


@pytest.fixture
def language(config, talk):
    """`language(overrides)`: a configuration without robots."""

    def made(overrides="", **sections):
        tree = config().to_dict()
        tree["framework"] = {"vlm": tree["framework"]["vlm"]}
        tree["datasets"] = talk | sections
        del tree["trainer"]["per_device_batch_size"]
        tree["trainer"]["learning_rate"] = 1e-3
        return load_config(tree, overrides)

    return made


def test_every_section_learns_and_is_measured_from_the_first_step(language):
    folder = train(language("--trainer.eval_interval 3"))
    rows = read_metrics(folder / "metrics.jsonl")
    trained = [row for row in rows if "loss" in row]
    for row in trained:
        assert row["loss"] == pytest.approx(row["language_loss"] + row["caption/language_loss"], rel=1e-6)
    measured = [row for row in rows if "eval/language_loss" in row]
    assert [row["step"] for row in measured] == [0, 3, 6]
    for name in ("eval/language_loss", "eval/caption/language_loss"):
        assert measured[-1][name] < measured[0][name]
    assert "eval/caption/answer_accuracy" in measured[0]


def test_there_is_nothing_of_a_robot_in_the_run(language):
    folder = train(language("--trainer.save_interval 6"))
    assert not (folder / "dataset_statistics.json").exists()
    checkpoint = list_checkpoints(folder)[-1]
    names = {path.name for path in checkpoint.iterdir()}
    assert "backbone.json" in names and not names & {"policy.json", "framework.json"}
    assert all(name.startswith("vlm.") for name in load_file(checkpoint / "model.safetensors"))
    progress = json.loads((checkpoint / "trainer/progress.json").read_text())
    assert progress["data"]["metadata"].keys() == {"vlm/vlm", "caption/caption"}
    assert progress["others"]["caption"] == {"rows": 2, "batch_size": 2}


MODES = {"ddp": {}, "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}}


@pytest.mark.parametrize("mode", MODES)
def test_two_processes_learn_like_one(language, launched, mode):
    """Their conversations have unequal numbers of tokens, and one may have an image where the other has none."""
    sized = lambda size: [f"--datasets.{n}_data.per_device_batch_size {size}" for n in ("vlm", "caption")]
    made = lambda name, size: language(" ".join([f"--run_id {name} --trainer.eval_interval 3", *sized(size)]))
    alone, cfg = train(made("alone", 2)), made("pair", 1)
    pair, *_ = launched(lambda: train(cfg), 2, MODES[mode])
    learned = ("loss", "language_loss", "caption/language_loss")
    measured = ("eval/language_loss", "eval/caption/language_loss")
    for names in (learned, measured):
        ours, theirs = ([[row[name] for name in names] for row in read_metrics(run / "metrics.jsonl")
                         if names[0] in row] for run in (pair, alone))  # fmt: skip
        assert len(theirs) == (6 if names is learned else 3)
        for mine, others in zip(ours, theirs, strict=True):
            assert mine == pytest.approx(others, abs=1e-5)


def test_a_step_is_that_of_co_training_without_robots(language, config, talk):
    """The same gradient, from a framework whose head stands still."""
    alone = set_up(
        language("--run_id alone --trainer.loss_scale {vlm: 0.1, caption: 0.1}"),
        read_conversations,
        robots=False,
    )
    tree = config("--run_id both --trainer.loss_scale.vla 0").to_dict()
    tree["datasets"] |= talk
    tree["trainer"]["learning_rate"] = 1e-3
    both = set_up(load_config(tree), read_conversations)
    for _, ours, theirs in zip(range(2), micro_batches(alone), micro_batches(both)):
        assert update(alone, [ours]) == update(both, [theirs])
    for ours, theirs in zip(alone.framework.vlm.parameters(), both.framework.vlm.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_run_of_co_training_without_robots_is_saved_too(config, talk):
    from vla_bench.training import cotrain

    tree = config("--trainer.loss_scale.vla 0").to_dict()
    tree["datasets"] |= talk
    assert Framework.from_pretrained(cotrain.train(load_config(tree))).horizon == 4


@pytest.mark.parametrize("more", ["", "--trainer.ema_decay 0.9"], ids=["plain", "averaged"])
def test_a_continued_run_is_the_uninterrupted_one(language, more):
    straight, stopped = (train(language(f"--run_id {name} {more}")) for name in ("straight", "stopped"))
    list_checkpoints(stopped)[-1].rename(stopped / "put_away")
    train(load_config(stopped, "--trainer.resume true"))
    names = ("step", "loss", "grad_norm", "language_loss", "caption/language_loss")
    logged = [
        [[row[name] for name in names] for row in read_metrics(run / "metrics.jsonl") if "loss" in row]
        for run in (straight, stopped)
    ]
    assert logged[0] == logged[1]
    ours, theirs = (load_file(list_checkpoints(run)[-1] / "model.safetensors") for run in (stopped, straight))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_policy_is_trained_on_the_backbone(language, config):
    folder = train(language())
    options = f"--run_id policy --trainer.pretrained_checkpoint {folder} --trainer.reload_modules vlm"
    run = set_up(config(f"{options} --trainer.freeze_modules vlm"))
    theirs = BackboneAlone.from_pretrained(folder)
    for name, weight in theirs.vlm.named_parameters():
        assert torch.equal(run.framework.vlm.get_parameter(name), weight)


def test_the_exported_backbone_is_a_base_vlm(language, config, tmp_path):
    folder = train(language())
    out = export_backbone(folder, tmp_path / "exported")
    theirs, ours = (
        BackboneAlone.from_pretrained(folder).vlm.model.state_dict(),
        load_vlm(out).model.state_dict(),
    )
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert set_up(config(f"--run_id next --framework.vlm.base_vlm {out}")).step == 0


def test_the_backbone_of_a_policy_is_exported_as_well(config, tmp_path):
    folder = imitation.train(config("--trainer.max_train_steps 2 --trainer.warmup_steps 0"))
    ours = load_vlm(export_backbone(folder, tmp_path / "exported")).model.state_dict()
    theirs = Framework.from_pretrained(folder).vlm.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_adapters_are_continued_and_merged_on_export(language, tmp_path):
    folder = train(language("--trainer.peft {type: LORA, r: 2} --trainer.learning_rate 1e-2"))
    trained = BackboneAlone.from_pretrained(folder)
    names = {name for name, _ in trained.named_parameters() if "lora" in name}
    assert names and all(name in trained.state_dict() for name in names)
    merged = load_vlm(export_backbone(folder, tmp_path / "exported")).eval()
    inputs = merged.prepare([[Image.new("RGB", (32, 32), "red")]], ["close the box"])
    with torch.no_grad():
        ours, theirs = merged(inputs).hidden, trained.vlm(inputs).hidden
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("load", [Policy.from_pretrained, Framework.from_pretrained])
def test_whoever_serves_it_is_told_how_a_policy_is_made_of_it(language, load):
    checkpoint = list_checkpoints(train(language("--trainer.save_interval 6")))[-1]
    for folder in (checkpoint, checkpoint.parent.parent):
        with pytest.raises(ValueError, match="trainer.pretrained_checkpoint: .* trainer.reload_modules: vlm"):
            load(folder)


@pytest.mark.parametrize(
    "name", ["backbone.json", "model.safetensors", "trainer/progress.json", "vlm/config.json"]
)
def test_a_damaged_checkpoint_says_which_file(language, name):
    folder = train(language("--trainer.save_interval 6"))
    checkpoint = find_checkpoint(folder)
    check_checkpoint(checkpoint, resume=True)
    (checkpoint / name).write_bytes((checkpoint / name).read_bytes()[:-3])
    with pytest.raises(ValueError, match=name):
        train(load_config(folder, "--trainer.resume true"))
    (checkpoint / name).unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=name):
        train(load_config(folder, "--trainer.resume true"))


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            "--datasets.vla_data.root robots",
            "learns from language alone; python -m vla_bench.training.cotrain",
        ),
        ("--trainer.per_device_batch_size 4", "set datasets.vlm_data.per_device_batch_size"),
        ("--framework.vlm.base_vml x", "did you mean 'base_vlm'"),
        ("--trainer.loss_scale.vla 1", "the weight of no source"),
        ("--framework.freeze_vlm_backbone true", "leave no parameter to train"),
    ],
)
def test_what_cannot_be_meant_is_told_before_anything_is_written(language, tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        train(language(overrides))
    assert not (tmp_path / "run").exists()


def test_without_conversations_there_is_nothing_to_learn(language):
    with pytest.raises(ConfigError, match="datasets.vlm_data is missing"):
        train(language(vlm_data=None, caption_data=None))


def test_the_keys_of_a_policy_may_stand_there(language):
    """One configuration serves all strategies, as the seeds' do."""
    options = "--framework.framework_py QwenGR00T --framework.action_model.type FlowMatching"
    assert set_up(language(options), read_conversations, robots=False).framework.config.keys() == {"vlm"}
