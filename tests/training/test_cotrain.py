"""Training on robots and conversations at once, and on several sources in general."""

import json
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from vla_bench.config import ConfigError, load_config
from vla_bench.data.conversations import ConversationSettings, open_conversations
from vla_bench.files import list_checkpoints
from vla_bench.models.backbones.chat import ConversationPrepare
from vla_bench.models.backbones.language_loss import answer_accuracy
from vla_bench.models.backbones.vlm import next_token_loss
from vla_bench.models.frameworks.framework import Framework
from vla_bench.serving.policy import Policy
from vla_bench.training import imitation
from vla_bench.training.cotrain import count_tokens, read_conversations, train
from vla_bench.training.imitation import micro_batches, update
from vla_bench.training.loop import read_metrics
from vla_bench.training.run import set_up

ANSWERS = ("close", "close the box", "the box is the box", "box", "the")


@pytest.fixture(scope="module")
def talk(tmp_path_factory):
    """The section of five conversations whose answers have different lengths, two of them about an image."""
    folder = tmp_path_factory.mktemp("talk")
    Image.new("RGB", (32, 32), "red").save(folder / "red.png")
    entries = []
    for number, answer in enumerate(ANSWERS):
        question = "<image>\nclose the box" if number % 2 else "close the box"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        entries.append({"conversations": turns} | ({"image": "red.png"} if number % 2 else {}))
    (folder / "talk.json").write_text(json.dumps(entries))
    place = {"annotation_path": str(folder / "talk.json"), "data_path": str(folder)}
    return {"dataset_use": "talk", "data_dict": {"talk": place}, "per_device_batch_size": 3}


@pytest.fixture
def both(config, talk):
    """`both(overrides, framework, **vlm_data)`: a configuration of robots and conversations."""

    def made(overrides="", framework="OFT", **changes):
        tree = config("", framework).to_dict()
        tree["datasets"]["vlm_data"] = talk | changes
        tree["datasets"]["vla_data"]["normalization"] = {
            "action": "min_max",
            "state": "min_max",
        }  # π0.5 spells it
        return load_config(tree, overrides)

    return made


def weights(run):
    return {name: p.detach().clone() for name, p in run.framework.named_parameters()}


def logged(run, *names):
    return [[row[name] for name in names] for row in read_metrics(run / "metrics.jsonl") if "loss" in row]


def test_a_step_is_the_gradient_of_the_weighted_sum_over_all_tokens_and_actions(both):
    """Two micro-batches with unequal numbers of tokens and actions, against plain autograd on everything at once."""
    options = "--trainer.gradient_accumulation_steps 2 --trainer.gradient_clipping 1e9"
    run = set_up(
        both(f"{options} --trainer.loss_scale.vla 0.7 --trainer.loss_scale.vlm 0.3"), read_conversations
    )
    stream, vlm = micro_batches(run), run.framework.vlm
    batches = [next(stream), next(stream)]
    tokens = [count_tokens(micro["vlm"]) for micro in batches]
    assert tokens[0] != tokens[1], "choose another seed: this test needs unequal numbers of tokens"
    run.model.eval()
    actions = run.framework([run.view[k] for n in (0, 1) for k in run.sampler().batch(n)])["action_loss"]
    language = 0.0
    for micro in batches:
        labels = micro["vlm"]["labels"]
        states = vlm(micro["vlm"]["inputs"]).hidden
        mean = next_token_loss(vlm.output_matrix(), states, labels)
        language = language + mean * int((labels[:, 1:] != -100).sum()) / sum(tokens)
    (0.7 * actions + 0.3 * language).backward()
    expected = [None if p.grad is None else p.grad.clone() for p in run.framework.parameters()]
    run.framework.zero_grad()
    run.optimizer.zero_grad = lambda: None
    loss, _ = update(run, batches)
    for parameter, gradient in zip(run.framework.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-4)
    assert loss == pytest.approx(0.7 * actions.item() + 0.3 * language.item(), rel=1e-5)
    assert run.losses["language_loss"] == pytest.approx(language.item(), rel=1e-5)


