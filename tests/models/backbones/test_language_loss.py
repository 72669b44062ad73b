"""The loss of conversations for every family, and what counts as a right answer."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from vla_bench.models.backbones.chat import ConversationPrepare, rounds
from vla_bench.models.backbones.language_loss import (
    answer_accuracy,
    generated_answers,
    language_loss,
    question_inputs,
    stop_and_lead,
)
from vla_bench.models.backbones.loading import load_vlm
from vla_bench.models.backbones.packing import pack
from vla_bench.models.backbones.tiny import BUILDERS

COMPOSED = ("siglip_linear_gemma", "eagle_qwen3")


def picture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (64, 64, 3), np.uint8))


def conversation(*turns, images=1, seed=0):
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": [{"type": "text", "text": text}]}
        for i, text in enumerate(turns)
    ]
    messages[0]["content"] = [{"type": "image"}] * images + messages[0]["content"]
    return {
        "messages": messages,
        "image": [picture(seed + i) for i in range(images)],
        "dataset": "d",
        "origin": turns[0],
    }


SAMPLES = [
    conversation("open the drawer", "press the button", "why?", "the window", seed=1),
    conversation("close it?", "yes", seed=2),
    conversation("which?", "the second of the two from the top", images=2, seed=3),
]


def check_mean_over_tokens(vlm):
    """Of a batch: each conversation alone, weighed by its trained tokens."""
    prepare = ConversationPrepare(vlm.prepare)
    with torch.no_grad():
        together = language_loss(vlm, prepare(SAMPLES))
        alone = [prepare([sample]) for sample in SAMPLES]
        counts = [int((batch["labels"] != -100).sum()) for batch in alone]
        total = sum(float(language_loss(vlm, batch)) * count for batch, count in zip(alone, counts))
    assert float(together) == pytest.approx(total / sum(counts), rel=1e-4)


@pytest.mark.parametrize("kind", BUILDERS)
def test_the_loss_is_the_mean_over_trained_tokens(backbones, kind):
    check_mean_over_tokens(backbones[kind])


@pytest.mark.parametrize("kind", COMPOSED)
def test_the_loss_of_composed_backbones(composed_backbones, kind):
    check_mean_over_tokens(composed_backbones[kind])


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "internvl", "smolvlm"])
def test_the_loss_is_the_cross_entropy_of_the_full_models_logits(backbones, kind):
    vlm = backbones[kind]
    batch = ConversationPrepare(vlm.prepare)([SAMPLES[0]])
    ids, labels = batch["inputs"]["input_ids"][0], batch["labels"][0]
    with torch.no_grad():
        logits = vlm.model(**batch["inputs"]).logits[0].log_softmax(-1)
    places = (labels != -100).nonzero().flatten()
    expected = -torch.stack([logits[place - 1, ids[place]] for place in places]).mean()
    assert float(language_loss(vlm, batch).detach()) == pytest.approx(float(expected), rel=1e-4)


def test_packed_and_padded_batches_have_one_loss(backbones):
    vlm = backbones["smolvlm"]
    batch = ConversationPrepare(vlm.prepare)(SAMPLES)
    with torch.no_grad():
        assert float(language_loss(vlm, pack(vlm, batch, 300))) == pytest.approx(
            float(language_loss(vlm, batch)), rel=1e-4
        )


def test_what_is_read_behind_the_final_norm_stays_so_along_the_residual_stream(home, with_larger_weights):
    usual, stream = (
        with_larger_weights(load_vlm(home / "qwen3_vl", hidden_states=h)) for h in ("final", "residual")
    )
    batch = ConversationPrepare(usual.prepare)(SAMPLES)
    with torch.no_grad():
        losses = [
            float(language_loss(vlm, b)) for vlm in (usual, stream) for b in (batch, pack(vlm, batch, 300))
        ]
    np.testing.assert_allclose(losses, losses[0], rtol=1e-4)


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "paligemma"])
def test_a_batch_of_which_nothing_is_left_has_no_loss_and_no_gradient(backbones, kind):
    vlm = backbones[kind]
    batch = ConversationPrepare(vlm.prepare, max_length=3)(SAMPLES)
    loss = language_loss(vlm, batch)
    weight = vlm.output_matrix().weight
    assert (
        loss.item() == 0
        and batch["inputs"] is None
        and set(batch["dropped"]) == {s["origin"] for s in SAMPLES}
    )
    if weight.requires_grad:
        assert not torch.autograd.grad(loss, weight)[0].any()


@pytest.mark.parametrize("kind", [k for k in BUILDERS if k != "florence2"])
def test_answers_are_those_of_transformers_own_generation(backbones, kind):
    vlm = backbones[kind]
    prepare = ConversationPrepare(vlm.prepare)
    each = [round for sample in SAMPLES[:2] for round in rounds(sample)]
    found = generated_answers(vlm, prepare, each)
    stop, _ = stop_and_lead(prepare)
    tokenizer = vlm.processor.tokenizer
    longest = max(len(tokenizer.encode(own, add_special_tokens=False)) for own, _ in found)
    for round, (own, given) in zip(each, found):
        assert own == round.answer
        ids = vlm.generate(question_inputs(prepare, [round]), max_new_tokens=longest)[0].tolist()
        ids = ids[: ids.index(stop)] if stop in ids else ids
        expected = tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert given.startswith(expected)


@pytest.mark.parametrize("kind", ["gemma3", "llava", "florence2"])
def test_a_backbone_that_has_learnt_its_conversations_answers_them(home, kind):
    vlm = load_vlm(home / kind)
    vlm.for_tokens()
    if (
        kind == "gemma3"
    ):  # whose published template calls the assistant "model", as its generation prompt does
        template = vlm.processor.chat_template
        role = "{{ 'model' if message['role'] == 'assistant' else message['role'] }}"
        vlm.processor.chat_template = template.replace("{{ message['role'] }}", role)
    prepare, samples = ConversationPrepare(vlm.prepare), SAMPLES[:2]
    before, batch = answer_accuracy(vlm, prepare, samples), prepare(samples)
    optimizer = torch.optim.AdamW([p for p in vlm.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(50):
        language_loss(vlm, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = answer_accuracy(vlm, prepare, samples)
    assert (before["accuracy"], after["accuracy"]) == (0, 1)
    assert after["answers"] == 3 and after["loss"] < 0.3 < before["loss"]
    assert after["perplexity"] == pytest.approx(math.exp(after["loss"]))


def test_judging_leaves_the_modes_as_they_were(backbones):
    vlm = backbones["qwen2_5_vl"]
    modules = list(vlm.modules())
    before = [module.training for module in modules]
    modules[5].training = True
    answer_accuracy(vlm, ConversationPrepare(vlm.prepare), SAMPLES[:1])
    assert modules[5].training
    modules[5].training = before[5]
    assert [module.training for module in modules] == before


def test_accuracy_does_not_depend_on_the_batch_and_over_long_conversations_are_left_out(backbones):
    vlm = backbones["internvl"]
    prepare = ConversationPrepare(vlm.prepare)
    one, all_ = (answer_accuracy(vlm, prepare, SAMPLES, batch_size=size) for size in (1, 8))
    assert one["loss"] == pytest.approx(all_["loss"], rel=1e-4) and one["tokens"] == all_["tokens"]
    lengths = prepare(SAMPLES)["inputs"]["attention_mask"].sum(1).tolist()
    short = answer_accuracy(vlm, ConversationPrepare(vlm.prepare, sorted(lengths)[0]), SAMPLES)
    assert short["answers"] == 1
    with pytest.raises(ValueError, match="none of the conversations is short enough"):
        answer_accuracy(vlm, ConversationPrepare(vlm.prepare, 3), SAMPLES)
