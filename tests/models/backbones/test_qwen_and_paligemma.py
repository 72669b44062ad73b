"""Qwen2.5-VL, Qwen3-VL and PaliGemma against transformers itself, with larger weights and three samples."""

import numpy as np
import pytest
import torch

from vla_bench.models.backbones.loading import load_vlm
from vla_bench.models.backbones.vlm import VLM

KINDS = ("qwen2_5_vl", "qwen3_vl", "paligemma")


every_kind = pytest.mark.parametrize("kind", KINDS)


def type_ids(vlm: VLM, inputs: dict, answer: torch.Tensor | None = None) -> dict:
    """What transformers wants to be told besides `prepare`'s tensors: PaliGemma's prefix is 0, an answer 1."""
    if vlm.model_type != "paligemma":
        return {}
    return {"token_type_ids": torch.zeros_like(inputs["input_ids"]) if answer is None else answer.long()}


def extended(vlm: VLM, inputs: dict, ids: torch.Tensor) -> dict:
    """The inputs of one unpadded sample with ordinary tokens behind it."""
    longer = dict(inputs, input_ids=torch.cat([inputs["input_ids"], ids], 1))
    for name, fill in (("attention_mask", 1), ("mm_token_type_ids", 0)):
        if name in inputs:
            longer[name] = torch.cat([inputs[name], torch.full_like(ids, fill)], 1)
    return longer | type_ids(vlm, longer)


@every_kind
@torch.no_grad()
def test_hidden_states_are_those_of_transformers(backbones, kind, observed):
    vlm = backbones[kind]
    for image, text in zip(observed.images, observed.texts):
        inputs = vlm.prepare([image], [text])
        own = vlm.model(**inputs, **type_ids(vlm, inputs), output_hidden_states=True)
        ours = vlm(inputs, layers="all")
        torch.testing.assert_close(ours.hidden, own.hidden_states[-1], atol=1e-5, rtol=0)
        assert len(ours.layers) == vlm.num_layers and ours.layers[-1].equal(ours.hidden)
        for mine, theirs in zip(ours.layers, own.hidden_states[1:], strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)


@every_kind
@torch.no_grad()
def test_extra_tokens_stand_where_ordinary_tokens_would(backbones, kind, observed):
    # Embeddings of ordinary tokens as `extra`, in a padded batch, against those tokens in transformers' own call.
    vlm = backbones[kind]
    tokens = torch.tensor([[20, 31, 42]])
    extra = vlm.model.get_input_embeddings()(tokens).expand(len(observed.texts), -1, -1)
    together = vlm(vlm.prepare(observed.images, observed.texts), extra).extra
    for i, (image, text) in enumerate(zip(observed.images, observed.texts)):
        own = vlm.model.model(**extended(vlm, vlm.prepare([image], [text]), tokens)).last_hidden_state
        torch.testing.assert_close(together[i], own[0, -3:], atol=2e-5, rtol=0)
    assert (together[0] - together[1]).abs().max() > 1e-2


@every_kind
@torch.no_grad()
def test_the_padding_side_does_not_reach_the_extra_tokens(backbones, kind, observed):
    vlm = backbones[kind]
    tokenizer, found, masks = vlm.processor.tokenizer, [], []
    before = tokenizer.padding_side
    try:
        for tokenizer.padding_side in ("left", "right"):
            inputs = vlm.prepare(observed.images, observed.texts)
            found.append(vlm(inputs, observed.extra).extra)
            masks.append(inputs["attention_mask"])
    finally:
        tokenizer.padding_side = before
    assert not masks[0].equal(masks[1]), "nothing was padded, so nothing was tested"
    torch.testing.assert_close(found[0], found[1], atol=2e-5, rtol=0)
    shifted = vlm(vlm.prepare(observed.images, observed.texts), observed.extra.flip(1)).extra.flip(1)
    assert (shifted - found[0]).abs().max() > 1e-3, "positions of extra tokens must matter"


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
@torch.no_grad()
def test_what_a_former_call_left_behind_does_not_leak(backbones, kind, observed):
    vlm = backbones[kind]
    inputs = vlm.prepare(observed.images, observed.texts)
    before = vlm(inputs, observed.extra).extra
    vlm.model(**vlm.prepare([[observed.image(9, 32, 64)]], ["close"]))
    left = vlm.model.model.rope_deltas
    assert left is not None, "transformers keeps no rope_deltas any more, so this test shows nothing"
    assert vlm(inputs, observed.extra).extra.equal(before)
    vlm.model.model.rope_deltas = torch.full_like(left, 50)
    assert vlm(inputs, observed.extra).extra.equal(before)
    alone = {name: inputs[name][:1] for name in ("input_ids", "attention_mask")}
    alone["input_ids"] = alone["input_ids"].clamp(max=50)  # text only: no image to place
    first = vlm(alone).hidden
    vlm.model.model.rope_deltas = None
    assert vlm(alone).hidden.equal(first)


