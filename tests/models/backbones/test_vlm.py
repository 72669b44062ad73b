"""What every backbone of transformers promises behind the VLM interface, against transformers' own calls.

One set of tests over all kinds, at 64 pixels, width 32 and two layers. References are computed one unpadded sample at a
time by the full model with its logits, from the processor's own tensors.
"""

import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import DynamicCache

from vla_bench.models.backbones.loading import load_vlm
from vla_bench.models.backbones.tiny import BUILDERS, write_tiny
from vla_bench.models.backbones.vlm import VLM

NO_CACHE = {"qwen3_5", "gemma3", "florence2"}


every_kind = pytest.mark.parametrize("kind", BUILDERS)


ANSWERS = torch.tensor([[20, 31, 42], [25, 36, 47], [30, 41, 52]])


VALID = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]]).bool()


ALLOWED = torch.arange(15, 75)


def own_inputs(vlm: VLM, images: list, text: str) -> dict:
    """One sample's tensors from the processor itself, with everything that it returns."""
    if vlm.model_type == "florence2":  # whose processor takes one image; test_florence_... compares that case
        return dict(vlm.prepare([images], [text]))
    if vlm.model_type == "paligemma":
        prompt, options = "<image>" * len(images) + text, {}
    else:
        content = [{"type": "image"}] * len(images) + [{"type": "text", "text": text}]
        chat = [{"role": "user", "content": content}]
        prompt = vlm.processor.apply_chat_template(chat, add_generation_prompt=True)
        options = {"crop_to_patches": False} if vlm.model_type == "internvl" else {}
    own = dict(vlm.processor(text=[prompt], images=[images], return_tensors="pt", **options))
    own.pop("labels", None)
    return own


def grown(vlm: VLM, own: dict, ids: torch.Tensor) -> dict:
    """The tensors with an answer of ordinary tokens behind the prompt."""
    longer = dict(own, input_ids=torch.cat([own["input_ids"], ids], 1))
    for name, fill in (("attention_mask", 1), ("mm_token_type_ids", 0), ("token_type_ids", 0)):
        if name in own:
            longer[name] = torch.cat([own[name], torch.full_like(ids, fill)], 1)
    if vlm.model_type == "paligemma":  # 0 is the prefix, 1 an answer
        behind = torch.arange(longer["input_ids"].shape[1]) >= own["input_ids"].shape[1]
        longer["token_type_ids"] = behind.long()[None]
    return longer


def answer_logits(vlm: VLM, images: list, text: str, answer: torch.Tensor) -> torch.Tensor:
    """The full model's logits for each token of an answer and the one behind it, [A + 1, V], without any cache."""
    own = own_inputs(vlm, images, text)
    if vlm.model_type == "florence2":
        start = torch.tensor([[vlm.text_config.decoder_start_token_id]])
        return vlm.model(
            **own, decoder_input_ids=torch.cat([start, answer[None]], 1), use_cache=False
        ).logits[0]
    longer = grown(vlm, own, answer[None])
    return vlm.model(**longer, use_cache=False).logits[0, own["input_ids"].shape[1] - 1 :]


def padded(inputs: dict, side: str) -> dict:
    """The same batch with its padding on one side."""
    shape, moved = inputs["input_ids"].shape, dict(inputs)
    for name, value in inputs.items():
        if value.shape == shape:
            rows = []
            for row, mask in zip(value, inputs["attention_mask"].bool()):
                parts = (row[~mask], row[mask])
                rows.append(torch.cat(parts if side == "left" else parts[::-1]))
            moved[name] = torch.stack(rows)
    return moved


def assert_close(one, other, atol=1e-5):
    torch.testing.assert_close(one, other, atol=atol, rtol=1e-5)


@every_kind
@torch.no_grad()
def test_hidden_states_are_those_of_the_full_model(backbones, kind, observed):
    vlm = backbones[kind]
    for images, text in zip(observed.images, observed.texts):
        own = own_inputs(vlm, images, text)
        if kind == "paligemma":
            own["token_type_ids"] = torch.zeros_like(own["input_ids"])
        if kind == "florence2":
            start = torch.tensor([[vlm.text_config.decoder_start_token_id]])
            output = vlm.model(**own, decoder_input_ids=start, output_hidden_states=True)
            theirs = output.encoder_hidden_states
        else:
            theirs = vlm.model(**own, output_hidden_states=True).hidden_states
        ours = vlm(vlm.prepare([images], [text]), layers="all")
        assert ours.layers[-1].equal(ours.hidden) and len(ours.layers) == vlm.num_layers
        for mine, their in zip(ours.layers, theirs[1:], strict=True):
            assert_close(mine, their)


