"""Several heads on one backbone: what each reads and learns is what it reads and learns alone."""

import numpy as np
import pytest
import torch

from vla_bench.models.backbones.tiny_composed import write_tiny_component
from vla_bench.models.frameworks.build import build_framework, has_several
from vla_bench.models.frameworks.framework import Framework
from vla_bench.models.frameworks.oft import query_prompt
from vla_bench.models.frameworks.several import SeveralHeads, of_prompt, sees_behind, solo_sections, use_head
from vla_bench.models.heads.flow_inference import FlowMatchingInferenceHead
from vla_bench.models.heads.flow_matching import FlowMatchingHead
from vla_bench.registry import RegistryError

QUERY = "Q"  # one token, and in none of the instructions

FLOW = {
    "hidden_size": 32,
    "num_heads": 4,
    "num_future_tokens": 2,
    "dropout": 0.0,
    "repeated_diffusion_steps": 2,
}
EXPERT = {"hidden_size": 24, "intermediate_size": 48, "num_heads": 4, "repeated_diffusion_steps": 2}
HEADS = {
    "oft": {"type": "MLP", "hidden_size": 32, "num_queries": 2},
    "bins": {"type": "Bins", "first_token_id": 0},
    "gr00t": {"type": "FlowMatching", **FLOW, "num_layers": 2},
    "pi": {"type": "LayerwiseFlowMatching", **FLOW},
    "pi0": {"type": "ActionExpert", **EXPERT},
    "llava": {"type": "Transformer", "hidden_size": 32},
}


def section(toy, *names, backbone="qwen2_5_vl", weights=None, **changes) -> dict:
    """The framework section of some heads."""
    heads = {name: {**HEADS[name], **({"weight": weights[name]} if weights else {})} for name in names}
    vlm = {"base_vlm": str(toy.home / backbone)}
    return {"name": "GR00T", "vlm": vlm, "action_horizon": toy.T, "action_model": heads} | changes