@every_kind
def test_logits_are_computed_for_a_language_loss_only(backbones, kind, monkeypatch, observed):
    vlm = backbones[kind]

    def refuse(*args):
        raise AssertionError("vocabulary logits were computed")

    monkeypatch.setattr(vlm.model.get_output_embeddings(), "forward", refuse)
    inputs = vlm.prepare(observed.images, observed.texts)
    with torch.no_grad():
        vlm(inputs, observed.extra, attention=True)
    with pytest.raises(AssertionError, match="vocabulary"):
        vlm.lm_loss(inputs, inputs["input_ids"])


@every_kind
@torch.no_grad()
def test_language_loss_is_the_cross_entropy_of_full_logits(backbones, kind, observed):
    vlm = backbones[kind]
    inputs = vlm.prepare(observed.images, observed.texts)
    labels, answer = torch.full_like(inputs["input_ids"], -100), []
    for row, mask in enumerate(inputs["attention_mask"]):  # each sample's last tokens, 2, 3 and 4 of them
        answer.append(mask.nonzero().flatten()[-(row + 2) :])
        labels[row, answer[-1]] = inputs["input_ids"][row, answer[-1]]
    terms = []
    for row, (image, text) in enumerate(
        zip(observed.images, observed.texts)
    ):  # one by one, so without any padding
        single = vlm.prepare([image], [text])
        count = len(answer[row])
        is_answer = torch.arange(single["input_ids"].shape[1])[None] >= single["input_ids"].shape[1] - count
        logits = vlm.model(**single, **type_ids(vlm, single, is_answer)).logits[0].double().numpy()
        for place in range(len(logits) - count, len(logits)):
            scores = logits[place - 1] - logits[place - 1].max()
            terms.append(np.log(np.exp(scores).sum()) - scores[int(single["input_ids"][0, place])])
    assert float(vlm.lm_loss(inputs, labels)) == pytest.approx(np.mean(terms), rel=1e-5)


@every_kind
@torch.no_grad()
def test_generation_continues_the_features(backbones, kind, observed):
    # The hidden state that the first new token is read from, caught in front of the output matrix.
    vlm, caught = backbones[kind], []
    head = vlm.model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, args: caught.append(args[0][:, -1]))
    try:
        for image, text in zip(observed.images, observed.texts):
            inputs = vlm.prepare([image], [text])
            caught.clear()
            assert vlm.generate(inputs, max_new_tokens=2).shape[1] in (1, 2)
            torch.testing.assert_close(caught[0], vlm(inputs).hidden[:, -1], atol=1e-4, rtol=0)
    finally:
        hook.remove()


@every_kind
@pytest.mark.parametrize("side", ["left", "right"])
def test_generation_in_a_padded_batch_is_generation_alone(home, kind, side, observed, with_larger_weights):
    vlm = with_larger_weights(load_vlm(home / kind))
    vlm.processor.tokenizer.padding_side = side
    inputs, firsts = vlm.prepare(observed.images, observed.texts), []
    assert (inputs["attention_mask"][:, -1 if side == "right" else 0] == 0).any()
    before = {name: value.clone() for name, value in inputs.items()}
    vlm.model.get_output_embeddings().register_forward_pre_hook(lambda _, args: firsts.append(args[0][:, -1]))
    together = vlm.generate(inputs, max_new_tokens=3)
    state = firsts[0]
    assert all(inputs[name].equal(value) for name, value in before.items()), "the caller's batch was changed"
    for i, (image, text) in enumerate(zip(observed.images, observed.texts)):
        firsts.clear()
        alone = vlm.generate(vlm.prepare([image], [text]), max_new_tokens=3)
        torch.testing.assert_close(state[i], firsts[0][0], atol=1e-4, rtol=0)
        assert together[i, : alone.shape[1]].tolist() == alone[0].tolist()