@every_kind
@torch.no_grad()
def test_attention_sums_to_one_over_what_may_be_seen(backbones, kind, observed):
    vlm = backbones[kind]
    inputs = padded(vlm.prepare(observed.images, observed.texts), "right") | {
        "image_mask": torch.tensor([[True, False]] * 3)
    }
    plain, features = vlm(inputs, observed.extra), vlm(inputs, observed.extra, attention=True)
    assert_close(features.extra, plain.extra)
    full = [k for k in getattr(vlm.text_config, "layer_types", None) or ["full"] * 2 if "linear" not in k]
    assert len(features.attention) == len(full)
    for weights in features.attention:
        assert weights.shape[2] == 3 and weights.shape[3] == features.mask.shape[1]
        assert_close(weights.sum(-1), torch.ones(weights.shape[:3]))
        hidden = ~features.mask[:, None, None, :].expand_as(weights)
        assert float(weights[hidden].abs().max()) == 0.0


@every_kind
@torch.no_grad()
def test_the_cache_continues_the_sequence_or_says_why_there_is_none(backbones, kind, observed):
    vlm = backbones[kind]
    inputs, token = vlm.prepare(observed.images, observed.texts), torch.tensor([[20], [31], [42]])
    embedded = vlm.model.get_input_embeddings()(token)
    if kind in NO_CACHE:
        assert vlm.sizes.head_dim is None and vlm.sizes.rope_theta is None
        with pytest.raises(ValueError, match="keys and values"):
            vlm(inputs, cache=True)
        return
    features, cache = vlm(inputs, cache=True), DynamicCache()
    assert len(features.cache) == vlm.num_layers
    for layer, (keys, values) in enumerate(features.cache):
        assert keys.shape == (
            3,
            vlm.sizes.num_key_value_heads,
            inputs["input_ids"].shape[1],
            vlm.sizes.head_dim,
        )
        cache.update(keys, values, layer)
    positions = features.next_position[:, None]
    axes = vlm.position_ids(inputs).ndim == 3
    continued = vlm.model.model(
        inputs_embeds=embedded,
        attention_mask=torch.cat([features.mask, torch.ones(3, 1, dtype=torch.bool)], 1).long(),
        position_ids=positions.expand(3, 3, 1) if axes else positions,
        past_key_values=cache,
    ).last_hidden_state
    assert_close(continued, vlm(inputs, embedded, causal_extra=True).extra)


@every_kind
@torch.no_grad()
def test_decoding_is_the_likeliest_answer_of_the_full_model(backbones, kind, observed):
    vlm = backbones[kind]
    for side in ("left", "right"):
        found = vlm.decode(
            padded(vlm.prepare(observed.images, observed.texts), side), max_tokens=4, allowed=ALLOWED
        )
        for row, images, text in zip(found, observed.images, observed.texts):
            said = torch.zeros(0, dtype=torch.long)
            for _ in range(4):
                logits = answer_logits(vlm, images, text, said)[-1]
                said = torch.cat([said, ALLOWED[logits[ALLOWED].argmax()][None]])
            assert row.tolist() == said.tolist()
    stop = int(found[0, 1])
    stopped = vlm.decode(
        vlm.prepare(observed.images, observed.texts), max_tokens=4, allowed=ALLOWED, stop=stop
    )
    first = found[0].tolist().index(stop)
    assert stopped[0].tolist() == found[0, :first].tolist() + [-1] * (stopped.shape[1] - first)


@every_kind
@torch.no_grad()
def test_the_answers_loss_is_the_cross_entropy_of_full_logits(backbones, kind, observed):
    vlm, terms = backbones[kind], []
    for images, text, answer, valid in zip(observed.images, observed.texts, ANSWERS, VALID):
        answer = answer[valid]
        scores = answer_logits(vlm, images, text, answer)[: len(answer)].double().log_softmax(-1)
        terms += [-scores[i, token].item() for i, token in enumerate(answer)]
    for side in ("left", "right"):
        loss = vlm.answer_loss(padded(vlm.prepare(observed.images, observed.texts), side), ANSWERS, VALID)
        assert float(loss) == pytest.approx(np.mean(terms), rel=1e-5)


@every_kind
@torch.no_grad()
def test_the_language_loss_is_that_of_an_answer_in_the_same_row(backbones, kind, observed):
    vlm = backbones[kind]
    longer = grown(vlm, own_inputs(vlm, observed.images[0], observed.texts[0]), ANSWERS[:1])
    labels = longer["input_ids"].clone()
    labels[:, :-3] = -100
    logits = answer_logits(vlm, observed.images[0], observed.texts[0], ANSWERS[0])[:3]
    expected = torch.nn.functional.cross_entropy(logits, ANSWERS[0])
    assert float(vlm.lm_loss(longer, labels)) == pytest.approx(float(expected), rel=1e-4)


