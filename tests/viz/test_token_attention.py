"""Attention is transformers' own, and what is computed from it is what the papers say."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from vla_bench.models.attention_map import mean_attention
from vla_bench.viz.known import known_scene
from vla_bench.viz.occlusion import unlabelled
from vla_bench.viz.token_attention import attention_of, norm_weighted, raw, rollout

SCENE = known_scene(np.random.default_rng(4))[0]


def of_transformers(model, folder):
    """Per layer [heads, L, L], by transformers' own class with its own eager attention."""
    theirs = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager").eval()
    inputs = model.to_batch([unlabelled(SCENE)])["inputs"]
    kinds = {"token_type_ids": torch.zeros_like(inputs["input_ids"])}  # PaliGemma: all of it is the question
    more = kinds if theirs.config.model_type == "paligemma" else {}
    with torch.no_grad():
        found = theirs(**inputs, **more, output_attentions=True).attentions
    return [layer[0] for layer in found]


@pytest.mark.parametrize("backbone", ["qwen2_5_vl", "paligemma"])
def test_the_maps_of_the_backbone_are_those_of_transformers(tiny, backbone):
    model, folder = tiny(backbone, "GR00T")
    ours = attention_of(model, SCENE).within
    theirs = of_transformers(model, folder)
    assert len(ours) == len(theirs) == 2
    for mine, other in zip(ours, theirs):
        assert float((mine - other).abs().max()) < 1e-6
    assert float((ours[0] - 1 / ours[0].shape[-1]).abs().max()) > 0.01  # not the uniform map


@pytest.mark.parametrize("backbone", ["qwen2_5_vl", "paligemma"])
def test_the_last_token_looks_where_transformers_says(tiny, backbone):
    model, folder = tiny(backbone, "LlavaVLA", type="Transformer", hidden_size=32)
    ours = raw(attention_of(model, SCENE))[0][0]
    theirs = torch.stack([layer.mean(0)[-1] for layer in of_transformers(model, folder)]).mean(0)
    assert float((ours - theirs).abs().max()) < 1e-6


def test_rollout_through_two_layers_equals_a_loop(tiny):
    model, folder = tiny("qwen2_5_vl", "LlavaVLA", type="Transformer", hidden_size=32)
    mix = np.eye(len(of_transformers(model, folder)[0][0]))
    for layer in of_transformers(model, folder):
        mixed = np.zeros_like(mix)
        weights = layer.numpy().mean(0)
        for i in range(len(mix)):
            mixed[i] = 0.5 * mix[i]
            for j in range(len(mix)):
                mixed[i] += 0.5 * weights[i, j] * mix[j]
        mix = mixed
    np.testing.assert_allclose(rollout(attention_of(model, SCENE))[0][0].numpy(), mix[-1], atol=1e-6)


def test_a_head_rolls_its_attention_out_over_the_layers_below(tiny):
    model, folder = tiny("qwen2_5_vl", "GR00T")
    found = attention_of(model, SCENE)
    eye = torch.eye(found.within[0].shape[-1])
    first, second = (0.5 * layer.mean(0) + 0.5 * eye for layer in of_transformers(model, folder))
    for step, ours in zip(found.maps, rollout(found)):
        by_hand = torch.stack([w.mean(0) @ (second @ first) for w in step]).mean(0)
        assert float((ours - by_hand).abs().max()) < 1e-6


def test_what_a_token_gives_is_what_its_layer_adds(tiny):
    """The vectors whose norms are taken sum, over the tokens, to the output of the attention itself."""
    model, _ = tiny("qwen2_5_vl", "LlavaVLA", type="Transformer", hidden_size=32)
    outputs = []
    layers = model.vlm.model.get_decoder().layers
    hooks = [
        each.self_attn.register_forward_hook(lambda m, i, out: outputs.append(out[0])) for each in layers
    ]
    model.requires_grad_(False)
    found = attention_of(model, SCENE, values=True)
    for hook in hooks:
        hook.remove()
    for weights, (values, out), expected in zip(found.maps[0], found.values, outputs):
        given = torch.einsum("hqn,hnd,hdw->qnw", weights, values, out)
        assert float((given.sum(1)[0] - expected[0, -1]).abs().max()) < 1e-5
    first = torch.einsum("hqn,hnd,hdw->qnw", found.maps[0][0], *found.values[0]).norm(dim=-1)
    assert float((norm_weighted(found, layers=0)[0] - first).abs().max()) < 1e-6


@pytest.mark.parametrize("name", ["OFT", "GR00T"])
def test_the_mean_of_all_is_the_attention_map_of_before(tiny, name):
    model, _ = tiny("paligemma", name)
    batch = model.to_batch([unlabelled(SCENE)])
    found = attention_of(model, SCENE)
    with torch.no_grad():
        before = model.prompt_attention(batch, torch.Generator().manual_seed(0))[0]
    mean = mean_attention([[w[None] for w in step] for step in found.maps])[0][found.prompt]
    assert float((mean - before).abs().max()) < 1e-6


def test_steps_layers_and_heads_are_chosen(tiny):
    model, _ = tiny("paligemma", "GR00T", num_layers=4, num_inference_timesteps=3)
    found = attention_of(model, SCENE)
    assert (len(found.maps), len(found.maps[0])) == (3, 2)
    chosen = raw(found, layers=[1], heads=[0, 2])
    for step, ours in zip(found.maps, chosen):
        assert torch.equal(ours, step[1][[0, 2]].mean(0))
    assert not torch.equal(chosen[0], chosen[1])
