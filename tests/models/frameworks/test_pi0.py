"""π0 and π0.5 against their figure: one sequence, one attention over all of it, written a second time."""

import math

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from vla_bench.models.frameworks.build import build_framework
from vla_bench.models.frameworks.framework import Framework
from vla_bench.models.layers.expert import ExpertLayer

T, D, S, CAMERAS = 4, 3, 2, 2  # actions in a chunk, numbers in an action, numbers in a state, images
VLM, HEAD = "vlm.model.model.language_model.", "action_model."


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
        periods = 4e-3 * (4.0 / 4e-3) ** torch.linspace(0, 1, width // 2, dtype=torch.float64)
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
        x, time, dt = noise.double(), torch.tensor(1.0), torch.tensor(-1.0 / steps)
        while time >= -dt / 2:  # openpi's loop, its time added up in float32
            x = x + dt * self.velocity(x, time.expand(len(x)))
            time = time + dt
        return x.numpy()


@pytest.fixture(params=["left", "right"])
def side(request) -> str:
    """Where padding stands."""
    return request.param


@pytest.fixture(params=["examples", "half_masked"], ids=["all cameras", "masked cameras"])
def observed(request, pi, name, side):
    """A model, a padded batch, and the figure."""
    model = pi.build(name)
    model.prepare.vlm.processor.tokenizer.padding_side = side
    batch = model.prepare(getattr(pi, request.param))
    mask = batch["inputs"]["attention_mask"]
    assert not mask.all(), "nothing was padded, so nothing would be tested"
    assert mask[:, -1].all() == (side == "left")
    return model, batch, Figure(model, batch)


def test_the_loss_is_the_figures(pi, observed):
    model, batch, figure = observed
    loss = float(model(batch, noise=pi.noise, time=pi.time)["action_loss"].detach())
    assert loss == pytest.approx(figure.loss(batch, pi.noise, pi.time), abs=1e-5, rel=1e-5)


def test_the_sampler_is_the_figures(pi, observed):
    model, batch, figure = observed
    np.testing.assert_allclose(pi.predict(model, batch), figure.sample(pi.noise), atol=2e-6)


def test_a_position_off_by_one_would_be_noticed(pi, name):
    model = pi.build(name)
    batch = model.prepare(pi.half_masked)
    shifted = Figure(model, batch, shift=-1).sample(pi.noise)
    assert np.abs(pi.predict(model, batch) - shifted).max() > 1e-4


def test_a_forgotten_mask_would_be_noticed(pi, name):
    model = pi.build(name)
    batch = model.prepare(pi.half_masked)
    unmasked = Figure(model, batch, see_everything=True).sample(pi.noise)
    assert np.abs(pi.predict(model, batch) - unmasked).max() > 1e-3


# --- another implementation -----------------------------------------------------------------------------------------

THEIRS = {
    "vlm.model.model.": "model.vlm.",
    "action_model.layers.": "model.dit.layers.",
    "action_model.norm.": "model.dit.norm.",
    "action_model.action_out_proj.": "action_out_proj.",
    "action_model.": "embed_action_time.",
}


def theirs_of(model: Framework, expert: dict) -> transformers.PI0ForConditionalGeneration:
    """transformers' π0 with the weights of ours: five renames by prefix."""
    text, head = model.vlm.text_config, model.action_model
    dit = {
        "model_type": "gemma",
        "hidden_size": expert["hidden_size"],
        "intermediate_size": expert["intermediate_size"],
        "num_hidden_layers": text.num_hidden_layers,
        "num_attention_heads": expert["num_heads"],
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


@pytest.fixture
def both_implementations(pi, side):
    """Our π0 and a batch, transformers' π0 with the same weights, and what it observes."""
    model = pi.build("PI0")
    model.prepare.vlm.processor.tokenizer.padding_side = side
    batch = model.prepare([e | {"action_is_pad": np.zeros(T, bool)} for e in pi.examples])
    inputs = batch["inputs"]
    seen = {
        "input_ids": inputs["input_ids"],
        "attention_mask": inputs["attention_mask"],
        "pixel_values": inputs["pixel_values"].unflatten(0, (3, CAMERAS)),
        "pixel_attention_mask": torch.ones(3, CAMERAS, dtype=torch.bool),
        "state": batch["state"],
    }
    return model, batch, theirs_of(model, pi.expert), seen


@torch.no_grad()
def test_transformers_own_pi0_has_the_same_loss(pi, both_implementations):
    model, batch, theirs, seen = both_implementations
    ours = model(batch, noise=pi.noise, time=pi.time)["action_loss"]
    loss = theirs(**seen, actions=batch["actions"], noise=pi.noise, timestep=pi.time).loss
    assert float(ours) == pytest.approx(float(loss), abs=2e-5)  # they compute the time embedding in float32


@torch.no_grad()
def test_transformers_own_pi0_samples_the_same(pi, both_implementations):
    model, batch, theirs, seen = both_implementations
    chunk = theirs.sample_actions(**seen, noise=pi.noise)
    np.testing.assert_allclose(pi.predict(model, batch), chunk, atol=1e-4)


# --- what is run ----------------------------------------------------------------------------------------------------


@pytest.fixture
def counted(pi, name):
    """A model, the calls of its prefix, and the number of tokens in each call of an expert layer."""
    model, prefixes, suffixes = pi.build(name), [], []
    model.vlm.model.model.language_model.register_forward_hook(lambda *_: prefixes.append(1))
    for layer in model.action_model.layers:
        assert isinstance(layer, ExpertLayer)
        layer.register_forward_hook(lambda module, given, _: suffixes.append(given[0].shape[1]))
    return model, prefixes, suffixes


def test_ten_steps_run_the_prefix_once_and_then_the_actions_alone(pi, name, counted):
    model, prefixes, suffixes = counted
    pi.predict(model, pi.examples)
    depth = len(model.action_model.layers)
    assert len(prefixes) == 1
    assert suffixes == [1] * depth * (name == "PI0") + [T] * depth * 10  # the state, too, is run once


def test_training_runs_each_once(pi, name, counted):
    model, prefixes, suffixes = counted
    model(pi.examples, noise=pi.noise, time=pi.time)
    assert len(prefixes) == 1 and suffixes == [T + (name == "PI0")] * len(model.action_model.layers)


# --- noise and padding ----------------------------------------------------------------------------------------------


def test_the_callers_noise_is_left_as_it_was(pi, name):
    model, kept = pi.build(name), pi.noise.clone()
    model(pi.examples, noise=pi.noise, time=torch.ones(3))
    pi.predict(model, pi.examples)
    assert torch.equal(pi.noise, kept)


def test_padding_actions_are_not_learnt(pi, name):
    model = pi.build(name)
    batch, given = model.prepare(pi.examples), {"noise": pi.noise, "time": torch.ones(3)}
    before = float(model(batch, **given)["action_loss"].detach())
    batch["actions"][batch["action_is_pad"]] = 50.0  # at t = 1 the noisy chunk holds nothing of the actions
    assert float(model(batch, **given)["action_loss"].detach()) == before


def test_a_seed_decides_the_actions(pi, name):
    model = pi.build(name)
    seeded = [model.predict_action(pi.examples, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    assert np.array_equal(*(chunk["normalized_actions"] for chunk in seeded))


def test_the_loss_counts_the_robots_numbers_only(pi):
    model = pi.build("PI0", max_action_dim=8, max_state_dim=4)
    batch, noise = model.prepare(pi.examples), torch.randn(3, T, 8)
    first = float(model(batch, noise=noise, time=pi.time)["action_loss"].detach())
    with torch.no_grad():
        model.action_model.action_out_proj.bias[D:] += 100.0
    assert float(model(batch, noise=noise, time=pi.time)["action_loss"].detach()) == pytest.approx(
        first, rel=1e-6
    )
    assert pi.predict(model, batch, noise).shape == (3, T, D)


# --- every backbone with a cache ------------------------------------------------------------------------------------


@pytest.fixture(params=["paligemma", "qwen2_5_vl", "qwen3_vl"])
def cached(request, pi, name):
    """A model on a backbone with a cache."""
    return pi.build(name, request.param)


def test_gradients_reach_what_is_trained(pi, cached):
    cached(pi.examples)["action_loss"].backward()
    trained = {n: p for n, p in cached.named_parameters() if p.requires_grad}
    assert [n for n, p in trained.items() if p.grad is None or not p.grad.isfinite().all()] == []
    assert [n for n, p in trained.items() if not p.grad.any()] == []


def test_nothing_reads_what_is_frozen(pi, cached):
    before, frozen = pi.predict(cached, pi.examples), [p for p in cached.parameters() if not p.requires_grad]
    assert frozen
    with torch.no_grad():
        for parameter in frozen:
            parameter += torch.randn_like(parameter)
    assert np.array_equal(pi.predict(cached, pi.examples), before)


def test_the_padding_side_does_not_matter(pi, cached):
    tokenizer, sides = cached.prepare.vlm.processor.tokenizer, []
    for tokenizer.padding_side in ("left", "right"):
        sides.append(pi.predict(cached, pi.examples))
    np.testing.assert_allclose(*sides, atol=1e-5)


def test_alone_or_in_a_batch_the_same(pi, cached):
    together = pi.predict(cached, pi.examples)
    for i in range(3):
        alone = pi.predict(cached, pi.examples[i : i + 1], pi.noise[i : i + 1])
        np.testing.assert_allclose(alone[0], together[i], atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 1e-3


def test_saved_and_loaded_the_same(pi, cached, tmp_path):
    cached.save_pretrained(tmp_path)
    loaded = Framework.from_pretrained(tmp_path)
    np.testing.assert_allclose(pi.predict(loaded, pi.examples), pi.predict(cached, pi.examples), atol=1e-6)


# --- masked cameras -------------------------------------------------------------------------------------------------


@pytest.fixture(params=["paligemma", "qwen2_5_vl"])
def on_two_backbones(request, pi, name):
    """A model on two backbones that treat masked cameras in their own way."""
    return pi.build(name, request.param)


@pytest.fixture
def repainted(pi):
    """The samples with masked cameras, with red images where a camera is masked."""
    changed = [dict(e, image=list(e["image"])) for e in pi.half_masked]
    for e in changed:
        for camera, seen in enumerate(e.get("image_mask", (True, True))):
            if not seen:
                e["image"][camera] = Image.new("RGB", (64, 64), "red")
    return changed


def test_a_masked_camera_changes_nothing(pi, on_two_backbones, repainted):
    found, expected = (pi.predict(on_two_backbones, e) for e in (repainted, pi.half_masked))
    assert np.array_equal(found, expected)


def test_without_the_mask_it_would(pi, on_two_backbones, repainted):
    unmasked = [{key: value for key, value in e.items() if key != "image_mask"} for e in repainted]
    found, expected = (pi.predict(on_two_backbones, e)[:2] for e in (unmasked, pi.half_masked))
    assert np.abs(found - expected).max() > 1e-3


def test_actions_do_not_look_at_a_masked_camera(pi, on_two_backbones):
    m = on_two_backbones.attention_maps(pi.half_masked)[0]
    assert m.images[0].sum() > 0 and m.images[1].sum() == 0
    assert sum(i.sum() for i in m.images) + sum(share for _, share in m.words) <= 1 + 1e-5


def test_a_masked_camera_is_a_camera_left_out(pi, name):
    model = pi.build(name)
    masked = [e | {"image_mask": np.array([True, False])} for e in pi.examples]
    left_out = [e | {"image": e["image"][:1]} for e in pi.examples]
    np.testing.assert_allclose(pi.predict(model, masked), pi.predict(model, left_out), atol=1e-5)
    assert np.abs(pi.predict(model, masked) - pi.predict(model, pi.examples)).max() > 1e-3


# --- the prompt -----------------------------------------------------------------------------------------------------


@pytest.fixture
def written(pi, name):
    """The ids of a prompt without its image tokens, and the tokenizer."""
    model = pi.build(name)
    state = np.array([-2.0, 7.0], np.float32)
    example = pi.examples[0] | {"lang": " open_the drawer\nnow ", "state": state}
    ids = model.prepare([example])["inputs"]["input_ids"][0]
    return ids[ids != model.vlm.config.image_token_id].tolist(), model.vlm.processor.tokenizer


def test_the_prompt_is_openpis(name, written):
    ids, tokenizer = written
    plain = lambda text: tokenizer.encode(text, add_special_tokens=False)
    text = "open the drawer now"
    expected = {
        "PI0": plain(text) + plain("\n"),  # openpi tokenises the newline apart
        "PI05": plain(f"Task: {text}, State: -1 255;\nAction: "),
    }
    assert ids == [tokenizer.bos_token_id, *expected[name]]


# --- training and precision -----------------------------------------------------------------------------------------


def test_one_batch_can_be_overfitted(pi, name):
    model = pi.build(name, spread=0.0)
    examples = [e | {"action_is_pad": np.zeros(T, bool), "image": e["image"][:1]} for e in pi.examples]
    batch, targets = (
        model.prepare(6 * examples),
        np.stack([e["action"] for e in examples]),
    )  # six draws a step
    before = np.abs(pi.predict(model, examples) - targets).mean()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=250)
    model.train()
    for _ in range(250):
        optimizer.zero_grad()
        model(batch)["action_loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(), schedule.step()
    after = np.abs(pi.predict(model, examples) - targets).mean()
    assert after < 0.05 * before, f"{after:.4f} of {before:.4f}"


@pytest.fixture
def halved(pi, name):
    """A model, and the same with a backbone in bfloat16."""
    exact = pi.build(name, spread=0.05)
    vlm = {"base_vlm": str(pi.home / "paligemma"), "dtype": "bfloat16"}
    half = pi.build(name, vlm=vlm, spread=0.0)
    half.load_state_dict(exact.state_dict())
    assert {p.dtype for p in half.vlm.parameters()} == {torch.bfloat16}
    return exact, half


def test_half_precision_of_the_backbone_stays_near(pi, halved):
    given = {"noise": pi.noise, "time": pi.time}
    exact, half = (float(model(pi.examples, **given)["action_loss"].detach()) for model in halved)
    assert half == pytest.approx(exact, rel=0.05)


def test_half_precision_of_everything_stays_near_and_trains(pi, halved):
    exact, given = halved[0], {"noise": pi.noise, "time": pi.time}
    loss = float(exact(pi.examples, **given)["action_loss"].detach())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = exact(pi.examples, **given)["action_loss"]
    mixed.backward()
    assert mixed.dtype == torch.float32 and float(mixed.detach()) == pytest.approx(loss, rel=0.05)


def test_a_backbone_in_half_precision_predicts_in_float32(pi, halved):
    assert pi.predict(halved[1], pi.examples).dtype == np.float32


# --- what does not fit ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"action_model": {"num_heads": 3, "type": "PI0Expert"}}, "num_heads=3"),
        ({"action_model": {"hidden_size": 25}}, "must be even"),
        ({"action_model": {"adaptive_norm": True}}, "framework.name is PI05"),
        ({"action_model": {"num_layers": 2}}, "num_layers"),
        ({"action_model": {"type": "FlowMatching"}}, "'ActionExpert'"),
        ({"name": "GR00T"}, "'PI0'"),
        ({"name": "PI05"}, "adaptive_norm: true"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_configuration_that_does_not_fit_says_what_to_write(pi, changes, expected):
    config = pi.configuration("PI0", "qwen2_5_vl")
    head = changes.get("action_model", {})
    changes |= {"action_model": head if head.get("type") == "FlowMatching" else config["action_model"] | head}
    with pytest.raises(ValueError, match=expected):
        build_framework(config | changes, **pi.sizes)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")  # its name before 5.23
def test_gradient_checkpointing_of_the_backbone_is_not_ignored(pi):
    model = pi.build("PI0").train()
    model.vlm.model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing"):
        model(pi.examples)


def test_noise_of_another_shape_is_named(pi, name):
    with pytest.raises(ValueError, match=r"noise is \[2, 4, 3\], expected \[3, 4, 3\]"):
        pi.predict(pi.build(name), pi.examples, pi.noise[:2])


def test_time_of_another_shape_is_named(pi, name):
    with pytest.raises(ValueError, match=r"time is \[1\], expected \[3\]"):
        pi.build(name)(pi.examples, noise=pi.noise, time=pi.time[:1])


def test_a_state_of_another_size_is_named(pi, name):
    with pytest.raises(ValueError, match="the state has 1 numbers"):
        pi.predict(pi.build(name), [e | {"state": np.zeros(1, np.float32)} for e in pi.examples])
