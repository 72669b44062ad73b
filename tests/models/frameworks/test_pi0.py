"""π0 and π0.5 against their figure: one sequence, one attention over all of it, written a second time."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from scipy import stats
from torch import Tensor
from torch.nn import functional as F

from vla_bench.models.backbones.tiny import write_tiny
from vla_bench.models.features import BackboneSizes, Features
from vla_bench.models.frameworks.build import build_framework
from vla_bench.models.frameworks.framework import Framework
from vla_bench.models.frameworks.pi0 import main as pi0_main
from vla_bench.models.frameworks.pi05 import main as pi05_main
from vla_bench.models.heads.action_expert import ActionExpertHead, sample_time
from vla_bench.models.layers.expert import AdaptiveRMSNorm, ExpertLayer

T, D, S, CAMERAS = 4, 3, 2, 2  # actions in a chunk, numbers in an action, numbers in a state, pictures
EXPERT = {"type": "ActionExpert", "hidden_size": 24, "intermediate_size": 48, "num_heads": 4}
NAMES = ("PI0", "PI05")
WORDS = ("open the drawer", "press the button from the top", "pick up the red block and place it")
both = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with one tiny checkpoint per backbone."""
    home = tmp_path_factory.mktemp("pi0")
    sizes = {
        "image_size": 64,
        "hidden_size": 32,
        "num_layers": 2,
        "vision_hidden_size": 32,
        "vision_layers": 1,
    }
    for backbone in ("paligemma", "qwen2_5_vl", "qwen3_vl"):
        write_tiny(backbone, home / backbone, corpus=WORDS, **sizes)
    return home


def configuration(home: Path, name: str, backbone: str = "paligemma", **changes) -> dict:
    head = EXPERT | {"adaptive_norm": name == "PI05"}
    vlm = {"base_vlm": str(home / backbone)}
    return {"name": name, "vlm": vlm, "action_horizon": T, "action_model": head} | changes


def build(home: Path, name: str, backbone: str = "paligemma", *, spread: float = 0.1, **changes) -> Framework:
    torch.manual_seed(0)
    model = build_framework(configuration(home, name, backbone, **changes), action_dim=D, state_dim=S)
    with torch.no_grad():  # freshly initialised models attend alike to everything; these do not
        for parameter in model.parameters():
            parameter += spread * torch.randn_like(parameter)
    return model.eval()


def sample(seed: int, lang: str, image_mask: tuple[bool, ...] | None = None) -> dict:
    rng = np.random.default_rng(seed)
    made = {
        "image": [Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)) for _ in range(CAMERAS)],
        "lang": lang,
        "action": rng.uniform(-1, 1, (T, D)).astype(np.float32),
        "action_is_pad": np.arange(T) >= T - seed % 3,
        "state": rng.uniform(-1, 1, S).astype(np.float32),
        "origin": f"toy episode {seed} frame 7",
    }
    return made if image_mask is None else made | {"image_mask": np.array(image_mask)}


EXAMPLES = [sample(i, words) for i, words in enumerate(WORDS)]
HALF_BLIND = [sample(0, WORDS[0], (True, False)), sample(1, WORDS[1], (False, True)), sample(2, WORDS[2])]
NOISE = torch.randn(len(EXAMPLES), T, D, generator=torch.Generator().manual_seed(5))
TIME = torch.tensor([0.15, 0.5, 0.95])


def predict(model: Framework, examples, noise: Tensor = NOISE) -> np.ndarray:
    return model.predict_action(examples, noise=noise)["normalized_actions"]


# --- the figure, literally ------------------------------------------------------------------------------------------


