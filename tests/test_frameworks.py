"""Every backbone with every framework: the same promises for all four pairs, and the equations written a second time."""

import json
import multiprocessing
import pickle
import shutil
import socket
from concurrent.futures import ProcessPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from vla_bench.models.backbones.tiny import write_tiny
from vla_bench.models.backbones.tiny_composed import write_tiny_component
from vla_bench.models.features import Features
from vla_bench.models.frameworks import framework as framework_module
from vla_bench.models.frameworks.build import build_framework
from vla_bench.models.frameworks.framework import Framework
from vla_bench.models.frameworks.gr00t import GR00T
from vla_bench.models.frameworks.gr00t import main as gr00t_main
from vla_bench.models.frameworks.oft import main as oft_main
from vla_bench.models.attention_map import attention_map
from vla_bench.models.heads.flow import sample_time
from vla_bench.models.heads.flow_matching import FlowMatchingHead
from vla_bench.models.heads.mlp import MLPHead
from vla_bench.registry import FRAMEWORKS

T, D, S = 4, 3, 2  # actions in a chunk, numbers in an action, numbers in a state
DIT = {"hidden_size": 32, "num_layers": 3, "num_heads": 4, "num_future_tokens": 2, "dropout": 0.0}
HEADS = {
    "OFT": {"type": "MLP", "hidden_size": 32, "num_queries": 2},
    "GR00T": {"type": "FlowMatching", **DIT, "repeated_diffusion_steps": 2},
}
BACKBONES = ("qwen2_5_vl", "paligemma")
PAIRS = [(backbone, name) for backbone in BACKBONES for name in HEADS]
GRIDS = {"qwen2_5_vl": (2, 2), "paligemma": (4, 4)}  # tokens of a picture of 64 x 64 pixels
WORDS = ("open the drawer", "press the button from the top", "pick up the red block and place it")
every_pair = pytest.mark.parametrize("pair", PAIRS, ids="-".join)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with one tiny checkpoint per backbone."""
    home = tmp_path_factory.mktemp("frameworks")
    sizes = {
        "image_size": 64,
        "hidden_size": 32,
        "num_layers": 2,
        "vision_hidden_size": 32,
        "vision_layers": 2,
    }
    for backbone in BACKBONES:
        write_tiny(backbone, home / backbone, corpus=WORDS, **sizes)
    return home


def configuration(home: Path, pair: tuple[str, str], **head) -> dict:
    backbone, name = pair
    vlm = {"base_vlm": str(home / backbone)}
    return {"name": name, "vlm": vlm, "action_horizon": T, "action_model": HEADS[name] | head}


def build(home: Path, pair: tuple[str, str], *, state_dim: int = S, **head) -> Framework:
    torch.manual_seed(0)
    model = build_framework(configuration(home, pair, **head), action_dim=D, state_dim=state_dim)
    # small random weights leave hidden states alike; larger ones let a leak show
    with torch.no_grad():
        for parameter in model.action_model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def sample(seed: int, lang: str, cameras: int = 2) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "image": [Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)) for _ in range(cameras)],
        "lang": lang,
        "action": rng.uniform(-1, 1, (T, D)).astype(np.float32),
        "action_is_pad": np.arange(T) >= T - seed % 3,
        "state": rng.normal(size=S).astype(np.float32),
        "origin": f"toy episode {seed} frame 7",
    }


EXAMPLES = [sample(i, words) for i, words in enumerate(WORDS)]
NOISE = torch.randn(len(EXAMPLES), T, D, generator=torch.Generator().manual_seed(5))


def predict(model: Framework, examples) -> np.ndarray:
    count = len(examples["lang"]) if isinstance(examples, dict) else len(examples)
    return model.predict_action(examples, noise=NOISE[:count])["normalized_actions"]


def loss_at(model: Framework, batch, time: float) -> float:
    """The loss with noise and time held fixed, which OFT does not read."""
    rows = len(batch["lang"]) * getattr(model.action_model, "repeats", 1)
    noise = torch.randn(rows, T, D, generator=torch.Generator().manual_seed(1))
    return float(model(batch, noise=noise, time=torch.full((rows,), time))["action_loss"].detach())


# --- all four pairs -------------------------------------------------------------------------------------------------


@every_pair
def test_every_trainable_parameter_receives_a_gradient(home, pair):
    model = build(home, pair)
    model(EXAMPLES)["action_loss"].backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert [n for n, p in trained.items() if p.grad is None or not p.grad.any()] == []
    assert not [n for n, p in trained.items() if not p.grad.isfinite().all()]
    assert {n.split(".")[0] for n in trained} >= {"vlm", "action_model"}
    assert [
        n for n, p in model.named_parameters() if not p.requires_grad
    ] == []  # the tiny models tie their lm_head


@every_pair
def test_alone_or_in_a_padded_batch_the_same_prediction(home, pair):
    model = build(home, pair)
    batch = model.prepare(EXAMPLES)
    assert (batch["inputs"]["attention_mask"] == 0).any(), "nothing was padded, so nothing would be tested"
    together = predict(model, batch)
    for i, example in enumerate(EXAMPLES):
        alone = model.predict_action([example], noise=NOISE[i : i + 1])["normalized_actions"]
        np.testing.assert_allclose(alone[0], together[i], atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 1e-3


@every_pair
def test_the_padding_side_does_not_matter(home, pair):
    model = build(home, pair)
    tokenizer = model.prepare.vlm.processor.tokenizer
    sides = {}
    for tokenizer.padding_side in ("left", "right"):
        batch = model.prepare(EXAMPLES)
        sides[tokenizer.padding_side] = predict(model, batch), batch["inputs"]["attention_mask"]
    assert not torch.equal(sides["left"][1], sides["right"][1])
    np.testing.assert_allclose(sides["left"][0], sides["right"][0], atol=1e-5)


@every_pair
def test_changing_a_padded_token_changes_nothing(home, pair):
    model = build(home, pair)
    batch = model.prepare(EXAMPLES)
    before, loss = predict(model, batch), loss_at(model, batch, 0.5)
    ids, mask = batch["inputs"]["input_ids"], batch["inputs"]["attention_mask"]
    other = ids[0][mask[0] == 1][-1]
    assert (ids[mask == 0] != other).all()
    ids[mask == 0] = other
    np.testing.assert_allclose(predict(model, batch), before, atol=1e-6)
    assert loss_at(model, batch, 0.5) == pytest.approx(loss, abs=1e-6)
    ids[0, mask[0].nonzero()[-1]] = ids[1][mask[1] == 1][-2]
    assert np.abs(predict(model, batch)[0] - before[0]).max() > 1e-5, "a valid token must change something"


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_dropped_attention_mask_would_be_noticed(home, backbone, monkeypatch):
    model = build(home, (backbone, "GR00T"))
    together = predict(model, EXAMPLES)
    honest = model.features
    ignored = lambda batch: Features(honest(batch).hidden, torch.ones_like(honest(batch).mask))
    monkeypatch.setattr(model, "features", ignored)
    assert np.abs(predict(model, EXAMPLES) - together).max() > 1e-4


@every_pair
def test_padded_actions_do_not_change_the_loss(home, pair):
    # At t = 0 the noisy chunk of flow matching is noise alone; later it holds the padded actions as input, as in GR00T.
    model = build(home, pair)
    assert EXAMPLES[1]["action_is_pad"].any()
    changed = []
    for example in EXAMPLES:
        action = np.where(example["action_is_pad"][:, None], 50.0, example["action"]).astype(np.float32)
        changed.append(example | {"action": action})
    batch, other = model.prepare(EXAMPLES), model.prepare(changed)
    assert not torch.equal(batch["actions"], other["actions"])
    assert loss_at(model, other, 0.0) == pytest.approx(loss_at(model, batch, 0.0), abs=1e-6)
    counted = model.prepare([e | {"action_is_pad": np.zeros(T, bool)} for e in changed])
    assert loss_at(model, counted, 0.0) > 10


@every_pair
def test_each_camera_the_words_and_the_state_are_read(home, pair):
    model = build(home, pair)
    example = EXAMPLES[0]
    before = predict(model, [example])
    first, second = example["image"]
    black = Image.new("RGB", (64, 64))
    changes = {
        "first camera": {"image": [black, second]},
        "second camera": {"image": [first, black]},
        "order of the cameras": {"image": [second, first]},
        "words": {"lang": WORDS[1]},
        "state": {"state": example["state"] + 1},
    }
    for what, change in changes.items():
        assert np.abs(predict(model, [example | change]) - before).max() > 1e-5, what


@every_pair
def test_saved_and_loaded_without_network_or_base_model(home, pair, tmp_path, monkeypatch):
    base = shutil.copytree(home / pair[0], tmp_path / "base")
    config = configuration(home, pair) | {"vlm": {"base_vlm": str(base)}}
    model = build_framework(config, action_dim=D, state_dim=S)
    with torch.no_grad():
        for parameter in model.parameters():  # away from what the base model holds
            parameter += 0.02 * torch.randn_like(parameter)
    expected = predict(model, EXAMPLES)
    model.save_pretrained(tmp_path / "saved")
    shutil.rmtree(base)

    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    loaded = Framework.from_pretrained(tmp_path / "saved")
    assert type(loaded) is type(model) and not loaded.training
    np.testing.assert_array_equal(predict(loaded, EXAMPLES), expected)
    assert {n: p.requires_grad for n, p in loaded.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }
    language = loaded.vlm.model
    assert language.get_output_embeddings().weight is language.get_input_embeddings().weight
    assert json.loads((tmp_path / "saved/framework.json").read_text())["name"] == pair[1]
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (
        tmp_path / "saved/model.safetensors"
    ).read_bytes()
    kinds = {p.suffix for p in (tmp_path / "saved").rglob("*") if p.is_file()}
    assert kinds <= {".safetensors", ".json", ".jinja", ".txt"}, kinds


@every_pair
def test_weights_that_do_not_fit_are_named(home, pair, tmp_path):
    model = build(home, pair)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    gone = next(n for n in weights if n.startswith("action_model."))
    save_file({n: w for n, w in weights.items() if n != gone}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=gone):
        Framework.from_pretrained(tmp_path)
    save_file(weights | {"stranger": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="stranger"):
        Framework.from_pretrained(tmp_path)
    save_file(weights | {gone: torch.zeros(7)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=gone):
        Framework.from_pretrained(tmp_path)


@every_pair
def test_one_batch_can_be_learnt_by_heart(home, pair):
    torch.manual_seed(0)
    model = build_framework(configuration(home, pair), action_dim=D, state_dim=S)
    examples = [e | {"action": np.tile(e["action"][:1], (T, 1))} for e in EXAMPLES]
    batch = model.prepare(examples)
    targets = batch["actions"].numpy()

    def error() -> float:
        return float(np.abs(predict(model, batch) - targets).mean())

    before = error()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(80):
        optimizer.zero_grad()
        model(batch)["action_loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert error() < 0.25 * before, (before, error())


class NoWeights(pickle.Pickler):
    """Fails on the first weight or module that would travel to a worker."""

    def persistent_id(self, obj):
        assert not isinstance(obj, torch.Tensor | torch.nn.Module), f"prepare holds a {type(obj).__name__}"


def test_prepare_in_a_worker_process_equals_prepare_here(home):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        for pair in PAIRS:
            prepare = build(home, pair).prepare
            NoWeights(BytesIO()).dump(prepare)
            here, again, there = prepare(EXAMPLES), prepare(EXAMPLES), pool.submit(prepare, EXAMPLES).result()
            for other in (again, there):
                assert list(other) == list(here) and other["origin"] == [e["origin"] for e in EXAMPLES]
                assert all(torch.equal(other["inputs"][n], t) for n, t in here["inputs"].items())
                for name in ("actions", "action_is_pad", "state"):
                    assert torch.equal(other[name], here[name]) and here[name].device.type == "cpu"


@every_pair
def test_no_vocabulary_logits_are_computed(home, pair):
    model, calls = build(home, pair), []
    model.vlm.model.get_output_embeddings().register_forward_hook(lambda *_: calls.append(1))
    model(EXAMPLES)["action_loss"].backward()
    predict(model, EXAMPLES)
    model.attention_maps(EXAMPLES)
    assert calls == []
    inputs = model.prepare(EXAMPLES)["inputs"]
    model.vlm.lm_loss(inputs, inputs["input_ids"])
    assert calls == [1]  # the counter counts


@every_pair
def test_predicting_leaves_the_mode_and_ignores_dropout(home, pair):
    dropout = {"dropout": 0.5} if pair[1] == "GR00T" else {}
    model = build(home, pair, **dropout)
    model.eval()
    expected = predict(model, EXAMPLES)
    model.train()
    np.testing.assert_array_equal(predict(model, EXAMPLES), expected)
    model.attention_maps(EXAMPLES)
    assert all(module.training for module in model.modules())


@every_pair
def test_a_loss_in_bfloat16_is_computed_in_float32(home, pair):
    model = build(home, pair)
    batch = model.prepare(EXAMPLES)
    full = loss_at(model, batch, 0.3)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(batch)["action_loss"]
        half = loss_at(model, batch, 0.3)
    assert loss.dtype == torch.float32 and loss.isfinite()
    assert half == pytest.approx(full, rel=0.05)


# --- where it looks -------------------------------------------------------------------------------------------------


@every_pair
def test_attention_maps_are_shares_of_pictures_and_words(home, pair):
    model = build(home, pair)
    maps = model.attention_maps(EXAMPLES, generator=torch.Generator().manual_seed(0))
    assert len(maps) == len(EXAMPLES)
    for example, found in zip(EXAMPLES, maps):
        assert [m.shape for m in found.images] == [GRIDS[pair[0]]] * 2
        assert all(m.dtype == np.float32 and (m >= 0).all() for m in found.images)
        assert [word for word, _ in found.words] == example["lang"].split()
        assert all(share >= 0 for _, share in found.words)
        total = sum(m.sum() for m in found.images) + sum(share for _, share in found.words)
        assert 0.1 < total <= 1 + 1e-5
    assert np.abs(maps[0].images[0] - maps[0].images[1]).max() > 0  # not one number for everything


@pytest.mark.parametrize("backbone", BACKBONES)
def test_attention_is_sorted_into_the_right_patch_and_word(home, backbone):
    model = build(home, (backbone, "GR00T"))
    batch = model.prepare(EXAMPLES)
    ids, rows, columns = batch["inputs"]["input_ids"], *GRIDS[backbone]
    weights = torch.zeros(ids.shape)
    patches = (ids[1] == model.vlm.config.image_token_id).nonzero().flatten()
    weights[1, patches[rows * columns + columns]] = 0.5  # second camera, second row, first column
    tokenizer = model.prepare.vlm.processor.tokenizer
    button = [i for i, token in enumerate(ids[1].tolist()) if tokenizer.decode([token]).strip() == "button"]
    assert len(button) == 1
    weights[1, button[0]] = 0.25
    found = attention_map(model.vlm, batch["inputs"], batch["lang"], weights)
    expected = np.zeros((rows, columns), np.float32)
    expected[1, 0] = 0.5
    np.testing.assert_array_equal(found[1].images[1], expected)
    assert not found[1].images[0].any() and not any(m.any() for m in found[0].images)
    assert found[1].words == [(w, 0.25 if w == "button" else 0.0) for w in WORDS[1].split()]


def test_pictures_of_different_sizes_have_maps_of_different_sizes(home):
    model = build(home, ("qwen2_5_vl", "OFT"))
    example = EXAMPLES[0] | {"image": [Image.new("RGB", (64, 32)), Image.new("RGB", (64, 64))]}
    assert [m.shape for m in model.attention_maps([example])[0].images] == [(1, 2), (2, 2)]


# --- refused, with what to write instead ------------------------------------------------------------------------------


@every_pair
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": np.zeros(S + 1, np.float32)}, r"state has 3 numbers.*built for 2"),
        ({"state": None}, r"state has 0 numbers"),
        (
            {"action": np.zeros((T + 1, D), np.float32), "action_is_pad": np.zeros(T + 1, bool)},
            r"action_horizon",
        ),
        ({"image": EXAMPLES[0]["image"][:1]}, r"1 picture.*2"),
        ({"action": None, "action_is_pad": None}, r"'action' is missing"),
        ({"lang": " "}, r"'lang'"),
    ],
    ids=["state", "no state", "horizon", "cameras", "no action", "no words"],
)
def test_a_sample_that_does_not_fit_is_named(home, pair, change, message):
    model = build(home, pair)
    odd = {k: v for k, v in (EXAMPLES[1] | change).items() if v is not None}
    with pytest.raises(ValueError, match=f"toy episode 1 frame 7.*{message}"):
        model.prepare([EXAMPLES[0], odd])
    odd.pop("origin")
    with pytest.raises(ValueError, match="sample 1 of the batch"):
        model.prepare([EXAMPLES[0], odd])


def test_actions_in_some_samples_only_are_refused(home):
    model = build(home, ("qwen2_5_vl", "OFT"))
    bare = {k: v for k, v in EXAMPLES[0].items() if k not in ("action", "action_is_pad")}
    with pytest.raises(ValueError, match="toy episode 0 frame 7.*'action' is missing"):
        model.prepare([bare, EXAMPLES[1]])
    with pytest.raises(ValueError, match="training needs 'action'"):
        model([bare])
    assert predict(model, [bare]).shape == (1, T, D)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "GROOT"}, "did you mean 'GR00T'"),
        ({"acton_model": {}}, "did you mean 'action_model'"),
        ({"action_model": {"type": "MPL"}}, "did you mean 'MLP'"),
        ({"action_model": {"type": "MLP", "num_querys": 2}}, "did you mean 'num_queries'"),
        (
            {"action_model": {"type": "FlowMatching"}},
            "framework.name to one of .*GR00T.*action_model.type to 'MLP'",
        ),
        ({"name": "GR00T"}, "framework.name to one of .*OFT.*action_model.type to 'FlowMatching'"),
        ({"vlm": {"base_vllm": "x"}}, "did you mean 'base_vlm'"),
        ({"vlm": {"base_vlm": "x", "projector": {"type": "MLP"}}}, "remove one or the other"),
        ({"vlm": {"projector": {"type": "MLP"}}}, "vision_backbone, llm_backbone are missing"),
        ({"prompt": "{lnag}"}, "did you mean 'lang'"),
        ({"embodiments": ["a", "b"]}, "MLPHead has no encoders of its own"),
        ({"max_action_dim": 2}, "framework.max_action_dim is 2"),
        ({"frezee_projector": True}, "did you mean 'freeze_projector'"),
        ({"vlm": {"base_vlm": "x", "atn_implementation": "sdpa"}}, "did you mean 'attn_implementation'"),
        ({"vlm": {"base_vlm": "x", "dtype": "bf16"}}, "framework.vlm.dtype is 'bf16'"),
        ({"vlm": {"base_vlm": "x", "hidden_states": "raw"}}, "final or residual"),
        ({"vlm": "Qwen/Qwen2.5-VL-3B-Instruct"}, "framework.vlm is a section"),
        ({"action_model": "MLP"}, "framework.action_model is a section"),
        ({"freeze_vlm_backbone": "false"}, "freeze_vlm_backbone takes true or false, got 'false'"),
        ({"max_action_dim": "32"}, "max_action_dim takes a whole number"),
        ({"embodiments": "bridge"}, "embodiments takes a list"),
        ({"embodiments": ["a", "a"]}, "names one twice"),
        ({"name_mapping": {"vlm": "model"}}, "needs framework.pretrained_name_or_path"),
        ({"action_horizon": None}, "framework.action_horizon"),
        ({"action_horizon": 2.5}, "framework.action_horizon"),
        ({"action_horizon": 0}, "framework.action_horizon"),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value)),
)
def test_a_wrong_configuration_is_refused_before_the_backbone_is_loaded(home, change, message, monkeypatch):
    def refuse(*path, **options):
        raise AssertionError("the backbone was loaded")

    monkeypatch.setattr(framework_module, "load_vlm", refuse)
    config = configuration(home, ("qwen2_5_vl", "OFT"))
    if (
        isinstance(change.get("vlm"), dict)
        and change["vlm"].get("base_vlm") == "x"
        and "projector" not in change["vlm"]
    ):
        change = {"vlm": change["vlm"] | {"base_vlm": config["vlm"]["base_vlm"]}}
    config |= change
    with pytest.raises(ValueError, match=message):  # a RegistryError is one
        build_framework(config, action_dim=D, state_dim=S)


@pytest.mark.parametrize(
    ("head", "message"),
    [({"num_queries": 3}, "must divide the horizon 4"), ({"horizon": 4}, "set from the backbone")],
)
def test_a_head_is_refused_by_its_own_rules(home, head, message):
    with pytest.raises(ValueError, match=message):
        build(home, ("qwen2_5_vl", "OFT"), **head)


def test_an_inference_model_replaces_code_and_keeps_the_weights(home, tmp_path):
    config = configuration(home, ("qwen2_5_vl", "GR00T"))
    twin = {"action_model": {"type": "FlowMatchingInference"}}
    torch.manual_seed(0)
    model = build_framework(config | {"inference_model": twin}, action_dim=D, state_dim=S)
    model.save_pretrained(tmp_path)
    trained, used = (Framework.from_pretrained(tmp_path, inference=flag) for flag in (False, True))
    assert [type(m.action_model).__name__ for m in (trained, used)] == [
        "FlowMatchingHead",
        "FlowMatchingInferenceHead",
    ]
    np.testing.assert_allclose(predict(used, EXAMPLES), predict(trained, EXAMPLES), atol=1e-5)
    with pytest.raises(ValueError, match="FlowMatchingInference"):
        used(EXAMPLES)
    plain = build_framework(
        config, action_dim=D, state_dim=S
    )  # without one, the model is used as it was trained
    plain.save_pretrained(tmp_path)
    assert type(Framework.from_pretrained(tmp_path, inference=True).action_model) is FlowMatchingHead


@pytest.mark.parametrize(
    ("inference", "message"),
    [
        ({"action_model": {"type": "FlowMatchingInferense"}}, "did you mean 'FlowMatchingInference'"),
        ({"acton_model": {}}, "framework.inference_model.*did you mean 'action_model'"),
        ({"action_model": {"type": "MLP"}}, "GR00T provides 'last'"),
        ({"action_model": {"hidden_size": 64}}, "must have the weights of the head that is trained"),
        ({"action_model": {"type": "Transformer", "dropout": 0.0}}, "Transformer.* takes no argument"),
        ({"action_model": None}, "is a section of what differs"),
        ({"vlm": {"dtype": "bfloat"}}, "inference_model.vlm.dtype.*did you mean 'bfloat16'"),
        ({"vlm": {"attn_implementation": "flash_attention"}}, "did you mean 'flash_attention_"),
    ],
    ids=["type", "part", "reads", "shapes", "other head", "empty", "dtype", "attention"],
)
def test_a_wrong_inference_model_is_refused_before_training(home, inference, message):
    config = configuration(home, ("qwen2_5_vl", "GR00T")) | {"inference_model": inference}
    with pytest.raises(ValueError, match=message):
        build_framework(config, action_dim=D, state_dim=S)


def test_weights_of_others_are_loaded_by_prefix_and_parts_are_frozen(home, tmp_path, capsys):
    config = configuration(home, ("qwen2_5_vl", "GR00T"))
    source = build_framework(config, action_dim=D, state_dim=S)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    names = {"vlm.model": "backbone.net", "action_model": "head"}
    theirs = {}
    for name, weight in source.state_dict().items():
        ours = next(prefix for prefix in names if name.startswith(prefix + "."))
        theirs[names[ours] + name.removeprefix(ours)] = weight.clone()
    save_file(theirs, tmp_path / "model.safetensors")
    more = {"pretrained_name_or_path": str(tmp_path), "name_mapping": names}
    frozen = {"freeze_vision_backbone": True, "freeze_vla_head": True}
    model = build_framework(config | more | frozen, action_dim=D, state_dim=S)
    np.testing.assert_array_equal(predict(model, EXAMPLES), predict(source, EXAMPLES))
    assert "loaded" in capsys.readouterr().out
    assert {n.split(".visual.")[0] for n, p in model.named_parameters() if not p.requires_grad} <= {
        "vlm.model.model",
        *(n for n, _ in model.named_parameters() if n.startswith("action_model.")),
    }
    assert any(p.requires_grad for p in model.component("llm_backbone"))
    assert not any(p.requires_grad for p in model.component("vision_backbone"))
    assert not any(p.requires_grad for p in model.action_model.parameters())
    with pytest.raises(ValueError, match="head"):
        build_framework(config | more | {"name_mapping": {"action_model": "heda"}}, action_dim=D, state_dim=S)
    with pytest.raises(ValueError, match="projector"):
        build_framework(config | {"freeze_projectr": True}, action_dim=D, state_dim=S)


def test_a_model_wider_than_the_robot_counts_only_what_the_robot_has(home):
    wide = {"max_action_dim": D + 4, "max_state_dim": S + 3}
    torch.manual_seed(0)
    model = build_framework(configuration(home, ("paligemma", "GR00T")) | wide, action_dim=D, state_dim=S)
    head, batch = model.action_model, model.prepare(EXAMPLES)
    assert (head.action_dim, head.state_dim, batch["actions"].shape[-1]) == (D + 4, S + 3, D + 4)
    rows = len(EXAMPLES) * head.repeats
    noise, time = torch.randn(rows, T, D + 4), torch.full((rows,), 0.0)
    before = model(batch, noise=noise, time=time)["action_loss"]
    batch["actions"][..., D:] = 9.0  # numbers that no robot sent
    torch.testing.assert_close(model(batch, noise=noise, time=time)["action_loss"], before)
    predicted = model.predict_action(EXAMPLES, noise=torch.randn(len(EXAMPLES), T, D + 4))[
        "normalized_actions"
    ]
    assert predicted.shape == (len(EXAMPLES), T, D)


def test_robots_have_encoders_of_their_own(home):
    known = {"embodiments": ["bridge", "libero"]}
    torch.manual_seed(0)
    model = build_framework(configuration(home, ("qwen2_5_vl", "GR00T")) | known, action_dim=D, state_dim=S)
    first, second = ([e | {"dataset": name} for e in EXAMPLES] for name in known["embodiments"])
    assert np.abs(predict(model, first) - predict(model, second)).max() > 1e-3
    mixed = predict(model, [first[0], second[1], first[2]])
    np.testing.assert_allclose(mixed[1], predict(model, second)[1], atol=1e-5)
    with pytest.raises(ValueError, match="toy episode 0.*did you mean 'libero'"):
        model([e | {"dataset": "liberro"} for e in EXAMPLES])


@pytest.mark.parametrize("name", ["FAST", "OpenVLA"])
def test_heads_that_speak_may_be_wider_than_the_robot(home, name):
    vlm = {"base_vlm": str(home / "qwen2_5_vl")}
    head = {"type": "Bins"} if name == "OpenVLA" else {"type": "FAST"}
    config = {"name": name, "vlm": vlm, "action_horizon": T, "action_model": head | {"first_token_id": 0}}
    model = build_framework(config | {"max_action_dim": D + 2}, action_dim=D, state_dim=0)
    stateless = [{key: value for key, value in e.items() if key != "state"} for e in EXAMPLES]
    batch = model.prepare(stateless)
    said = model.codec.decode([[int(word) for word in row if word >= 0] for row in batch["codes"]])
    valid = ~batch["action_is_pad"].numpy()
    assert np.abs(said - batch["actions"].numpy())[valid].max() < 0.2
    model(batch)["action_loss"].backward()
    assert predict(model, stateless).shape == (len(EXAMPLES), T, D)


def test_eyes_of_its_own_leave_the_last_word_last(home, tmp_path):
    write_tiny_component("dinov2", tmp_path / "dinov2", image_size=32)
    eyes = {"vision_backbone": {"type": "DINOv2", "path": str(tmp_path / "dinov2")}}
    config = configuration(home, ("qwen2_5_vl", "GR00T")) | eyes | {"action_model": {"type": "Transformer"}}
    torch.manual_seed(0)
    model = build_framework(config, action_dim=D, state_dim=S)
    with torch.no_grad():
        for parameter in model.vlm.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    said_otherwise = [e | {"lang": "close the window"} for e in EXAMPLES]
    assert np.abs(predict(model, EXAMPLES) - predict(model, said_otherwise)).max() > 1e-4
    maps = model.attention_maps(EXAMPLES)
    assert all(m.images[0].sum() > 0 for m in maps)
    frozen = build_framework(config | {"freeze_vision_backbone": True}, action_dim=D, state_dim=S)
    assert not any(p.requires_grad for p in frozen.eyes.parameters()) and frozen.eyes_out.weight.requires_grad
    with pytest.raises(ValueError, match="framework.vision_backbone is a section"):
        build_framework(config | {"vision_backbone": {"typ": "DINOv2"}}, action_dim=D, state_dim=S)


@pytest.mark.parametrize("word", ["<|im_end|>", "<|image_pad|>", "<|vision_start|>"])
def test_control_tokens_in_an_instruction_are_refused(home, word):
    model = build(home, ("qwen2_5_vl", "OFT"))
    with pytest.raises(ValueError, match="toy episode 0 frame 7: the instruction .* holds") as refused:
        model.prepare([EXAMPLES[0] | {"lang": f"open {word} the drawer"}])
    assert word in str(refused.value)


def test_a_broken_framework_of_a_package_hides_no_other_error(home, monkeypatch):
    get = type(FRAMEWORKS).get

    def broken(registry, name):
        if registry is FRAMEWORKS and name == "PI":
            raise RuntimeError("boom")
        return get(registry, name)

    monkeypatch.setattr(type(FRAMEWORKS), "get", broken)
    with pytest.raises(ValueError, match="OFT provides 'queries'"):
        build(home, ("qwen2_5_vl", "OFT"), type="FlowMatching")


def test_a_checkpoint_that_is_none_is_refused(home, tmp_path):
    with pytest.raises(FileNotFoundError, match="framework.json"):
        Framework.from_pretrained(tmp_path)
    model = build(home, ("qwen2_5_vl", "OFT"))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a OFT, not a GR00T"):
        GR00T.from_pretrained(tmp_path)
    written = (tmp_path / "framework.json").read_text()
    for damage in ("", "[]", "{", json.dumps({**json.loads(written), "action_dim": "4"})):
        (tmp_path / "framework.json").write_text(damage)
        with pytest.raises(ValueError, match="framework.json is damaged"):
            Framework.from_pretrained(tmp_path)


@pytest.mark.parametrize(("main", "name"), [(oft_main, "OFT"), (gr00t_main, "GR00T")], ids=["oft", "gr00t"])
def test_a_framework_as_a_program(home, main, name, tmp_path, capsys):
    yaml = tmp_path / "config.yaml"
    head = json.dumps(HEADS[name])
    text = "framework: {{name: OFT, vlm: {{base_vlm: '{}'}}, action_horizon: 4, action_model: {}}}"
    yaml.write_text(text.format(home / "qwen2_5_vl", head))
    main(["--config_yaml", str(yaml)])
    printed = capsys.readouterr().out
    assert f"{name}: 4 actions" in printed and "loss" in printed and "prediction [1, 4, 7]" in printed
    yaml.write_text(text.format(tmp_path / "nowhere", head))
    with pytest.raises(SystemExit) as stop:
        main(["--config_yaml", str(yaml)])
    assert stop.value.code == 2
    assert "python -m vla_bench.models.backbones.tiny" in capsys.readouterr().err


# --- flow matching, written a second time from the equations ----------------------------------------------------------


def mlp(weights, name: str, x: np.ndarray, activation) -> np.ndarray:
    return linear(weights, f"{name}.2", activation(linear(weights, f"{name}.0", x)))


def linear(weights, name: str, x: np.ndarray) -> np.ndarray:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def relu(x):
    return np.maximum(x, 0)


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def norm(x: np.ndarray, eps: float) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)


def attend(weights, name: str, x, context, mask, heads: int) -> tuple[np.ndarray, np.ndarray]:
    """One sample: [N, W] looks at [M, H] where `mask` is true; also the shares [heads, N, M]."""
    q, k, v = (linear(weights, f"{name}.to_{n}", y) for n, y in (("q", x), ("k", context), ("v", context)))
    width, out, shares = q.shape[1] // heads, [], []
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        share = np.zeros((len(x), len(context)))
        scores = q[:, part] @ k[mask][:, part].T / np.sqrt(width)
        scores = np.exp(scores - scores.max(1, keepdims=True))
        share[:, mask] = scores / scores.sum(1, keepdims=True)
        shares.append(share)
        out.append(share @ v[:, part])
    return linear(weights, f"{name}.to_out", np.concatenate(out, 1)), np.stack(shares)


def velocity(weights, x, t: float, hidden, mask, state) -> tuple[np.ndarray, list[np.ndarray]]:
    """GR00T N1's action head for one sample: v [T, D] and the shares of every cross-attention, [heads, T, L]."""
    heads, width, horizon = DIT["num_heads"], DIT["hidden_size"], len(x)
    bucket = int(np.floor(np.float32(t) * np.float32(1000)))
    # AdaLN's time: diffusers' Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=1)
    angles = bucket * 10000.0 ** (-np.arange(128) / 127)
    time = mlp(weights, "dit.time.layers", np.concatenate([np.cos(angles), np.sin(angles)]), silu)
    # the action encoder's time: sines first, and half the width frequencies that stop short of 1/10000
    angles = bucket * 10000.0 ** (-np.arange(width // 2) / (width // 2))
    when = np.tile(np.concatenate([np.sin(angles), np.cos(angles)]), (horizon, 1))
    actions = mlp(weights, "action_time", np.concatenate([linear(weights, "action_in", x), when], 1), silu)
    tokens = np.concatenate(
        [
            mlp(weights, "state_encoder", state[None], relu),
            weights["future_tokens"],
            actions + weights["positions"],
        ]
    )
    shares = []
    for i in range(DIT["num_layers"]):
        name = f"dit.blocks.{i}"
        scale, shift = np.split(linear(weights, f"{name}.adapt", silu(time)), 2)
        y = norm(tokens, 1e-5) * (1 + scale) + shift
        if i % 2 == 0:
            y, share = attend(weights, f"{name}.attention", y, hidden, mask, heads)
            shares.append(share[:, -horizon:])
        else:
            y, _ = attend(weights, f"{name}.attention", y, y, np.ones(len(y), bool), heads)
        tokens = tokens + y
        inner = gelu(linear(weights, f"{name}.feed_forward.0", norm(tokens, 1e-5)))
        tokens = tokens + linear(weights, f"{name}.feed_forward.3", inner)
    shift, scale = np.split(linear(weights, "dit.out_adapt", silu(time)), 2)
    out = linear(weights, "dit.out", norm(tokens, 1e-6) * (1 + scale) + shift)
    return mlp(weights, "action_out", out[-horizon:], relu), shares


@pytest.fixture
def flow():
    """A head with weights of ordinary size, its weights as float64 arrays, and two observations, one padded."""
    torch.manual_seed(0)
    head = FlowMatchingHead(
        input_size=6,
        action_dim=D,
        horizon=T,
        state_dim=S,
        repeated_diffusion_steps=3,
        num_inference_timesteps=5,
        **DIT,
    )
    with torch.no_grad():
        for parameter in head.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    mask = torch.tensor([[True] * 5, [False, False, True, True, True]])
    features, state = Features(torch.randn(2, 5, 6), mask), torch.randn(2, S)
    weights = {n: w.double().numpy() for n, w in head.state_dict().items()}
    observations = [
        (features.hidden[b].double().numpy(), mask[b].numpy(), state[b].double().numpy()) for b in range(2)
    ]
    return head, weights, features, state, observations


def test_flow_matching_loss_equals_the_equations(flow):
    head, weights, features, state, observations = flow
    actions, is_pad = torch.randn(2, T, D), torch.tensor([[False] * T, [False, False, True, True]])
    noise, time = torch.randn(6, T, D), torch.tensor([0.0, 0.13, 0.5, 0.77, 0.9985, 0.31])
    squares = []
    for row in range(6):  # the repeats lie behind each other
        a, n, t = actions[row % 2].double().numpy(), noise[row].double().numpy(), float(time[row])
        found, _ = velocity(weights, (1 - t) * n + t * a, t, *observations[row % 2])
        squares += [(found[i] - (a - n)[i]) ** 2 for i in range(T) if not is_pad[row % 2, i]]
    loss = head.loss(features, actions, is_pad, state, noise=noise, time=time)["action_loss"]
    assert float(loss.detach()) == pytest.approx(np.mean(squares), rel=1e-5)


def test_flow_matching_sampler_and_attention_equal_the_equations(flow):
    head, weights, features, state, observations = flow
    noise = torch.randn(2, T, D)
    kept = noise.clone()
    with torch.no_grad():
        found, looks = head.sample(features, state, noise=noise), head.attention(features, state, noise=noise)
    assert torch.equal(noise, kept), "the caller's noise was changed"
    for b, observation in enumerate(observations):
        x, shares = noise[b].double().numpy(), []
        for k in range(5):
            v, maps = velocity(weights, x, k / 5, *observation)
            x, shares = x + v / 5, shares + maps
        np.testing.assert_allclose(found[b].numpy(), x, atol=1e-5)
        np.testing.assert_allclose(looks[b].numpy(), np.mean(shares, axis=(0, 1, 2)), atol=1e-5)


def test_the_norms_have_the_epsilons_of_the_original(flow):
    # An epsilon shows only where the variance is as small: everything that is added to a token is shrunk.
    head, weights, features, state, observations = flow
    small = ("future_tokens", "positions", "state_encoder.2", "action_time.2", "to_out", "feed_forward.3")
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            parameter *= 1e-2 if any(part in name for part in small) else 1
    weights = {n: w.double().numpy() for n, w in head.state_dict().items()}
    noise = torch.randn(2, T, D)
    with torch.no_grad():
        found, _ = head.velocity(noise, torch.tensor([0.2, 0.2]), features, state)
    for b, observation in enumerate(observations):
        expected, _ = velocity(weights, noise[b].double().numpy(), 0.2, *observation)
        np.testing.assert_allclose(found[b].numpy(), expected, atol=1e-5)


def test_an_observation_without_a_valid_token_gives_no_nan(flow):
    head, _, features, state, _ = flow
    blind = Features(features.hidden, torch.tensor([[True] * 5, [False] * 5]))
    actions, is_pad = torch.randn(2, T, D), torch.tensor([[False] * T, [True] * T])
    loss = head.loss(blind, actions, is_pad, state)["action_loss"]
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in head.parameters())
    with torch.no_grad():
        looks = head.attention(blind, state)
        assert head.sample(blind, state).isfinite().all()
    assert looks.isfinite().all() and not looks[1].any()
    torch.testing.assert_close(looks[0].sum(), torch.tensor(1.0))


def test_noise_and_time_of_the_wrong_shape_are_refused(flow):
    head, _, features, state, _ = flow
    one = Features(features.hidden[:1], features.mask[:1])
    actions, is_pad, noise = torch.randn(1, T, D), torch.zeros(1, T, dtype=torch.bool), torch.randn(3, T, D)
    with pytest.raises(
        ValueError, match=r"noise is \[1, 4, 3\], expected \[3, 4, 3\].*repeated_diffusion_steps"
    ):
        head.loss(one, actions, is_pad, state[:1], noise=noise[:1], time=torch.rand(3))
    with pytest.raises(ValueError, match=r"time is \[1\], expected \[3\]"):
        head.loss(one, actions, is_pad, state[:1], noise=noise, time=torch.rand(1))
    with pytest.raises(ValueError, match=r"noise is \[1, 4, 3\], expected \[2, 4, 3\]"):
        head.sample(features, state, noise=noise[:1])


@pytest.mark.parametrize("name", ["num_layers", "repeated_diffusion_steps", "num_inference_timesteps"])
def test_a_head_that_could_do_nothing_is_refused(name):
    with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
        FlowMatchingHead(input_size=6, action_dim=D, horizon=T, state_dim=S, **(DIT | {name: 0}))


def test_times_are_drawn_in_float32_under_mixed_precision():
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        times = sample_time(100_000)
    assert times.dtype == torch.float32 and 0 <= times.min() and times.max() <= 1
    assert len((times * 1000).long().unique()) > 990  # bfloat16 reaches 501
    assert float((times < 0.1).float().mean()) == pytest.approx(1 - (0.999 * 0.9) ** 1.5, abs=0.005)


def test_the_mlp_head_is_linear_gelu_linear_on_its_query():
    torch.manual_seed(0)
    head = MLPHead(input_size=6, action_dim=D, horizon=T, state_dim=0, num_queries=2, hidden_size=5)
    hidden = torch.randn(2, 7, 6)
    features = Features(hidden, torch.ones(2, 7, dtype=torch.bool), num_extra=3)
    w = head.state_dict()
    expected = torch.empty(2, T, D)
    for b in range(2):
        for k in range(2):
            x = hidden[b, 5 + k] @ w["layers.0.weight"].T + w["layers.0.bias"]
            x = 0.5 * x * (1 + torch.erf(x / 2**0.5))
            expected[b, 2 * k : 2 * k + 2] = (x @ w["layers.2.weight"].T + w["layers.2.bias"]).reshape(2, D)
    found = head.sample(features)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    actions, is_pad = (
        torch.randn(2, T, D),
        torch.tensor([[False, False, False, True], [False, True, True, True]]),
    )
    valid = [(found[b, t] - actions[b, t]).abs() for b in range(2) for t in range(T) if not is_pad[b, t]]
    loss = head.loss(features, actions, is_pad)["action_loss"]
    torch.testing.assert_close(loss, torch.cat(valid).mean())