def test_the_log_holds_the_sum_and_each_loss(both):
    run = train(both("--trainer.loss_scale.vla 2 --trainer.loss_scale.vlm 0.5"))
    for total, action, language in logged(run, "loss", "action_loss", "language_loss"):
        assert total == pytest.approx(2 * action + 0.5 * language, rel=1e-6)


def test_language_weighs_a_tenth_unless_told(both):
    run = set_up(both(), read_conversations)
    assert {name: source.weight for name, source in run.sources.items()} == {"vla": 1.0, "vlm": 0.1}


@pytest.mark.parametrize("framework", ["OFT", "GR00T", "PI05"])
def test_with_a_weight_of_zero_it_is_imitation_bit_for_bit(both, config, framework):
    spelt = "--datasets.vla_data.normalization.state min_max"
    alone = imitation.train(config(f"--run_id alone {spelt}", framework))
    none = train(both("--run_id weightless --trainer.loss_scale.vlm 0", framework))
    names = ("loss", "grad_norm")
    assert logged(none, *names) == logged(alone, *names)
    ours, theirs = (load_file(list_checkpoints(run)[-1] / "model.safetensors") for run in (none, alone))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("framework", ["OFT", "PI05"])
def test_without_robots_the_backbone_learns_from_language_alone(both, framework):
    run = set_up(both("--trainer.loss_scale.vla 0 --trainer.warmup_steps 0", framework), read_conversations)
    before, micro = weights(run), next(micro_batches(run))
    assert list(micro) == ["vlm"]
    loss, _ = update(run, [micro])
    assert loss == pytest.approx(0.1 * run.losses["language_loss"], rel=1e-6)
    moved = {n for n, p in run.framework.named_parameters() if not torch.equal(p, before[n])}
    trained = {n for n, p in run.framework.named_parameters() if p.requires_grad}
    assert moved and moved <= trained and all(name.startswith("vlm.") for name in trained)


@pytest.mark.parametrize("framework", ["OFT", "GR00T", "OpenVLA", "PI05"])
def test_every_trainable_weight_gets_a_gradient(both, framework):
    """DDP waits for all of them: a weight without a gradient would stop a run of several processes."""
    run = set_up(both("", framework), read_conversations)
    micro = next(micro_batches(run))
    found = run.model.train()(micro)
    (found["vla"]["action_loss"] + found["vlm"]["language_loss"]).backward()
    trained = {name for name, p in run.framework.named_parameters() if p.requires_grad}
    without = {name for name in trained if run.framework.get_parameter(name).grad is None}
    assert not without
    output = run.framework.vlm.output_matrix().weight
    assert output.requires_grad and output.grad.abs().sum() > 0


@pytest.mark.parametrize("framework", ["GR00T", "PI05"])
def test_knowledge_insulation_keeps_the_actions_out_of_the_backbone(both, framework):
    options, micro = {"insulated": "--framework.knowledge_insulation true", "free": ""}, None
    for name, option in options.items():
        run = set_up(both(f"--run_id {name} {option}", framework), read_conversations)
        micro = micro or next(micro_batches(run))
        for parameter in run.framework.action_model.parameters():  # the gates of π0.5 begin closed
            parameter.data += 0.02 * torch.randn_like(parameter)
        run.model.train()(micro)["vla"]["action_loss"].backward()
        moved = lambda module: sum(p.grad is not None and bool(p.grad.any()) for p in module.parameters())
        assert moved(run.framework.action_model) > 4
        assert (moved(run.framework.vlm) > 0) == (name == "free")


@pytest.mark.parametrize("framework", ["GR00T", "PI05"])
def test_an_insulated_model_predicts_what_the_same_weights_predict_without(both, framework):
    folder = train(both("--framework.knowledge_insulation true", framework))
    checkpoint = list_checkpoints(folder)[-1]
    insulated = Framework.from_pretrained(checkpoint)
    assert insulated.knowledge_insulation
    plain = Framework.from_pretrained(checkpoint)
    plain.knowledge_insulation = False
    run = set_up(both("--run_id for_a_batch", framework), read_conversations)
    batch = next(micro_batches(run))["vla"]
    noise = plain.draw_noise(plain.read(batch), torch.Generator().manual_seed(0))
    ours, theirs = (m.predict_action(batch, noise=noise)["normalized_actions"] for m in (insulated, plain))
    assert (ours == theirs).all()