def turned(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotary positions as complex numbers: pairs (j, j + d/2) turned by p · theta^(-2j/d)."""
    first, second = x.double().chunk(2, dim=-1)
    angle = positions[:, None, :, None] * theta ** (-torch.arange(first.shape[-1]).double() / first.shape[-1])
    z = torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([z.real, z.imag], dim=-1)


class Figure:
    """π0 or π0.5 in float64, from a model's weights alone: nothing is cached, every layer runs the whole sequence."""

    def __init__(self, model: Framework, batch: dict, *, shift: int = 0, see_everything: bool = False):
        self.w = {name: value.double() for name, value in model.state_dict().items()}
        self.adaptive, inputs = "action_model.norm.dense.weight" in self.w, batch["inputs"]
        self.text, self.layers = model.vlm.text_config, model.vlm.text_config.num_hidden_layers
        self.state, ids = batch["state"].double(), inputs["input_ids"]
        self.prefix = F.embedding(ids, self.w[f"{VLM}embed_tokens.weight"]) * math.sqrt(model.vlm.hidden_size)
        is_image = ids == model.vlm.config.image_token_id
        with torch.no_grad():
            pictures = model.vlm.model.model.get_image_features(inputs["pixel_values"]).pooler_output
        self.prefix[is_image] = pictures.flatten(0, 1).double()
        written = inputs["attention_mask"].bool()
        self.valid = written.clone()
        for row, cameras in enumerate(inputs.get("image_mask", torch.ones(len(ids), CAMERAS)).tolist()):
            places = is_image[row].nonzero().flatten().chunk(CAMERAS)
            for span, seen in zip(places, cameras):
                if not seen:
                    self.valid[row, span] = False
        counted = written & self.valid  # openpi's cumsum(pad_masks) - 1: a masked camera takes no position
        self.positions, self.next = counted.cumsum(1) - 1, counted.sum(1) + shift
        if see_everything:
            self.valid[:] = True

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def norm(self, name: str, x: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        x = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
        if condition is None:
            return x * (1 + self.w[f"{name}.weight"]), torch.ones(())
        scale, shift, gate = self.linear(f"{name}.dense", condition)[:, None].chunk(3, dim=-1)
        return x * (1 + scale) + shift, gate

    def suffix(self, noisy: Tensor, time: Tensor) -> tuple[Tensor, Tensor | None]:
        actions = self.linear(f"{HEAD}action_in_proj", noisy)
        width = actions.shape[-1]
        periods = 4e-3 * (4.0 / 4e-3) ** torch.linspace(0, 1, width // 2).double()
        angle = 2 * math.pi * time.double()[:, None] / periods
        waves = torch.cat([angle.sin(), angle.cos()], dim=-1)
        if self.adaptive:
            hidden = F.silu(self.linear(f"{HEAD}time_mlp_in", waves))
            return actions, F.silu(self.linear(f"{HEAD}time_mlp_out", hidden))
        mixed = torch.cat([actions, waves[:, None].expand_as(actions)], dim=-1)
        mixed = self.linear(
            f"{HEAD}action_time_mlp_out", F.silu(self.linear(f"{HEAD}action_time_mlp_in", mixed))
        )
        return torch.cat([self.linear(f"{HEAD}state_proj", self.state)[:, None], mixed], dim=1), None

    def velocity(self, noisy: Tensor, time: Tensor) -> Tensor:
        suffix, condition = self.suffix(noisy.double(), time)
        count, length, theta = suffix.shape[1], self.prefix.shape[1], self.text.rope_parameters["rope_theta"]
        positions = torch.cat([self.positions, self.next[:, None] + torch.arange(count)], dim=1)
        marks = [0] * length + ([1] if self.adaptive else [1, 1])
        marks = torch.tensor(marks + [0] * (length + count - len(marks))).cumsum(0)
        there = torch.cat([self.valid, torch.ones(len(suffix), count, dtype=torch.bool)], dim=1)
        allowed = ((marks[None] <= marks[:, None]) & there[:, None])[:, None]
        streams = [(f"{VLM}layers", self.prefix, None), (f"{HEAD}layers", suffix, condition)]
        for layer in range(self.layers):
            streams = self.layer(layer, streams, positions, allowed, theta)
        hidden, _ = self.norm(f"{HEAD}norm", streams[1][1], condition)
        return self.linear(f"{HEAD}action_out_proj", hidden[:, -T:])

    def layer(self, layer, streams, positions, allowed, theta) -> list:
        normed = [self.norm(f"{name}.{layer}.input_layernorm", x, c) for name, x, c in streams]
        q, k, v = (
            torch.cat(
                [
                    self.linear(f"{name}.{layer}.self_attn.{which}_proj", y).unflatten(
                        -1, (-1, self.text.head_dim)
                    )
                    for (name, _, _), (y, _) in zip(streams, normed)
                ],
                dim=1,
            ).transpose(1, 2)
            for which in "qkv"
        )
        q, k = turned(q, positions, theta), turned(k, positions, theta)
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(~allowed, -torch.inf)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        after = []
        parts = mixed.split([x.shape[1] for _, x, _ in streams], dim=1)
        for (name, x, condition), (_, gate), part in zip(streams, normed, parts):
            x = x + gate * self.linear(f"{name}.{layer}.self_attn.o_proj", part)
            y, gate = self.norm(f"{name}.{layer}.post_attention_layernorm", x, condition)
            inner = F.gelu(self.linear(f"{name}.{layer}.mlp.gate_proj", y), approximate="tanh")
            inner = inner * self.linear(f"{name}.{layer}.mlp.up_proj", y)
            after.append((name, x + gate * self.linear(f"{name}.{layer}.mlp.down_proj", inner), condition))
        return after

    def loss(self, batch: dict, noise: Tensor, time: Tensor) -> float:
        actions, t = batch["actions"].double(), time.double()[:, None, None]
        velocity = self.velocity(t * noise + (1 - t) * actions, time)
        error = (velocity - (noise - actions)) ** 2
        valid = [(b, t) for b in range(len(error)) for t in range(T) if not batch["action_is_pad"][b, t]]
        return float(sum(error[b, t].sum() for b, t in valid) / (D * len(valid)))

    def sample(self, noise: Tensor, steps: int = 10) -> np.ndarray:
        x = noise.double()
        for k in range(steps):
            x = x - self.velocity(x, torch.full((len(x),), (steps - k) / steps)) / steps
        return x.numpy()


VLM, HEAD = "vlm.model.model.language_model.", "action_model."


@both
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("examples", [EXAMPLES, HALF_BLIND], ids=["all cameras", "masked cameras"])
def test_loss_and_sampler_are_the_figure(home, name, side, examples):
    model = build(home, name)
    model.prepare.vlm.processor.tokenizer.padding_side = side
    batch = model.prepare(examples)
    mask = batch["inputs"]["attention_mask"]
    assert not mask.all(), "nothing was padded, so nothing would be tested"
    assert mask[:, -1].all() == (side == "left")
    figure = Figure(model, batch)
    loss = float(model(batch, noise=NOISE, time=TIME)["action_loss"].detach())
    assert loss == pytest.approx(figure.loss(batch, NOISE, TIME), abs=1e-5, rel=1e-5)
    np.testing.assert_allclose(predict(model, batch), figure.sample(NOISE), atol=1e-5)


@both
def test_the_figure_would_notice_a_position_off_by_one_or_a_forgotten_mask(home, name):
    model = build(home, name)
    batch = model.prepare(HALF_BLIND)
    predicted = predict(model, batch)
    assert np.abs(predicted - Figure(model, batch, shift=-1).sample(NOISE)).max() > 1e-4
    assert np.abs(predicted - Figure(model, batch, see_everything=True).sample(NOISE)).max() > 1e-3


def test_the_adaptive_norm_is_its_equation():
    torch.manual_seed(0)
    norm, x, condition = AdaptiveRMSNorm(6), 3 * torch.randn(2, 5, 6), torch.randn(2, 6)
    plain, gate = norm(x, condition)
    assert not gate.any(), "gates start shut"
    np.testing.assert_allclose(plain.detach().pow(2).mean(-1), 1, atol=1e-4)
    torch.nn.init.normal_(norm.dense.weight)
    torch.nn.init.normal_(norm.dense.bias)
    y, gate = (value.detach().numpy() for value in norm(x, condition))
    three = condition.numpy() @ norm.dense.weight.detach().numpy().T + norm.dense.bias.detach().numpy()
    scale, shift, expected_gate = np.split(three[:, None], 3, axis=-1)
    rms = np.sqrt((x.numpy() ** 2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(y, x.numpy() / rms * (1 + scale) + shift, atol=1e-5)
    np.testing.assert_allclose(gate, expected_gate, atol=1e-5)


# --- another implementation -----------------------------------------------------------------------------------------

THEIRS = {
    "vlm.model.model.": "model.vlm.",
    "action_model.layers.": "model.dit.layers.",
    "action_model.norm.": "model.dit.norm.",
    "action_model.action_out_proj.": "action_out_proj.",
    "action_model.": "embed_action_time.",
}


def theirs_of(model: Framework) -> transformers.PI0ForConditionalGeneration:
    """transformers' π0 with the weights of ours: five renames by prefix."""
    text, head = model.vlm.text_config, model.action_model
    dit = {
        "model_type": "gemma",
        "hidden_size": EXPERT["hidden_size"],
        "intermediate_size": EXPERT["intermediate_size"],
        "num_hidden_layers": text.num_hidden_layers,
        "num_attention_heads": EXPERT["num_heads"],
        "num_key_value_heads": text.num_key_value_heads,
        "head_dim": text.head_dim,
        "rope_parameters": dict(text.rope_parameters),
    }
    sizes = {"chunk_size": T, "max_state_dim": S, "max_action_dim": D, "num_inference_steps": head.steps}
    config = transformers.PI0Config(vlm_config=model.vlm.config.to_dict(), dit_config=dit, **sizes)
    theirs = transformers.PI0ForConditionalGeneration(config).eval()
    renamed = {}
    for name, value in model.state_dict().items():
        ours = next((prefix for prefix in THEIRS if name.startswith(prefix)), None)
        if ours is not None:
            renamed[THEIRS[ours] + name.removeprefix(ours)] = value
    missing, unexpected = theirs.load_state_dict(renamed, strict=False)
    assert unexpected == [] and missing == ["model.dit.embed_tokens.weight"]
    return theirs


@pytest.mark.parametrize("side", ["left", "right"])
def test_transformers_own_pi0_agrees(home, side):
    model = build(home, "PI0")
    model.prepare.vlm.processor.tokenizer.padding_side = side
    batch = model.prepare([e | {"action_is_pad": np.zeros(T, bool)} for e in EXAMPLES])
    inputs, theirs = batch["inputs"], theirs_of(model)
    observed = {
        "input_ids": inputs["input_ids"],
        "attention_mask": inputs["attention_mask"],
        "pixel_values": inputs["pixel_values"].unflatten(0, (len(EXAMPLES), CAMERAS)),
        "pixel_attention_mask": torch.ones(len(EXAMPLES), CAMERAS, dtype=torch.bool),
        "state": batch["state"],
    }
    with torch.no_grad():
        ours = model(batch, noise=NOISE, time=TIME)["action_loss"]
        loss = theirs(**observed, actions=batch["actions"], noise=NOISE, timestep=TIME).loss
        chunk = theirs.sample_actions(**observed, noise=NOISE)
    assert float(ours) == pytest.approx(float(loss), abs=2e-5)  # they compute the waves of time in float32
    np.testing.assert_allclose(predict(model, batch), chunk, atol=1e-4)


# --- time, noise and what is run ------------------------------------------------------------------------------------


def test_training_times_are_beta_and_never_zero():
    torch.manual_seed(3)
    times = sample_time(50000)
    assert times.dtype == torch.float32 and 0.001 <= times.min() and times.max() <= 1.0
    assert stats.kstest((times.double() - 0.001) / 0.999, stats.beta(1.5, 1).cdf).pvalue > 1e-3
    assert stats.kstest(times.double(), stats.beta(1.0, 1.5).cdf).pvalue < 1e-12, "the other way round"


@both
def test_ten_steps_run_the_prefix_once_and_then_the_actions_alone(home, name):
    model, prefixes, suffixes = build(home, name), [], []
    model.vlm.model.model.language_model.register_forward_hook(lambda *_: prefixes.append(1))
    for layer in model.action_model.layers:
        assert isinstance(layer, ExpertLayer)
        layer.register_forward_hook(lambda module, given, _: suffixes.append(given[0].shape[1]))
    predict(model, EXAMPLES)
    depth = len(model.action_model.layers)
    assert len(prefixes) == 1
    assert suffixes == [1] * depth * (name == "PI0") + [T] * depth * 10  # the state, too, is run once
    prefixes.clear(), suffixes.clear()
    model(EXAMPLES, noise=NOISE, time=TIME)
    assert len(prefixes) == 1 and suffixes == [T + (name == "PI0")] * depth


@both
def test_noise_is_left_as_it_was_and_padding_actions_are_not_learnt(home, name):
    model = build(home, name)
    batch, kept = model.prepare(EXAMPLES), NOISE.clone()
    before = float(model(batch, noise=NOISE, time=torch.ones(3))["action_loss"].detach())
    predict(model, batch)
    assert torch.equal(NOISE, kept)
    batch["actions"][batch["action_is_pad"]] = 50.0  # at t = 1 the noisy chunk holds nothing of the actions
    assert float(model(batch, noise=NOISE, time=torch.ones(3))["action_loss"].detach()) == before
    seeded = [model.predict_action(EXAMPLES, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    assert np.array_equal(*(chunk["normalized_actions"] for chunk in seeded))


def test_the_loss_counts_the_robots_numbers_only(home):
    model = build(home, "PI0", max_action_dim=8, max_state_dim=4)
    batch, noise = model.prepare(EXAMPLES), torch.randn(3, T, 8)
    first = float(model(batch, noise=noise, time=TIME)["action_loss"].detach())
    with torch.no_grad():
        model.action_model.action_out_proj.bias[D:] += 100.0
    assert float(model(batch, noise=noise, time=TIME)["action_loss"].detach()) == pytest.approx(
        first, rel=1e-6
    )
    assert predict(model, batch, noise).shape == (3, T, D)


# --- every backbone with a cache ------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("backbone", ["paligemma", "qwen2_5_vl", "qwen3_vl"])
def test_gradients_reach_what_is_trained_and_nothing_reads_what_is_frozen(home, name, backbone):
    model = build(home, name, backbone)
    model(EXAMPLES)["action_loss"].backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert [n for n, p in trained.items() if p.grad is None or not p.grad.isfinite().all()] == []
    assert [n for n, p in trained.items() if not p.grad.any()] == []
    before, frozen = predict(model, EXAMPLES), [p for p in model.parameters() if not p.requires_grad]
    assert frozen
    with torch.no_grad():
        for parameter in frozen:
            parameter += torch.randn_like(parameter)
    assert np.array_equal(predict(model, EXAMPLES), before)


@both
@pytest.mark.parametrize("backbone", ["paligemma", "qwen2_5_vl", "qwen3_vl"])
def test_alone_in_a_batch_on_either_side_saved_and_loaded_the_same(home, tmp_path, name, backbone):
    model, sides = build(home, name, backbone), []
    tokenizer = model.prepare.vlm.processor.tokenizer
    for tokenizer.padding_side in ("left", "right"):
        sides.append(predict(model, EXAMPLES))
    np.testing.assert_allclose(*sides, atol=1e-5)
    for i in range(3):
        np.testing.assert_allclose(
            predict(model, EXAMPLES[i : i + 1], NOISE[i : i + 1])[0], sides[0][i], atol=1e-5
        )
    assert np.abs(sides[0][0] - sides[0][1]).max() > 1e-3
    model.save_pretrained(tmp_path)
    np.testing.assert_allclose(predict(Framework.from_pretrained(tmp_path), EXAMPLES), sides[0], atol=1e-6)


@both
@pytest.mark.parametrize("backbone", ["paligemma", "qwen2_5_vl"])
def test_a_masked_camera_changes_nothing(home, name, backbone):
    model = build(home, name, backbone)
    repainted = [dict(e, image=list(e["image"])) for e in HALF_BLIND]
    for e in repainted:
        for camera, seen in enumerate(e.get("image_mask", (True, True))):
            if not seen:
                e["image"][camera] = Image.new("RGB", (64, 64), "red")
    assert np.array_equal(predict(model, repainted), predict(model, HALF_BLIND))
    open_eyes = [{key: value for key, value in e.items() if key != "image_mask"} for e in repainted]
    assert np.abs(predict(model, open_eyes)[:2] - predict(model, HALF_BLIND)[:2]).max() > 1e-3
    for m in model.attention_maps(HALF_BLIND)[:1]:
        assert m.images[0].sum() > 0 and m.images[1].sum() == 0
        assert sum(i.sum() for i in m.images) + sum(share for _, share in m.words) <= 1 + 1e-5


@both
def test_a_masked_camera_is_a_camera_left_out(home, name):
    model = build(home, name)
    masked = [e | {"image_mask": np.array([True, False])} for e in EXAMPLES]
    left_out = [e | {"image": e["image"][:1]} for e in EXAMPLES]
    np.testing.assert_allclose(predict(model, masked), predict(model, left_out), atol=1e-5)
    assert np.abs(predict(model, masked) - predict(model, EXAMPLES)).max() > 1e-3


@both
def test_the_prompt_is_openpis(home, name):
    model = build(home, name)
    example = EXAMPLES[0] | {
        "lang": " open_the drawer\nnow ",
        "state": np.array([-2.0, -1.0, 0.0, 7.0], np.float32)[:S],
    }
    inputs, tokenizer = model.prepare([example])["inputs"], model.vlm.processor.tokenizer
    text = "open the drawer now"
    if name == "PI0":  # openpi tokenises the newline apart
        words = tokenizer.encode(text, add_special_tokens=False) + tokenizer.encode(
            "\n", add_special_tokens=False
        )
    else:
        state = " ".join(["-1", "0", "128", "255"][:S])
        words = tokenizer.encode(f"Task: {text}, State: {state};\nAction: ", add_special_tokens=False)
    ids = inputs["input_ids"][0]
    assert ids[ids != model.vlm.config.image_token_id].tolist() == [tokenizer.bos_token_id, *words]


@both
def test_one_batch_by_heart(home, name):
    model = build(home, name, spread=0.0)
    examples = [e | {"action_is_pad": np.zeros(T, bool), "image": e["image"][:1]} for e in EXAMPLES]
    batch, targets = (
        model.prepare(6 * examples),
        np.stack([e["action"] for e in examples]),
    )  # six draws a step
    before = np.abs(predict(model, examples) - targets).mean()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=250)
    model.train()
    for _ in range(250):
        optimizer.zero_grad()
        model(batch)["action_loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(), schedule.step()
    after = np.abs(predict(model, examples) - targets).mean()
    assert after < 0.05 * before, f"{after:.4f} of {before:.4f}"


@both
def test_half_precision_of_the_backbone_or_of_everything_stays_near(home, name):
    exact = build(home, name, spread=0.05)
    half = build(home, name, vlm={"base_vlm": str(home / "paligemma"), "dtype": "bfloat16"}, spread=0.0)
    half.load_state_dict(exact.state_dict())
    assert {p.dtype for p in half.vlm.parameters()} == {torch.bfloat16}
    batch, given = exact.prepare(EXAMPLES), {"noise": NOISE, "time": TIME}
    loss = float(exact(batch, **given)["action_loss"].detach())
    assert float(half(batch, **given)["action_loss"].detach()) == pytest.approx(loss, rel=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = exact(batch, **given)["action_loss"]
    mixed.backward()
    assert mixed.dtype == torch.float32 and float(mixed.detach()) == pytest.approx(loss, rel=0.05)
    assert predict(half, batch).dtype == np.float32


# --- what does not fit ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"action_model": EXPERT | {"num_heads": 3, "type": "PI0Expert"}}, "num_heads=3"),
        ({"action_model": EXPERT | {"hidden_size": 25}}, "must be even"),
        ({"action_model": EXPERT | {"adaptive_norm": True}}, "framework.name is PI05"),
        ({"action_model": EXPERT | {"num_layers": 2}}, "num_layers"),
        ({"action_model": {"type": "FlowMatching"}}, "'ActionExpert'"),
        ({"name": "GR00T"}, "'PI0'"),
        ({"name": "PI05"}, "adaptive_norm: true"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_configuration_that_does_not_fit_says_what_to_write(home, changes, expected):
    config = configuration(home, "PI0", "qwen2_5_vl") | changes
    with pytest.raises(ValueError, match=expected):
        build_framework(config, action_dim=D, state_dim=S)


def test_a_backbone_without_a_cache_is_refused_with_a_choice(home):
    sizes = {"input_size": 32, "action_dim": D, "horizon": T, "state_dim": 0}
    own = {key: value for key, value in EXPERT.items() if key != "type"}
    with pytest.raises(ValueError, match="choose one that has"):
        ActionExpertHead(backbone=BackboneSizes(32, 2, 64, None, None, None), **sizes, **own)
    head = ActionExpertHead(backbone=BackboneSizes(32, 2, 64, 1, 8, 1e4), **sizes, **own)
    features = Features(torch.randn(1, 3, 32), torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="features.cache is None.*PaliGemma"):
        head.sample(features)


def test_gradient_checkpointing_of_the_backbone_is_not_ignored(home):
    model = build(home, "PI0").train()
    model.vlm.model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing"):
        model(EXAMPLES)


@both
def test_wrong_noise_time_and_state_are_named(home, name):
    model = build(home, name)
    with pytest.raises(ValueError, match=r"noise is \[2, 4, 3\], expected \[3, 4, 3\]"):
        predict(model, EXAMPLES, NOISE[:2])
    with pytest.raises(ValueError, match=r"time is \[1\], expected \[3\]"):
        model(EXAMPLES, noise=NOISE, time=TIME[:1])
    with pytest.raises(ValueError, match="the state has 1 numbers"):
        predict(model, [e | {"state": np.zeros(1, np.float32)} for e in EXAMPLES])


@pytest.mark.parametrize("name, main", [("PI0", pi0_main), ("PI05", pi05_main)])
def test_as_a_program(home, tmp_path, capsys, name, main):
    head = "{type: ActionExpert, hidden_size: 24, intermediate_size: 48, num_heads: 4, adaptive_norm: %s}"
    text = (
        f"{{name: {name}, vlm: {{base_vlm: {home / 'paligemma'}}}, action_horizon: 3, action_model: {head}}}"
    )
    (tmp_path / "c.yaml").write_text("framework: " + text % str(name == "PI05").lower())
    main(["--config_yaml", str(tmp_path / "c.yaml"), "--image_size", "64"])
    printed = capsys.readouterr().out
    assert f"{name}: 3 actions of 7 numbers" in printed and "prediction [1, 3, 7]" in printed