def made(toy, section, spread=0.02) -> Framework:
    """A framework whose gates are open, the same for the same names of weights."""
    torch.manual_seed(0)
    model = build_framework(section, **toy.sizes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(parameter.numel() + parameter.ndim)
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += 0.0 if name.startswith("vlm.") else spread * noise
    return model


def drawn(toy, model, names) -> dict:
    """Noise and times for every head that draws some."""
    rows, generator = 2 * len(toy.examples), torch.Generator().manual_seed(1)
    noise = {name: torch.randn(rows, toy.T, toy.D, generator=generator) for name in names}
    time = {name: torch.rand(rows, generator=generator) for name in names}
    return {"noise": noise, "time": time}


TOGETHER = [
    ("oft", "gr00t"),
    ("oft", "pi", "pi0", "gr00t", "llava"),
    ("bins", "gr00t", "pi", "pi0"),
    ("pi", "pi0"),
]


@pytest.mark.parametrize("names", TOGETHER, ids="-".join)
def test_each_loss_is_that_of_the_head_alone(toy, names):
    """Queries and tokens stand behind the prompt, which does not see them; same weights, same noise, same batch."""
    both = section(toy, *names)
    together = made(toy, both)
    batch, given = together.prepare(toy.examples), drawn(toy, together, names)
    found = together(batch, **given)
    assert found["action_loss"].item() == pytest.approx(
        sum(found[f"{name}/action_loss"].item() for name in names), rel=1e-6
    )
    for name, solo in solo_sections(both).items():
        alone = made(toy, solo)
        own = {key: each[name] for key, each in given.items()}
        loss = alone(alone.prepare(toy.examples), **own)["action_loss"].item()
        assert found[f"{name}/action_loss"].item() == pytest.approx(loss, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("backbone", ["qwen2_5_vl", "paligemma"])
def test_tokens_as_an_answer_leave_the_prompt_alone_on_any_backbone(toy, backbone):
    both = section(toy, "bins", "pi0", backbone=backbone)
    together = made(toy, both)
    given = drawn(toy, together, ("bins", "pi0"))
    found = together(together.prepare(toy.examples), **given)
    for name, solo in solo_sections(both).items():
        alone = made(toy, solo)
        loss = alone(alone.prepare(toy.examples), **{k: v[name] for k, v in given.items()})[
            "action_loss"
        ].item()
        assert found[f"{name}/action_loss"].item() == pytest.approx(loss, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("names", TOGETHER[:3], ids="-".join)
def test_the_weights_of_a_head_begin_as_they_do_alone(toy, names):
    both = section(toy, *names)
    torch.manual_seed(0)
    together = build_framework(both, **toy.sizes)
    for name, solo in solo_sections(both).items():
        torch.manual_seed(0)
        alone = build_framework(solo, **toy.sizes).state_dict()
        ours = {key.removeprefix("vlm."): key for key in alone if key.startswith("vlm.")}
        weights = together.state_dict()
        for key in alone:
            place = (
                f"action_model.{name}.{key[13:]}"
                if key.startswith("action_model.")
                else f"parts.{name}.{key}"
            )
            assert torch.equal(
                weights[key if key[4:] in ours and key.startswith("vlm.") else place], alone[key]
            )


@pytest.mark.parametrize("names", TOGETHER[:3], ids="-".join)
def test_the_chosen_head_acts_as_it_does_alone(toy, names):
    both = section(toy, *names)
    together = made(toy, both)
    for name, solo in solo_sections(both).items():
        use_head(together, name)
        alone = made(toy, solo)
        ours, theirs = (
            model.predict_action(toy.examples, generator=torch.Generator().manual_seed(4))[
                "normalized_actions"
            ]
            for model in (together, alone)
        )
        np.testing.assert_array_equal(ours, theirs)


def test_a_head_of_weight_zero_is_neither_run_nor_trained(toy):
    model = made(toy, section(toy, "oft", "pi", weights={"oft": 1.0, "pi": 0.0}))
    losses = model(toy.examples)
    assert set(losses) == {"action_loss", "oft/action_loss"}
    frozen = [p.requires_grad for p in model.action_model.pi.parameters()]
    assert frozen and not any(frozen)
    alone = made(toy, solo_sections(section(toy, "oft"))["oft"])
    ours, theirs = ({n for n, p in m.vlm.named_parameters() if p.requires_grad} for m in (model, alone))
    assert ours == theirs and model.unused == alone.unused == ()


def test_what_only_other_heads_read_is_frozen_as_it_is_alone(toy):
    model = made(toy, section(toy, "oft", "pi0", weights={"oft": 0, "pi0": 1}))
    alone = made(toy, solo_sections(section(toy, "pi0"))["pi0"])
    assert sorted(model.unused) == sorted(alone.unused) != []
    together = made(toy, section(toy, "oft", "pi0"))
    assert list(together.unused) == [
        name for name in alone.unused if "lm_head" in name and name in together.unused
    ]


def test_every_trained_weight_gets_a_gradient(toy):
    names = ("oft", "pi", "pi0", "gr00t")
    model = made(toy, section(toy, *names)).train()
    model(toy.examples)["action_loss"].backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_the_weights_scale_the_losses(toy):
    one = made(toy, section(toy, "oft", "gr00t", weights={"oft": 0.25, "gr00t": 3}))
    found = one(one.prepare(toy.examples), **drawn(toy, one, ("gr00t",)))
    expected = 0.25 * found["oft/action_loss"] + 3 * found["gr00t/action_loss"]
    assert found["action_loss"].item() == pytest.approx(expected.item(), rel=1e-6)


def test_nothing_is_stored_twice_and_all_of_it_comes_back(toy, tmp_path):
    model = made(toy, section(toy, "oft", "gr00t", "pi0", policy_head="pi0"))
    own = {name: id(p) for name, p in model.state_dict(keep_vars=True).items() if not name.startswith("vlm.")}
    assert len(own) == len(set(own.values())) and not any(".vlm." in name for name in own)
    model.save_pretrained(tmp_path)
    again = Framework.from_pretrained(tmp_path)
    assert isinstance(again, SeveralHeads) and again.action_model.policy_head == "pi0"
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight)
    np.testing.assert_array_equal(*(toy.predict(each, toy.examples) for each in (model, again)))


def test_insulation_leaves_the_backbone_to_the_tokens(toy):
    both = section(toy, "bins", "gr00t", knowledge_insulation=True)
    model = made(toy, both).train()
    losses = model(toy.examples)
    body = [p for p in model.vlm.parameters() if p.requires_grad]
    count = lambda name: sum(
        g is not None and bool(g.any())
        for g in torch.autograd.grad(
            losses[f"{name}/action_loss"], body, allow_unused=True, retain_graph=True
        )
    )
    assert count("gr00t") == 0 and count("bins") > 4 and not model.knowledge_insulation


def test_what_is_behind_a_prompt_is_seen_by_some_backbones(toy):
    found = {
        (backbone, causal): sees_behind(made(toy, section(toy, "llava", backbone=backbone)).vlm, causal)
        for backbone in ("qwen2_5_vl", "paligemma")
        for causal in (False, True)
    }
    assert [pair for pair, seen in found.items() if seen] == [("paligemma", False)]


def test_the_prompt_of_a_longer_pass_is_the_prompt(toy):
    model = made(toy, section(toy, "llava"))
    inputs = model.prepare(toy.examples)["inputs"]
    length = inputs["input_ids"].shape[1]
    extra = torch.randn(3, 2, model.vlm.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = of_prompt(model.vlm(inputs, extra, layers="all", cache=True), length)
        theirs = model.vlm(inputs, layers="all", cache=True)
    assert torch.equal(ours.mask, theirs.mask) and torch.equal(ours.next_position, theirs.next_position)
    valid = theirs.mask
    for a, b in zip((ours.hidden, *ours.layers), (theirs.hidden, *theirs.layers), strict=True):
        torch.testing.assert_close(a[valid], b[valid], atol=1e-5, rtol=1e-5)
    for pair, other in zip(ours.cache, theirs.cache, strict=True):
        for a, b in zip(pair, other):
            torch.testing.assert_close(
                a.mT[..., valid[0]].mT[0], b.mT[..., valid[0]].mT[0], atol=1e-5, rtol=1e-5
            )


@pytest.mark.parametrize(
    "names, changes, message",
    [
        (("oft", "bins"), {}, "both behind the prompt"),
        (("oft", "gr00t"), {"backbone": "paligemma"}, "PaliGemma reads in both directions"),
        (("oft", "gr00t"), {"policy_head": "of"}, "framework.policy_head is 'of'; did you mean 'oft'"),
        (("oft", "gr00t"), {"weights": {"oft": 0, "gr00t": 0}}, "nothing to learn"),
        (
            ("oft", "gr00t"),
            {"weights": {"oft": True, "gr00t": 1}},
            "action_model.oft.weight must be a finite number",
        ),
        (
            ("oft", "gr00t"),
            {"inference_model": {"action_model": {"type": "MLP"}}},
            "framework.inference_model.action_model names the heads that differ, 'type' is none of them",
        ),
        (
            ("oft", "gr00t"),
            {"inference_model": {"action_model": {"gr00": {"type": "FlowMatchingInference"}}}},
            "'gr00' is none of them; did you mean 'gr00t'",
        ),
        (
            ("oft", "gr00t"),
            {"inference_model": {"action_model": {"gr00t": {"type": "FlowMatching", "num_layers": 1}}}},
            "must have the weights of the head that is trained",
        ),
        (
            ("oft", "gr00t"),
            {"query_tokn": "x"},
            r"no head's framework \(OFT, GR00T\) takes framework.query_tokn; did you mean 'query_token'",
        ),
        (("pi", "pi0"), {"query_token": "x"}, r"no head's framework \(PI, PI0\) takes framework.query_token"),
        (("oft", "pi"), {"vision_backbone": {}}, r"no head's framework \(OFT, PI\) takes framework.vision_"),
    ],
)
def test_what_cannot_be_meant_is_refused(toy, names, changes, message):
    with pytest.raises((RegistryError, ValueError), match=message):
        made(toy, section(toy, *names, **changes))


def test_a_misspelt_argument_names_its_head(toy):
    heads = {"oft": HEADS["oft"] | {"hiden_size": 3}, "gr00t": HEADS["gr00t"]}
    with pytest.raises(RegistryError, match="framework.action_model.oft: .*did you mean 'hidden_size'"):
        made(toy, section(toy, "oft") | {"action_model": heads})


def test_the_arguments_of_one_head_are_not_several_heads():
    assert has_several({"a": {"type": "MLP"}, "b": {}})
    assert not any(
        map(has_several, (None, {}, {"type": "MLP"}, {"settings": {"x": 1}}, {"type": "MLP", "a": {}}))
    )


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> dict:
    """Keys of OFT and of GR00T: queries that stand in the prompt, as does the state, and a vision encoder."""
    folder = tmp_path_factory.mktemp("own") / "dinov2"
    write_tiny_component("dinov2", folder, image_size=32)
    prompt = query_prompt(QUERY, 2, "{lang} {state}")
    return {
        "query_token": QUERY,
        "prompt": prompt,
        "vision_backbone": {"type": "DINOv2", "path": str(folder)},
    }


def test_arguments_of_their_frameworks_reach_the_heads_that_have_them(toy, own):
    """The loss, and the gradient of what is the framework's own, are those of the head alone."""
    names = ("oft", "gr00t", "pi")
    both = section(toy, *names, **own)
    together = made(toy, both)
    batch, given = together.prepare(toy.examples), drawn(toy, together, names)
    assert "pixels" in batch and together.parts.oft.in_prompt
    found = together(batch, **given)
    found["action_loss"].backward()
    for name, solo in solo_sections(both).items():
        alone = made(toy, solo)
        loss = alone(alone.prepare(toy.examples), **{k: v[name] for k, v in given.items()})["action_loss"]
        assert found[f"{name}/action_loss"].item() == pytest.approx(loss.item(), rel=1e-6, abs=1e-6)
        loss.backward()
        for key, weight in alone.named_parameters():
            if not key.startswith(("vlm.", "action_model.")):
                ours = together.get_parameter(f"parts.{name}.{key}").grad
                torch.testing.assert_close(ours, weight.grad, atol=1e-6, rtol=1e-4)
    assert together.get_parameter("parts.gr00t.vision_projection.weight").grad.any()


def test_arguments_of_their_frameworks_come_back_from_a_checkpoint(toy, own, tmp_path):
    model = made(toy, section(toy, "gr00t", "oft", **own)).eval()
    model.save_pretrained(tmp_path)
    again = Framework.from_pretrained(tmp_path)
    assert "path" not in again.config["vision_backbone"] and again.config["query_token"] == QUERY
    np.testing.assert_array_equal(*(toy.predict(each, toy.examples) for each in (model, again)))


def test_the_vision_encoder_of_a_head_belongs_to_the_vision_backbone(toy, own):
    model = made(toy, section(toy, "oft", "gr00t", freeze_vision_backbone=True, **own))
    assert not any(p.requires_grad for p in model.parts.gr00t.vision_encoder.parameters())
    assert all(p.requires_grad for p in model.parts.gr00t.vision_projection.parameters())
    weights = model.component("vision_backbone")
    assert len(weights) == len({id(p) for p in weights})


def test_another_head_acts_when_the_policy_is_used(toy, tmp_path):
    """One of the two is replaced; it samples what the trained one does, and the other stays what it was."""
    swapped = {"inference_model": {"action_model": {"gr00t": {"type": "FlowMatchingInference"}}}}
    model = made(toy, section(toy, "gr00t", "oft", **swapped)).eval()
    assert type(model.action_model.gr00t) is FlowMatchingHead
    model.save_pretrained(tmp_path)
    plain, used = (Framework.from_pretrained(tmp_path, inference=each) for each in (False, True))
    assert type(plain.action_model.gr00t) is FlowMatchingHead
    assert type(used.action_model.gr00t) is FlowMatchingInferenceHead
    assert type(used.action_model.oft) is type(plain.action_model.oft)
    ours, theirs = (toy.predict(each, toy.examples) for each in (used, plain))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    alone = {name: solo["inference_model"] for name, solo in solo_sections(model.config).items()}
    assert alone == {"gr00t": {"action_model": {"type": "FlowMatchingInference"}}, "oft": {}}