def test_insulation_without_language_is_refused_unless_the_backbone_is_frozen(config, tmp_path):
    with pytest.raises(ConfigError, match="nothing trains it: co-train it on language"):
        set_up(config("--framework.knowledge_insulation true", "GR00T"))
    frozen = "--framework.knowledge_insulation true --framework.freeze_vlm_backbone true"
    assert set_up(config(frozen, "GR00T")).step == 0


@pytest.mark.parametrize("framework, reads", [("OFT", "queries"), ("OpenVLA", "tokens")])
def test_what_cannot_be_insulated_says_so(config, framework, reads):
    with pytest.raises(ValueError, match=f"framework.knowledge_insulation: .* reads '{reads}'"):
        set_up(config("--framework.knowledge_insulation true", framework))


@pytest.mark.parametrize("key", ["freeze_vlm_backbone", "freeze_llm_backbone"])
def test_a_frozen_language_model_stays_as_it_is(both, key):
    run = set_up(both(f"--framework.{key} true --trainer.warmup_steps 0"), read_conversations)
    before = weights(run)
    update(run, [next(micro_batches(run))])
    moved = {name for name, p in run.framework.named_parameters() if not torch.equal(p, before[name])}
    language = {n for n, _ in run.framework.vlm.named_parameters(prefix="vlm") if "visual" not in n}
    assert not moved & language and moved


def test_a_continued_run_is_the_uninterrupted_one(both):
    straight = train(both("--run_id straight --trainer.save_interval 1"))
    stopped = train(both("--run_id stopped --trainer.save_interval 1"))
    for checkpoint in list_checkpoints(stopped)[1:]:
        for file in sorted(checkpoint.rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        checkpoint.rmdir()
    train(load_config(stopped, "--trainer.resume true"))
    names = ("loss", "action_loss", "language_loss")
    assert logged(stopped, *names) == logged(straight, *names)
    ours, theirs = (load_file(list_checkpoints(run)[-1] / "model.safetensors") for run in (stopped, straight))
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def test_two_processes_train_and_measure_like_one(both, tmp_path):
    """Their conversations have unequal numbers of tokens, and one asks three of the five that are held out."""
    size = lambda robots, talk: [f"--trainer.per_device_batch_size {robots}", {"per_device_batch_size": talk}]
    (wide, four), (half, two) = size(4, 4), size(2, 2)
    alone = train(both(f"--run_id alone {wide}", "OFT", eval_dataset="talk", **four))
    both(f"--run_id pair {half}", "OFT", eval_dataset="talk", **two).save(tmp_path / "pair.yaml")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "vla_bench.training.cotrain", "--config_yaml", tmp_path / "pair.yaml"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=180)
    assert result.returncode == 0, result.stderr[-3000:]
    pair, names = tmp_path / "pair", ("loss", "action_loss", "language_loss")
    for ours, theirs in zip(logged(pair, *names), logged(alone, *names), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
    asked = ("eval/language_loss", "eval/answer_accuracy")
    last = [read_metrics(run / "metrics.jsonl")[-1] for run in (pair, alone)]
    assert [last[0][name] for name in asked] == pytest.approx([last[1][name] for name in asked], rel=1e-3)


FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
SHARDED = {
    f"zero{n}": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(n)}
    for n in (2, 3)
}
SHARDED |= {"ddp": {}, "fsdp2": FSDP2}


