"""A policy: what reaches the network, what comes back in physical units, and what it is loaded from.

The checkpoint is one of version 0.1.0, which predicts what it predicted then.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from vla_bench.data.action_modes import encoding_to_dict, make_encoding
from vla_bench.data.layout import Layout, PolicySpec, spec_from_dict, spec_to_dict
from vla_bench.data.normalize import Normalizer, Statistics, save_statistics, statistics_hash
from vla_bench.data.parts import Part, parts_layout
from vla_bench.files import write_manifest
from vla_bench.models.attention_map import AttentionMap
from vla_bench.serving import policy as policy_module
from vla_bench.serving.policy import Policy, check_predicted, load_normalizers, robot_spec
from vla_bench.training.checkpoint import read_spec

FIXTURES = Path(__file__).parents[1] / "fixtures" / "version_0_1"


@pytest.fixture(scope="module")
def policy():
    return Policy.from_pretrained(FIXTURES / "runs" / "llava", checkpoint=3)


@pytest.fixture(scope="module")
def expected():
    with np.load(FIXTURES / "llava_expected.npz") as file:
        return {name: file[name] for name in file.files}


@pytest.fixture(scope="module")
def observation(expected):
    image = Image.fromarray(expected["image"])
    return {"image": [image], "lang": expected["lang"].item(), "state": expected["state"]}


def test_a_checkpoint_of_version_0_1_predicts_the_same_actions(policy, observation, expected):
    assert np.abs(policy.predict(observation, seed=0) - expected["step3"]).max() < 1e-6


def test_a_checkpoint_of_version_0_1_attends_to_the_same(policy, observation, expected):
    assert np.abs(policy.attention(observation).images[0] - expected["attention"]).max() < 1e-6


def test_a_checkpoint_of_version_0_1_keeps_its_fingerprint(policy):
    assert policy.fingerprint == "890b98089d95d9e1"  # as in its evaluation's fingerprint.json


@pytest.mark.parametrize(
    "change, named",
    [
        ({"image": []}, "has 0 images, the policy sees 1 cameras"),
        ({"image": [np.zeros((32, 32, 3), np.uint8)]}, "'top' is a ndarray, expected a PIL image"),
        ({"image": [Image.new("RGB", (64, 32))]}, r"'top' is \(64, 32\) \(width, height\), expected \(32, 32\)"),
        ({"state": [0.1]}, r"has the shape \[1\], expected \[2\]: row, column"),
        ({"images": []}, "unknown key 'images'"),
    ],
)  # fmt: skip
def test_an_observation_that_does_not_fit_is_refused(policy, observation, change, named):
    with pytest.raises(ValueError, match=named):
        policy.predict({**observation, **change}, seed=0)


# A policy of other parts: what it is given reaches the network, and what comes out is scaled back, value by value.

SPEC = PolicySpec(
    action=Layout(("dx", "turn", "grip"), "delta", "base", gripper="positive_opens"),
    state=Layout(("x", "y"), "absolute", "world"),
    cameras=("left", "right"),
    image_size=(4, 6),
    horizon=5,
    control_rate=12.5,
    normalization={"action": ["q99", "mean_std", "binary"], "state": "min_max"},
    dataset="ours",
    statistics_hash="",
)
ACTION = Statistics(
    min=np.array([-1.0, -2.0, 0.0]),
    max=np.array([3.0, 5.0, 1.0]),
    mean=np.array([0.5, 0.7, 0.3]),
    std=np.array([0.2, 0.4, 0.1]),
    q01=np.array([-0.5, -1.0, 0.0]),
    q99=np.array([2.5, 4.0, 1.0]),
    count=9,
)
STATE = Statistics(
    *(
        np.array(pair)
        for pair in ((0.0, 10.0), (4.0, 30.0), (1.0, 12.0), (0.5, 3.0), (0.1, 11.0), (3.0, 20.0))
    ),
    9,
)
SEEN = {
    "image": [Image.new("RGB", (6, 4), colour) for colour in ("red", "blue")],
    "lang": "go",
    "state": [3.0, 15.0],
}


class Echo(torch.nn.Module):
    """Keeps what it is given; its actions are the noise."""

    action_dim, state_dim, horizon = 3, 2, 5

    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(1)), []

    def predict_action(self, examples, *, generator):
        self.seen.append((examples, torch.is_grad_enabled(), self.training))
        return {"normalized_actions": torch.randn(1, 5, 3, generator=generator).numpy()}

    def attention_maps(self, examples, *, generator):
        self.seen.append(examples)
        noise = torch.rand(2, 4, 6, generator=generator).numpy()
        return [AttentionMap(list(noise), [("go", 0.5)])]


@pytest.fixture
def echo():
    normalizers = {
        "action": Normalizer(ACTION, SPEC.normalization["action"]),
        "state": Normalizer(STATE, SPEC.normalization["state"]),
    }
    return Policy(Echo().train(), SPEC, normalizers, "fingerprint")


def test_the_network_sees_the_images_in_order_the_instruction_and_the_normalised_state(echo):
    echo.predict(SEEN, seed=0)
    (((sample,), with_gradient, training),) = echo.framework.seen
    assert [image.getpixel((0, 0)) for image in sample["image"]] == [(255, 0, 0), (0, 0, 255)]
    assert (sample["lang"], sample["dataset"]) == ("go", "ours")
    np.testing.assert_allclose(sample["state"], [0.5, -0.5])  # 3 of 0 … 4, and 15 of 10 … 30
    assert not with_gradient and not training


@pytest.mark.parametrize("seed", [0, 7])
def test_each_dimension_of_an_action_is_scaled_back_by_its_own_mode(echo, seed):
    raw = torch.randn(1, 5, 3, generator=torch.Generator().manual_seed(seed)).numpy()[0].astype(np.float64)
    physical = echo.predict(SEEN, seed=seed)
    np.testing.assert_allclose(physical[:, 0], 1.0 + 1.5 * raw[:, 0])
    np.testing.assert_allclose(physical[:, 1], 0.7 + 0.4 * raw[:, 1])
    np.testing.assert_array_equal(physical[:, 2], raw[:, 2] > 0)
    assert physical.dtype == np.float64


def test_attention_starts_from_one_fixed_noise(echo):
    found, ((sample,),) = echo.attention(SEEN), echo.framework.seen
    noise = torch.rand(2, 4, 6, generator=torch.Generator().manual_seed(0)).numpy()
    np.testing.assert_array_equal(found.images, noise)
    assert found.words == [("go", 0.5)]
    np.testing.assert_allclose(sample["state"], [0.5, -0.5])


def test_a_policy_without_a_state_ignores_one():
    network = Echo()
    network.state_dim = 0
    spec = replace(SPEC, state=None)
    policy = Policy(network, spec, {"action": Normalizer(ACTION, "min_max")})
    policy.predict(SEEN, seed=0)
    policy.predict({"image": SEEN["image"], "lang": "go"}, seed=0)
    assert ["state" in sample for (sample,), *_ in network.seen] == [
        False,
        False,
    ] and policy.fingerprint == ""


@pytest.mark.parametrize("name, value", [("action_dim", 4), ("state_dim", 3), ("horizon", 6)])
def test_weights_of_another_size_are_refused(name, value):
    network = Echo()
    setattr(network, name, value)
    with pytest.raises(ValueError, match=r"= \(3, 2, 5\), the weights have \(.*" + str(value)):
        Policy(network, SPEC, {})


@pytest.mark.parametrize("count", [1, 3])
def test_an_image_too_few_or_too_many_is_refused(echo, count):
    with pytest.raises(
        ValueError, match=f"has {count} images, the policy sees 2 cameras in this order: left, right; render"
    ):
        echo.predict({**SEEN, "image": (SEEN["image"] * 2)[:count]}, seed=0)


def test_an_image_on_its_side_is_refused(echo):
    with pytest.raises(ValueError, match=r"'right' is \(4, 6\) \(width, height\), expected \(6, 4\)"):
        echo.predict({**SEEN, "image": [SEEN["image"][0], SEEN["image"][1].rotate(90, expand=True)]}, seed=0)


# The files of a checkpoint.


@pytest.fixture
def run(tmp_path):
    """A copy of the run with a second checkpoint, of step 6."""
    copy = shutil.copytree(FIXTURES / "runs" / "llava", tmp_path / "llava")
    later = shutil.copytree(copy / "checkpoints/step_000003", copy / "checkpoints/step_000006")
    shutil.copy(FIXTURES / "llava_step6.safetensors", later / "model.safetensors")
    return copy


def test_which_checkpoint_is_loaded(run, observation, expected):
    found = {
        which: Policy.from_pretrained(run, checkpoint=which).fingerprint
        for which in (3, "step_000003", 6, "latest")
    }
    assert found[3] == found["step_000003"] == "890b98089d95d9e1" != found[6] == found["latest"]
    assert Policy.from_pretrained(run).fingerprint == found[6]
    assert Policy.from_pretrained(run / "checkpoints/step_000003").fingerprint == found[3]


def change_weights(checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    name = max(name for name, value in weights.items() if value.is_floating_point())
    weights[name].view(-1)[0] += 1e-3
    save_file(weights, checkpoint / "model.safetensors")


def change_json(name):
    def change(checkpoint):
        content = json.loads((checkpoint / name).read_text())
        (checkpoint / name).write_text(json.dumps(content, indent=3))

    return change


def change_spec(checkpoint):
    spec = replace(spec_from_dict(json.loads((checkpoint / "policy.json").read_text())), control_rate=11.0)
    (checkpoint / "policy.json").write_text(json.dumps(spec_to_dict(spec)))


CHANGES = {
    "the weights": change_weights,
    "the specification": change_spec,
    "the framework": change_json("framework.json"),
    "the backbone": change_json("vlm/config.json"),
    "the tokenizer": change_json("vlm/tokenizer.json"),
    "the chat template": lambda checkpoint: (checkpoint / "vlm/chat_template.jinja").open("a").write("{# #}"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_the_fingerprint_changes_with_each_thing_alone_that_a_policy_is_loaded_from(run, policy, name):
    checkpoint = run / "checkpoints/step_000003"
    assert Policy.from_pretrained(checkpoint).fingerprint == policy.fingerprint
    CHANGES[name](checkpoint)
    assert Policy.from_pretrained(checkpoint).fingerprint != policy.fingerprint


def test_the_fingerprint_changes_with_a_file_of_the_head(run, policy):
    checkpoint = run / "checkpoints/step_000003"
    (checkpoint / "action_model").mkdir()
    (checkpoint / "action_model/bpe.json").write_text("{}")
    assert policy_module._fingerprint(checkpoint, policy.spec) != policy.fingerprint


def test_the_fingerprint_is_that_of_the_files_with_and_without_a_manifest(run, policy):
    checkpoint = run / "checkpoints/step_000003"
    write_manifest(checkpoint)
    (checkpoint / "trainer/progress.json").touch()
    assert Policy.from_pretrained(checkpoint).fingerprint == policy.fingerprint


def test_the_fingerprint_leaves_out_what_only_training_reads(run, policy):
    (run / "checkpoints/step_000003/trainer/rng.json").write_text("{}")
    (run / "metrics.jsonl").unlink()
    assert Policy.from_pretrained(run, checkpoint=3).fingerprint == policy.fingerprint


def test_weights_that_are_not_finite_are_refused(run):
    path = run / "checkpoints/step_000006/model.safetensors"
    weights = load_file(path)
    next(value for value in weights.values() if value.is_floating_point()).view(-1)[-1] = np.nan
    save_file(weights, path)
    with pytest.raises(ValueError, match="model.safetensors"):
        Policy.from_pretrained(run)


@pytest.mark.parametrize("verify", [False, True])
def test_every_byte_is_compared_where_that_is_asked_for(run, verify, monkeypatch):
    asked = []
    monkeypatch.setattr(
        policy_module, "check_checkpoint", lambda folder, *, verify: asked.append((folder.name, verify))
    )
    Policy.from_pretrained(run, verify=verify)
    assert asked == [("step_000006", verify)]


def test_a_cpu_computes_with_as_many_threads_as_the_settings_say(run, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(policy_module, "get_setting", lambda name: {"launch.threads": "3"}[name])
    Policy.from_pretrained(run)
    assert asked == [3]


def test_a_policy_is_loaded_for_inference(run, monkeypatch):
    asked, load = [], policy_module.Framework.from_pretrained
    monkeypatch.setattr(
        policy_module.Framework,
        "from_pretrained",
        lambda folder, **more: asked.append(more) or load(folder, **more),
    )
    Policy.from_pretrained(run)
    assert asked == [{"inference": True}]


@pytest.fixture
def two_datasets(tmp_path):
    """A checkpoint folder whose run has statistics of two datasets, and a specification that goes with them."""
    (tmp_path / "checkpoints/step_000001").mkdir(parents=True)
    other = replace(ACTION, mean=ACTION.mean + 100)
    content = {"theirs": {"action": other, "state": None}, "ours": {"action": ACTION, "state": STATE}}
    save_statistics(tmp_path / "dataset_statistics.json", content)
    return tmp_path / "checkpoints/step_000001", replace(SPEC, statistics_hash=statistics_hash(content))


def test_the_statistics_are_those_of_the_policys_own_dataset(two_datasets):
    checkpoint, spec = two_datasets
    found = load_normalizers(checkpoint, spec)
    assert sorted(found) == ["action", "state"]
    assert found["action"].modes == ("q99", "mean_std", "binary") and found["state"].modes == ("min_max",) * 2
    np.testing.assert_allclose(found["action"].unnormalize([[0.0, 0.0, 1.0]]), [[1.0, 0.7, 1.0]])
    np.testing.assert_allclose(found["state"].unnormalize([[0.0, 0.0]]), [[2.0, 20.0]])


def test_a_policy_without_a_state_takes_no_statistics_of_one(two_datasets):
    checkpoint, spec = two_datasets
    assert list(load_normalizers(checkpoint, replace(spec, state=None))) == ["action"]


def test_statistics_in_the_checkpoint_itself_come_first(two_datasets):
    checkpoint, spec = two_datasets
    content = {"ours": {"action": replace(ACTION, mean=ACTION.mean + 1), "state": STATE}}
    save_statistics(checkpoint / "dataset_statistics.json", content)
    with pytest.raises(ValueError, match="step_000001/dataset_statistics.json has the hash"):
        load_normalizers(checkpoint, spec)
    found = load_normalizers(checkpoint, replace(spec, statistics_hash=statistics_hash(content)))
    assert found["action"].unnormalize([[0.0, 0.0, 1.0]])[0, 1] == pytest.approx(1.7)


def test_a_dataset_without_statistics_is_refused_with_the_nearest(two_datasets):
    checkpoint, spec = two_datasets
    with pytest.raises(ValueError, match="has no dataset 'our'; did you mean 'ours'"):
        load_normalizers(checkpoint, replace(spec, dataset="our"))


def test_the_program_prints_the_specification_and_the_fingerprint(run, capsys):
    policy_module.main([str(run), "--checkpoint", "3"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["fingerprint"] == "890b98089d95d9e1" and printed["cameras"] == ["top"]
    assert printed["hash"] == spec_from_dict({k: v for k, v in printed.items() if k != "fingerprint"}).hash


def test_the_program_compares_every_byte_when_told_to(run, monkeypatch):
    asked = []
    monkeypatch.setattr(policy_module, "check_checkpoint", lambda folder, *, verify: asked.append(verify))
    for words in ([], ["--verify"]):
        policy_module.main([str(run), *words])
    assert asked == [False, True]


# --- a framework or a head that returns rubbish ---------------------------------------------------------------------

CHUNK = np.zeros((1, 4, 2), np.float32)  # horizon 4, two numbers an action
PREDICTED = {
    "nothing": (None, "NoneType"),
    "an array": (CHUNK, "ndarray"),
    "another key": ({"actions": CHUNK}, r"\['actions'\]"),
    "a list": ({"normalized_actions": CHUNK.tolist()}, "a list"),
    "a tensor": ({"normalized_actions": torch.zeros(1, 4, 2)}, "a Tensor"),
    "complex numbers": ({"normalized_actions": CHUNK * 1j}, "complex64"),
    "whole numbers": ({"normalized_actions": CHUNK.astype(int)}, "int64"),
    "text": ({"normalized_actions": CHUNK.astype(str)}, "<U"),
    "no batch": ({"normalized_actions": CHUNK[0]}, r"float32 \[4, 2\]"),
    "another horizon": ({"normalized_actions": CHUNK[:, 1:]}, r"float32 \[1, 3, 2\]"),
    "another action": ({"normalized_actions": CHUNK[..., :1]}, r"float32 \[1, 4, 1\]"),
    "NaN": ({"normalized_actions": CHUNK * np.nan}, "numbers that are not finite at step 0"),
    "infinity": (
        {"normalized_actions": np.where(np.arange(4)[:, None] < 2, CHUNK, np.inf)},
        "numbers that are not finite at step 2",
    ),
}


@pytest.mark.parametrize("case", PREDICTED)
def test_a_prediction_that_is_no_chunk_is_refused_with_the_frameworks_name(
    policy, observation, monkeypatch, case
):
    returned, named = PREDICTED[case]
    monkeypatch.setattr(policy.framework, "predict_action", lambda *args, **options: returned)
    with pytest.raises(ValueError, match=f"^LlavaVLA predicted {named}.*; expected") as caught:
        policy.predict(observation, seed=0)
    assert "\n" not in str(caught.value)


IMAGE = np.full((2, 2), 0.25, np.float32)
MAPS = {
    "nothing": (None, "a NoneType"),
    "no map": ([], "a list"),
    "two maps": ([AttentionMap([IMAGE], [])] * 2, "a list"),
    "a map that is no list": (AttentionMap([IMAGE], []), "a AttentionMap"),
    "a dictionary": ([{"images": [IMAGE]}], "a dict"),
    "too many images": ([AttentionMap([IMAGE, IMAGE], [])], "an AttentionMap of 2 images"),
    "a tensor": ([AttentionMap([torch.ones(2, 2)], [])], r"an AttentionMap of 1 images \['Tensor'\]"),
    "no list of images": ([AttentionMap(None, [])], "an AttentionMap of NoneType and list"),
    "no list of words": ([AttentionMap([IMAGE], 7)], "an AttentionMap of list and int"),
    "a row of patches": ([AttentionMap([IMAGE.ravel()], [])], r"float32 \[4\]"),
    "complex numbers": ([AttentionMap([IMAGE * 1j], [])], r"complex64 \[2, 2\]"),
    "NaN": ([AttentionMap([IMAGE * np.nan], [])], "numbers that are negative or not finite"),
    "negative numbers": ([AttentionMap([-IMAGE], [])], "numbers that are negative or not finite"),
    "words alone": ([AttentionMap([IMAGE], ["open"])], "'open'"),
    "a share of text": ([AttentionMap([IMAGE], [("open", "0.5")])], r"\('open', '0.5'\)"),
    "a share of NaN": ([AttentionMap([IMAGE], [("open", float("nan"))])], r"\('open', nan\)"),
}


@pytest.mark.parametrize("case", MAPS)
def test_maps_that_are_none_are_refused_with_the_frameworks_name(policy, observation, monkeypatch, case):
    returned, named = MAPS[case]
    monkeypatch.setattr(policy.framework, "attention_maps", lambda *args, **options: returned)
    with pytest.raises(ValueError, match=f"^LlavaVLA gave {named}.*attention.*; expected") as caught:
        policy.attention(observation)
    assert "\n" not in str(caught.value)


ATTENTION = {  # what a head's `attention` returns, made of what it should be [B, L]
    "nothing": (lambda right: None, "a NoneType"),
    "an array": (lambda right: right.numpy(), "a ndarray"),
    "complex numbers": (lambda right: right.to(torch.complex64), "torch.complex64"),
    "whole numbers": (lambda right: right.long(), "torch.int64"),
    "no batch": (lambda right: right[0], "torch.float32"),
    "two samples": (lambda right: right.repeat(2, 1), "torch.float32"),
    "one token too few": (lambda right: right[:, 1:], "torch.float32"),
    "a number per head": (lambda right: right[:, None], "torch.float32"),
    "NaN": (lambda right: right * float("nan"), "nan as the attention of sample 0 to token 0"),
    "negative numbers": (lambda right: right - 1, "-1.0 as the attention of sample 0 to token 0"),
}


@pytest.mark.parametrize("case", ATTENTION)
def test_a_heads_attention_that_is_none_is_refused_with_its_name(policy, observation, monkeypatch, case):
    wrong, named = ATTENTION[case]
    head = policy.framework.action_model
    monkeypatch.setattr(type(head), "offers_attention", True)
    attention = lambda features, noise=None: wrong(torch.zeros(features.mask.shape))
    monkeypatch.setattr(head, "attention", attention)
    with pytest.raises(ValueError, match=rf"^TransformerHead gave {named}.*; expected a floating") as caught:
        policy.attention(observation)
    assert "\n" not in str(caught.value)


# A model that is wider than the robot, several robots, several observations.


def normalizers_of(spec):
    return {
        "action": Normalizer(ACTION, spec.normalization["action"]),
        "state": Normalizer(STATE, spec.normalization["state"]),
    }


def test_of_a_wider_model_the_robots_own_numbers_come_first_and_are_returned():
    network = Echo()
    network.action_dim, network.state_dim = 6, 4
    wide = np.tile(np.arange(6, dtype=np.float32) / 10, (1, 5, 1))
    network.predict_action = lambda examples, *, generator: (
        network.seen.append(examples) or {"normalized_actions": wide}
    )
    spec = replace(SPEC, widths=(6, 4, 3))  # and of a camera more
    physical = Policy(network, spec, normalizers_of(spec)).predict(SEEN, seed=0)
    np.testing.assert_allclose(physical, np.tile([1.0, 0.7 + 0.4 * 0.1, 1.0], (5, 1)), rtol=1e-6)
    (sample,) = network.seen[0]
    np.testing.assert_allclose(sample["state"], [0.5, -0.5, 0, 0])
    assert sample["image_mask"].tolist() == [True, True, False] and len(sample["image"]) == 3
    assert sample["action_mask"].tolist() == [True] * 3 + [False] * 3


def test_several_observations_are_each_normalised():
    network = Echo()
    network.state_dim = 4
    spec = replace(SPEC, observation_steps=2)
    policy = Policy(network, spec, normalizers_of(spec))
    seen = {
        **SEEN,
        "image": [image for image in SEEN["image"] for _ in range(2)],
        "state": [3.0, 15.0, 1.0, 25.0],
    }
    policy.predict(seen, seed=0)
    (((sample,), *_),) = network.seen
    np.testing.assert_allclose(sample["state"], [0.5, -0.5, -0.5, 0.5])
    assert [image.getpixel((0, 0))[0] for image in sample["image"]] == [255, 255, 0, 0]
    for count in (2, 3):
        with pytest.raises(
            ValueError, match=f"has {count} images, the policy sees 2 cameras .*2 images each"
        ):
            policy.predict({**seen, "image": seen["image"][:count]}, seed=0)


def test_a_mask_of_cameras_reaches_the_network(echo):
    echo.predict({**SEEN, "image_mask": np.array([False, True])}, seed=0)
    echo.predict(SEEN, seed=0)
    masked, plain = (examples[0] for examples, *_ in echo.framework.seen)
    assert masked["image_mask"].tolist() == [False, True] and "image_mask" not in plain


@pytest.fixture
def two_robots(run):
    """A run whose second robot acts at another rate."""
    checkpoint = run / "checkpoints/step_000003"
    spec = spec_from_dict(json.loads((checkpoint / "policy.json").read_text()))
    (run / "policies").mkdir()
    other = replace(spec, dataset="second", control_rate=7.0)
    (run / "policies/second.json").write_text(json.dumps(spec_to_dict(other)))
    return checkpoint, spec, other


def test_of_several_robots_the_one_that_is_asked_for_is_served(two_robots):
    checkpoint, spec, other = two_robots
    assert robot_spec(checkpoint) == robot_spec(checkpoint, spec.dataset) == spec
    assert robot_spec(checkpoint, "second") == other
    with pytest.raises(ValueError, match="was not trained on 'secund'; did you mean 'second'"):
        robot_spec(checkpoint, "secund")


def test_the_robot_that_is_asked_for_reaches_the_policy(run, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(
        policy_module, "robot_spec", lambda folder, dataset: asked.append(dataset) or read_spec(folder)
    )
    Policy.from_pretrained(run, dataset="second")
    policy_module.main([str(run), "--dataset", "third"])
    policy_module.main([str(run)])
    assert asked == ["second", "third", None]


# Two features together, each of which alone is tested above.


@pytest.mark.parametrize("mode", ["absolute", "relative", "delta"])
def test_actions_measured_from_the_state_begin_at_the_present_one_of_several_in_a_wider_model(mode):
    """An encoding × several observations × a model that is wider than the robot × a prompt of its own."""
    parts = [Part("place", ("x", "y"), "position"), Part("grip", ("g",), "gripper", gripper="positive_opens")]
    encoding = make_encoding(parts, parts, {"place": mode})
    layout = parts_layout(parts)
    spec = replace(
        SPEC,
        action=layout,
        state=layout,
        encoding=encoding_to_dict(encoding),
        observation_steps=2,
        prompt="robot, {lang} now",
        normalization={"action": "identity", "state": "identity"},
        widths=(5, 9, 5),  # and of a camera more
    )
    network, raw = Echo(), np.arange(25, dtype=np.float32).reshape(1, 5, 5) / 10
    network.action_dim, network.state_dim = 5, 9
    network.predict_action = lambda examples, *, generator: (
        network.seen.append(examples) or {"normalized_actions": raw}
    )
    policy = Policy(network, spec, {})
    state = [3.0, 15.0, 0.1, 1.0, 25.0, 0.2]  # what was, and what is
    images = [image for image in SEEN["image"] for _ in range(2)]
    found = policy.predict({"image": images, "lang": "go", "state": state}, seed=0)
    place = {"absolute": raw[0, :, :2], "relative": [1, 25] + raw[0, :, :2]}
    place["delta"] = [1, 25] + np.cumsum(raw[0, :, :2], axis=0)
    np.testing.assert_allclose(found, np.column_stack([place[mode], raw[0, :, 2]]), rtol=1e-5)
    (sample,) = network.seen[0]
    assert sample["lang"] == "robot, go now" and len(sample["image"]) == 5
    np.testing.assert_allclose(sample["state"], [*state, 0, 0, 0], rtol=1e-6)
    assert sample["action_mask"].tolist() == [True] * 3 + [False] * 2
    assert sample["image_mask"].tolist() == [True] * 4 + [False]


def test_images_are_transformed_as_in_evaluation_before_the_network_sees_them(echo):
    """Of two cameras with different sizes; the crop is the middle, and the resize comes after it."""
    transforms = [
        {"type": "crop", "fraction": 0.5, "filter": "nearest"},
        {"type": "resize", "height": 8, "width": 3, "filter": "nearest"},
    ]
    spec = replace(SPEC, image_transforms=transforms, image_size=((4, 8), (8, 4)))
    policy = Policy(echo.framework, spec, echo.normalizers)
    pixels = [np.arange(96, dtype=np.uint8).reshape(shape) for shape in ((4, 8, 3), (8, 4, 3))]
    images = [Image.fromarray(each) for each in pixels]
    policy.predict({**SEEN, "image": images}, seed=0)
    policy.attention({**SEEN, "image": images})
    whole = [
        each.resize(
            each.size,
            Image.Resampling.NEAREST,
            box=(each.width / 4, each.height / 4, 0.75 * each.width, 0.75 * each.height),
        )
        for each in images
    ]
    expected = [np.asarray(each.resize((3, 8), Image.Resampling.NEAREST)) for each in whole]
    for sample in (echo.framework.seen[0][0][0], echo.framework.seen[1][0]):
        for image, right in zip(sample["image"], expected, strict=True):
            np.testing.assert_array_equal(np.asarray(image), right)
    with pytest.raises(ValueError, match=r"'right' is \(8, 4\) \(width, height\), expected \(4, 8\)"):
        policy.predict({**SEEN, "image": [images[0], images[0]]}, seed=0)


# What an observation must be, in each direction.


@pytest.mark.parametrize("size", [(5, 4), (7, 4), (6, 3), (6, 5), (4, 6)])
@pytest.mark.parametrize("place", [0, 1])
def test_an_image_of_another_size_is_refused_whichever_way_it_differs(echo, size, place):
    images = list(SEEN["image"])
    images[place] = Image.new("RGB", size)
    named = f"'{SPEC.cameras[place]}' is \\({size[0]}, {size[1]}\\) \\(width, height\\), expected \\(6, 4\\)"
    with pytest.raises(ValueError, match=named):
        echo.predict({**SEEN, "image": images}, seed=0)
    assert echo.framework.seen == []


@pytest.mark.parametrize(
    "state, named",
    [
        (None, "has no 'state'; the policy reads x, y"),
        ([1.0], r"'state' has the shape \[1\], expected \[2\]: x, y"),
        ([1.0, 2.0, 3.0], r"'state' has the shape \[3\], expected \[2\]: x, y"),
        ([[1.0, 2.0]], r"'state' has the shape \[1, 2\], expected \[2\]: x, y"),
        (["1", "b"], "could not convert"),
    ],
)
@pytest.mark.parametrize("what", ["predict", "attention"])
def test_a_state_that_does_not_fit_is_refused(echo, state, named, what):
    call = {"predict": lambda seen: echo.predict(seen, seed=0), "attention": echo.attention}[what]
    with pytest.raises(ValueError, match=named):
        call({**SEEN, "state": state})
    assert echo.framework.seen == []


@pytest.mark.parametrize("change", [{}, {"lang": ""}, {"lang": " "}, {"lang": 7}, {"lang": None}], ids=str)
@pytest.mark.parametrize("prompt", ["{lang}", "robot, {lang} now"])
def test_an_observation_without_an_instruction_is_refused(echo, change, prompt):
    """Whatever the prompt puts around it."""
    policy = Policy(echo.framework, replace(SPEC, prompt=prompt), echo.normalizers)
    with pytest.raises(ValueError, match="observation: 'lang' must be a non-empty instruction"):
        policy.predict({name: SEEN[name] for name in ("image", "state")} | change, seed=0)
    assert echo.framework.seen == []


@pytest.mark.parametrize("name, value", [("action_dim", 2), ("state_dim", 1), ("horizon", 4)])
def test_weights_that_are_too_small_are_refused(name, value):
    network = Echo()
    setattr(network, name, value)
    with pytest.raises(ValueError, match=r"= \(3, 2, 5\), the weights have \(.*" + str(value)):
        Policy(network, SPEC, {})


def test_the_first_step_that_is_not_finite_is_named():
    chunk = np.zeros((1, 5, 3), np.float32)
    chunk[0, 2, 1], chunk[0, 4, 0] = np.nan, np.inf
    with pytest.raises(ValueError, match="^Net predicted numbers that are not finite at step 2 of its chunk"):
        check_predicted({"normalized_actions": chunk}, (5, 3), "Net")


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("more", [{}, {"other": 7}])
def test_a_chunk_of_any_floating_point_numbers_is_returned_as_it_is(dtype, more):
    chunk = np.arange(15, dtype=dtype).reshape(1, 5, 3)
    found = check_predicted({"normalized_actions": chunk, **more}, (5, 3), "Net")
    assert found.dtype == dtype and np.array_equal(found, chunk[0])


@pytest.mark.parametrize("shape", [(5, 4), (6, 3), (4, 3), (5, 2)])
def test_a_chunk_of_another_size_is_refused_whichever_way_it_differs(shape):
    with pytest.raises(ValueError, match=r"predicted float64 \[1, 5, 3\]; expected .*\[1, T, D\] = \[1, "):
        check_predicted({"normalized_actions": np.zeros((1, 5, 3))}, shape, "Net")


# Where a policy is loaded from, and onto what.


@pytest.mark.parametrize("other", ["0" * 16, "f" * 16])
def test_statistics_of_another_training_are_refused(two_datasets, other):
    checkpoint, spec = two_datasets
    with pytest.raises(
        ValueError, match=f"has the hash {spec.statistics_hash}, but .*policy.json was .* {other}"
    ):
        load_normalizers(checkpoint, replace(spec, statistics_hash=other))


def test_statistics_that_are_nowhere_are_named_with_both_places(two_datasets):
    checkpoint, spec = two_datasets
    (checkpoint.parents[1] / "dataset_statistics.json").unlink()
    with pytest.raises(FileNotFoundError, match=f"neither in {checkpoint} nor in {checkpoint.parents[1]};"):
        load_normalizers(checkpoint, spec)


def test_a_damaged_specification_of_a_second_robot_is_named(two_robots):
    checkpoint, *_ = two_robots
    path = checkpoint.parents[1] / "policies" / "second.json"
    path.write_text(path.read_text().replace('"horizon"', '"horizn"'))
    with pytest.raises(ValueError, match="policies/second.json.*horiz"):
        robot_spec(checkpoint, "second")


@pytest.mark.parametrize("device, threads", [("cpu", [3]), ("meta", []), ("aaa", [])])
def test_a_policy_is_moved_where_it_is_wanted_and_threads_are_set_for_a_cpu_alone(
    run, monkeypatch, device, threads
):
    moved, asked = [], []

    class Moved(Echo):
        action_dim, state_dim, horizon = 2, 2, 6

        def to(self, where):
            moved.append(where)
            return self

    spec = read_spec(run / "checkpoints/step_000006")
    Moved.horizon = spec.horizon
    monkeypatch.setattr(policy_module.Framework, "from_pretrained", lambda folder, **more: Moved())
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(policy_module, "get_setting", lambda name: {"launch.threads": "3"}[name])
    Policy.from_pretrained(run, device=device)
    assert (moved, asked) == ([device], threads)


def test_a_checkpoint_is_not_read_whole_unless_asked_for(run, monkeypatch):
    asked = []
    monkeypatch.setattr(policy_module, "check_checkpoint", lambda folder, *, verify: asked.append(verify))
    Policy.from_pretrained(run)
    assert asked == [False]


def test_a_fingerprint_is_of_names_and_contents_in_their_order(tmp_path):
    """Sixteen digits; the same content under another name, or one in place of the other, is another policy."""

    def fingerprint(**files):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for name, content in {"model.safetensors": "w", "framework.json": "f", **files}.items():
            path = folder / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return policy_module._fingerprint(folder, SPEC)

    different = [
        fingerprint(), fingerprint(vlm__a="1", vlm__b="2"), fingerprint(vlm__a="2", vlm__b="1"), fingerprint(vlm__c="1"),
        fingerprint(action_model__a="1", action_model__b="2"), fingerprint(vlm__deep__a="1", vlm__b="2"),
    ]  # fmt: skip
    assert len(set(different)) == len(different) and all(len(each) == 16 for each in different)
    assert (
        fingerprint(vlm__b="2", vlm__a="1") == different[1] and fingerprint(trainer__rng="1") == different[0]
    )
