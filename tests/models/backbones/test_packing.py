"""A conversation in a packed row has the loss that it has alone, for every family that can be packed."""

import numpy as np
import pytest
import torch
from PIL import Image

from vla_bench.models.backbones.chat import ConversationPrepare
from vla_bench.models.backbones.packing import PACKABLE, fill_rows, pack, packed_losses, packed_states

CAN = ("qwen2_5_vl", "qwen3_vl", "internvl", "idefics3", "smolvlm")
CANNOT = ("qwen3_5", "gemma3", "paligemma", "florence2", "llava")
COMPOSED = ("siglip_mlp_qwen2", "dinosiglip_fused_llama", "eagle_qwen3")


def picture(seed, size=(64, 64)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), np.uint8))


def conversation(question, answer, *images):
    parts = [{"type": "image"}] * len(images) + [{"type": "text", "text": question}]
    messages = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]
    return {"messages": messages, "image": list(images), "dataset": "d", "origin": question}


SAMPLES = [
    conversation("open the drawer", "press the button", picture(0)),
    conversation("close", "open"),
    conversation("which is it?", "the second, from the top", picture(1), picture(2, (96, 32))),
    conversation("is it open?", "yes"),
    conversation("and this?", "no, it is not", picture(3, (32, 64))),
]


def losses_alone(vlm, prepare):
    return torch.stack([vlm.lm_loss(b["inputs"], b["labels"]) for b in (prepare([s]) for s in SAMPLES)])


def check(vlm, most):
    """Losses and hidden states of packed conversations against each one alone, unpadded."""
    prepare = ConversationPrepare(vlm.prepare)
    with torch.no_grad():
        packed = pack(vlm, prepare(SAMPLES), most)
        assert len(packed["labels"]) < len(SAMPLES)
        torch.testing.assert_close(
            packed_losses(vlm, packed), losses_alone(vlm, prepare), rtol=1e-4, atol=1e-5
        )
        states = packed_states(vlm, packed)
        for number, sample in enumerate(SAMPLES):
            own = states[packed["segments"] == number]
            torch.testing.assert_close(own, vlm(prepare([sample])["inputs"]).hidden[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("most", [100, 400])
@pytest.mark.parametrize("kind", CAN)
def test_packed_losses_are_those_of_each_conversation_alone(backbones, kind, most):
    check(backbones[kind], most)


@pytest.mark.parametrize("kind", COMPOSED)
def test_packed_losses_of_composed_backbones(composed_backbones, kind):
    check(composed_backbones[kind], 200)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packing_does_not_depend_on_what_computes_the_attention(backbones, attention):
    vlm = backbones["qwen3_vl"]
    before = vlm.model.config._attn_implementation
    vlm.model.set_attn_implementation(attention)
    try:
        check(vlm, 400)
    finally:
        vlm.model.set_attn_implementation(before)


def test_positions_of_an_image_are_qwens_own(backbones):
    vlm = backbones["qwen2_5_vl"]
    prepare = ConversationPrepare(vlm.prepare)
    packed = pack(vlm, prepare(SAMPLES), 400)
    for number, sample in enumerate(SAMPLES):
        inputs = prepare([sample])["inputs"]
        own = packed["positions"][:, packed["segments"] == number]
        assert torch.equal(own, vlm.position_ids(inputs)[:, 0])
        assert (own[1:] != own[0]).any() == bool(
            sample["image"]
        )  # rows and columns differ from time in an image


def test_a_neighbour_changes_nothing(backbones):
    """The loss of the first conversation is bit for bit the same whatever stands behind and before it."""
    vlm = backbones["qwen2_5_vl"]
    prepare = ConversationPrepare(vlm.prepare)
    with torch.no_grad():
        one = packed_losses(vlm, pack(vlm, prepare([SAMPLES[1], SAMPLES[0]]), 400))
        other = packed_losses(vlm, pack(vlm, prepare([SAMPLES[1], SAMPLES[4]]), 400))
    torch.testing.assert_close(one[0], other[0], rtol=1e-6, atol=0)


def test_gradients_are_those_of_the_padded_batch(backbones):
    vlm = backbones["qwen3_vl"]
    batch = ConversationPrepare(vlm.prepare)(SAMPLES)
    weight = vlm.model.get_decoder().layers[0].self_attn.q_proj.weight
    packed = packed_losses(vlm, pack(vlm, batch, 400))
    counts = (batch["labels"] != -100).sum(1)
    (packed_gradient,) = torch.autograd.grad((packed * counts).sum() / counts.sum(), weight)
    (padded_gradient,) = torch.autograd.grad(vlm.lm_loss(batch["inputs"], batch["labels"]), weight)
    torch.testing.assert_close(packed_gradient, padded_gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", CANNOT)
def test_a_backbone_that_cannot_is_refused_with_the_key(backbones, kind):
    vlm = backbones[kind]
    assert not isinstance(vlm, PACKABLE)
    with pytest.raises(
        ValueError, match="cannot keep the conversations .*datasets.vlm_data.data_flatten: false"
    ):
        pack(vlm, {}, 100)


def test_rows_are_filled_in_order_and_none_is_longer_than_allowed():
    rng = np.random.default_rng(0)
    for _ in range(50):
        lengths, most = rng.integers(1, 60, rng.integers(1, 30)).tolist(), int(rng.integers(60, 200))
        rows = fill_rows(lengths, most)
        assert [number for row in rows for number in row] == list(range(len(lengths)))
        totals = [sum(lengths[number] for number in row) for row in rows]
        assert max(totals) <= most
        assert all(total + lengths[after[0]] > most for total, after in zip(totals, rows[1:]))


def test_a_conversation_longer_than_a_row_is_refused(backbones):
    vlm = backbones["qwen2_5_vl"]
    with pytest.raises(ValueError, match="conversation 0 has .* tokens, a row has 10"):
        pack(vlm, ConversationPrepare(vlm.prepare)(SAMPLES), 10)