@pytest.mark.parametrize("length", [2048, 28])
@pytest.mark.parametrize("mode", SHARDED)
def test_sharded_processes_learn_from_both_like_one(both, launched, mode, length):
    """One conversation a process: some steps have an image in one of them, with 28 tokens some have nothing to learn."""
    if mode != "ddp":
        pytest.importorskip("deepspeed")
    sizes = lambda n: f"--trainer.per_device_batch_size {2 * n} --trainer.weight_decay 0"
    told = {"model_max_length": length, "eval_dataset": "talk"}
    alone = train(both(f"--run_id alone {sizes(2)}", per_device_batch_size=2, **told))
    cfg = both(f"--run_id pair {sizes(1)}", per_device_batch_size=1, **told)
    pair, *_ = launched(lambda: train(cfg), 2, SHARDED[mode])
    names = ("loss", "action_loss", "language_loss")
    for ours, theirs in zip(logged(pair, *names), logged(alone, *names), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    rows = [row.get("dropped/vlm", 0) for row in read_metrics(pair / "metrics.jsonl") if "loss" in row]
    assert bool(any(rows)) == (length == 28)
    measured = [read_metrics(run / "metrics.jsonl")[-1]["eval/language_loss"] for run in (pair, alone)]
    assert measured[0] == pytest.approx(measured[1], rel=1e-4)


def test_a_run_is_not_continued_on_other_conversations(both, talk, tmp_path):
    mine = tmp_path / "mine.json"
    with open(talk["data_dict"]["talk"]["annotation_path"]) as file:
        mine.write_text(file.read())
    place = {**talk["data_dict"]["talk"], "annotation_path": str(mine)}
    run = train(both("--trainer.max_train_steps 2 --trainer.warmup_steps 0", data_dict={"talk": place}))
    mine.write_text(mine.read_text().replace("the box is the box", "the box is the lid"))
    with pytest.raises(ValueError, match="trained on other data.*vlm/talk has other content"):
        train(load_config(run, "--trainer.resume true"))


def test_what_is_measured_is_the_loss_and_accuracy_of_what_is_held_out(both, talk):
    cfg = both("--trainer.eval_interval 3", eval_dataset="talk")
    run = train(cfg)
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "eval/language_loss" in row]
    assert [row["step"] for row in rows] == [0, 3, 6]
    settings = cfg.section("datasets.vlm_data").into(ConversationSettings)
    held_out = open_conversations(settings, held_out=True)
    framework = Framework.from_pretrained(list_checkpoints(run)[-1])
    found = answer_accuracy(framework.vlm, ConversationPrepare(framework.vlm.prepare), held_out)
    assert rows[-1]["eval/language_loss"] == pytest.approx(found["loss"], rel=1e-5)
    assert rows[-1]["eval/answer_accuracy"] == found["accuracy"]
    assert rows[-1]["eval/language_loss"] < rows[0]["eval/language_loss"]


def test_measuring_changes_no_loss(both):
    quiet, measured = (
        train(both("--run_id quiet")),
        train(both("--trainer.eval_interval 1", eval_dataset="talk")),
    )
    names = ("loss", "action_loss", "language_loss", "grad_norm")
    assert logged(measured, *names) == logged(quiet, *names)


def test_the_first_row_is_written_once_when_a_run_starts_again_before_its_first_checkpoint(both, monkeypatch):
    cfg = both("--trainer.eval_interval 1000", eval_dataset="talk")

    def broken(run, batches):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(imitation, "update", broken)
        with pytest.raises(KeyboardInterrupt):
            train(cfg)
    run = train(both("--trainer.eval_interval 1000 --trainer.resume true", eval_dataset="talk"))
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl") if "eval/language_loss" in row] == [
        0,
        6,
    ]


@pytest.fixture
def several(both, talk):
    """`several(overrides)`: robots, the conversations of `vlm_data`, and some of them again as `caption_data`."""

    def made(overrides=""):
        tree = both("", eval_dataset="talk").to_dict()
        captions = talk | {"dataset_use": "talk%60", "eval_dataset": "talk%40", "per_device_batch_size": 2}
        tree["datasets"]["caption_data"] = captions
        return load_config(tree, overrides)

    return made


def test_every_section_of_conversations_has_its_own_batches_weight_and_numbers(several):
    options = "--trainer.loss_scale.vlm 0.3 --trainer.loss_scale.caption 0.2 --trainer.eval_interval 3"
    folder = train(several(options))
    names = ("loss", "action_loss", "language_loss", "caption/language_loss")
    for total, action, language, caption in logged(folder, *names):
        assert total == pytest.approx(action + 0.3 * language + 0.2 * caption, rel=1e-6)
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "eval/language_loss" in row]
    assert [row["step"] for row in rows] == [0, 3, 6]
    first, last = rows[0], rows[-1]
    for name in ("eval/language_loss", "eval/caption/language_loss"):
        assert last[name] < first[name]
    assert first["eval/caption/language_loss"] != first["eval/language_loss"]
    assert 0 <= last["eval/caption/answer_accuracy"] <= 1
    others = json.loads((list_checkpoints(folder)[-1] / "trainer/progress.json").read_text())["others"]
    assert others == {"vlm": {"rows": 5, "batch_size": 3}, "caption": {"rows": 3, "batch_size": 2}}