@every_kind
def test_features_compute_no_logits(backbones, kind, monkeypatch, observed):
    vlm = backbones[kind]

    def refuse(*args):
        raise AssertionError("vocabulary logits were computed")

    monkeypatch.setattr(vlm.model.get_output_embeddings(), "forward", refuse)
    inputs = vlm.prepare(observed.images, observed.texts)
    with torch.no_grad():
        vlm(inputs, observed.extra, layers="all", attention=True)
    with pytest.raises(AssertionError, match="vocabulary"):
        vlm.answer_loss(inputs, ANSWERS, VALID)


@every_kind
def test_every_trainable_parameter_is_reached(home, kind, observed):
    vlm = load_vlm(home / kind).train()
    inputs = vlm.prepare(observed.images, observed.texts)

    def unreached() -> list[str]:
        return [
            name
            for name, parameter in vlm.named_parameters()
            if parameter.requires_grad and (parameter.grad is None or not parameter.grad.any())
        ]

    vlm(inputs, observed.extra).extra.pow(2).sum().backward()
    assert unreached() == []
    vlm.zero_grad()
    vlm.for_tokens()
    vlm.answer_loss(inputs, ANSWERS, VALID).backward()
    assert unreached() == []


@every_kind
@torch.no_grad()
def test_configuration_and_weights_make_the_same_backbone(backbones, kind, tmp_path, observed):
    vlm = backbones[kind]
    vlm.save_config(tmp_path)
    again = load_vlm(tmp_path, load_weights=False)
    assert type(again) is type(vlm)
    again.load_state_dict(vlm.state_dict())
    inputs, others = (
        vlm.prepare(observed.images, observed.texts),
        again.eval().prepare(observed.images, observed.texts),
    )
    assert inputs.keys() == others.keys() and all(others[name].equal(inputs[name]) for name in inputs)
    assert again(others, observed.extra).extra.equal(vlm(inputs, observed.extra).extra)
    assert again.image_grids(others) == vlm.image_grids(inputs)


class Prepared:
    """Batches of every kind, each made by a `prepare` that travelled as bytes."""

    def __init__(self, frozen: list[bytes], images: list, texts: tuple[str, ...]):
        self.frozen, self.images, self.texts = frozen, images, texts

    def __len__(self) -> int:
        return len(self.frozen)

    def __getitem__(self, index: int) -> dict:
        return pickle.loads(self.frozen[index])(self.images, self.texts)


def test_prepare_gives_the_same_tensors_in_a_worker(backbones, observed):
    prepares = [vlm.prepare for vlm in backbones.values()]
    assert not any(isinstance(v, torch.nn.Module) for prepare in prepares for v in vars(prepare).values())
    frozen = Prepared([pickle.dumps(prepare) for prepare in prepares], observed.images, observed.texts)
    loader = DataLoader(frozen, batch_size=None, num_workers=1)
    for vlm, there in zip(backbones.values(), loader, strict=True):
        here = vlm.prepare(observed.images, observed.texts)
        assert here.keys() == there.keys() and all(there[name].equal(here[name]) for name in here)


@every_kind
@torch.no_grad()
def test_one_camera_is_enough(backbones, kind, observed):
    vlm = backbones[kind]
    inputs = vlm.prepare([images[:1] for images in observed.images], observed.texts)
    assert [len(row) for row in vlm.image_grids(inputs)] == [1, 1, 1]
    one, two = (
        vlm(inputs, observed.extra).extra,
        vlm(vlm.prepare(observed.images, observed.texts), observed.extra).extra,
    )
    assert one.isfinite().all() and (one - two).abs().amax((1, 2)).min() > 1e-3


@every_kind
@torch.no_grad()
def test_reserved_rows_are_tokens_that_only_actions_use(backbones, kind, observed):
    vlm = backbones[kind]
    size = vlm.sizes.vocab_size
    assert size == len(vlm.processor.tokenizer) + 8
    codes = torch.arange(size - 8, size)
    inputs = vlm.prepare(observed.images, observed.texts)
    said = vlm.decode(inputs, max_tokens=2, allowed=codes)
    assert said.shape == (3, 2) and ((said >= size - 8) & (said < size)).all()
    assert vlm.answer_loss(inputs, codes[:3].expand(3, 3), VALID).isfinite()


@every_kind
@torch.no_grad()
def test_other_image_sizes(tmp_path, kind, observed):
    vlm = load_vlm(write_tiny(kind, tmp_path, image_size=96, corpus=observed.texts, **observed.sizes)).eval()
    inputs = vlm.prepare([[observed.image(0, 96, 96), observed.image(1, 120, 120)]], observed.texts[:1])
    places = vlm.image_token_mask(inputs)
    assert int(places.sum()) == sum(h * w for h, w in vlm.image_grids(inputs)[0])
    assert vlm(inputs, observed.extra[:1]).extra.isfinite().all()