def test_a_second_section_of_weight_zero_changes_nothing(several, both):
    one = train(both("--run_id one", eval_dataset="talk"))
    two = train(several("--run_id two --trainer.loss_scale.caption 0"))
    names = ("loss", "action_loss", "language_loss", "grad_norm")
    assert logged(two, *names) == logged(one, *names)


@pytest.mark.parametrize(
    "overrides, message",
    [
        ("--datasets.captoin_data.per_device_batch_size 2", "did you mean 'caption_data'"),
        ("--datasets.caption_dat.per_device_batch_size 2", "did you mean 'datasets.caption_data'"),
        (
            "--datasets.caption_data.dataset_use tlak",
            "datasets.caption_data.dataset_use: unknown dataset 'tlak'",
        ),
        (
            "--datasets.caption_data.over_long cut",
            "datasets.caption_data.over_long must be 'drop' or 'refuse'",
        ),
        ("--trainer.loss_scale.captoin 1", "did you mean 'caption'"),
    ],
)
def test_a_misspelt_section_is_told_with_the_nearest_one(several, tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        train(several(overrides))
    assert not (tmp_path / "runs").exists()


def test_over_long_conversations_are_dropped_and_a_batch_of_none_moves_nothing(both, config):
    """The answers are learned by nobody, so the step is that of imitation; and the log says how many were dropped."""
    cfg = both("--trainer.weight_decay 0", model_max_length=4)
    run = set_up(cfg, read_conversations)
    micro = next(micro_batches(run))
    assert micro["vlm"]["inputs"] is None and len(micro["vlm"]["dropped"]) == 3
    update(run, [micro])
    assert run.losses["language_loss"] == 0.0
    state = "--datasets.vla_data.normalization.state min_max"
    alone = set_up(config(f"--run_id alone --trainer.weight_decay 0 {state}"))
    update(alone, [{"vla": micro["vla"]}])
    assert all(torch.equal(p, q) for p, q in zip(run.framework.parameters(), alone.framework.parameters()))
    row = next(row for row in read_metrics(train(both("--run_id all", model_max_length=4)) / "metrics.jsonl"))
    assert row["dropped/vlm"] == 3


def test_packed_conversations_give_the_same_losses(both):
    plain = train(both("--run_id plain"))
    packed = train(both("--run_id packed", data_flatten=True))
    for ours, theirs in zip(logged(packed, "language_loss"), logged(plain, "language_loss"), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4)


def test_the_sources_have_batches_of_their_own_size_and_order(both, talk):
    run = set_up(both(), read_conversations)
    micro = next(micro_batches(run))
    assert len(micro["vla"]["lang"]) == 4 and len(micro["vlm"]["origin"]) == 3
    epoch = [row for number in range(5) for _, row in run.sampler("vlm").batch(number)]
    assert all(sorted(epoch[i : i + 5]) == list(range(5)) for i in range(0, 15, 5))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"dataset_use": "tlak"}, "did you mean 'talk'"),
        ({"model_max_lenght": 9}, "did you mean 'datasets.vlm_data.model_max_length'"),
        ({"data_dict": {"talk": {"annotation_path": "gone.json", "data_path": "."}}}, "gone.json"),
        ({"eval_dataset": "tlak"}, "did you mean 'talk'"),
    ],
)
def test_a_mistake_is_told_before_anything_is_written(both, tmp_path, changes, message):
    cfg = both("", **changes)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(cfg)
    assert not (tmp_path / "runs").exists()


def test_a_policy_of_a_co_trained_run_is_served_as_any_other(both):
    policy = Policy.from_pretrained(train(both("--trainer.max_train_steps 2 --trainer.warmup_steps 0")))
    assert policy.spec.horizon == 4
