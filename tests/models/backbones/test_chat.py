"""Which tokens of a conversation are trained, for every family, against a computation of its own.

The package finds the answers by replacing them in the template and moves characters to tokens. Here they are found
from token ids alone: an answer begins where the prompt that asks for it ends, and ends with the token that stops it.
"""

import copy
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from vla_bench.models.backbones.chat import (
    ChatTemplate,
    ConversationPrepare,
    load_prepare,
    marked_text,
    rounds,
    uses_chat_template,
)

CHAT = ("qwen2_5_vl", "qwen3_vl", "qwen3_5", "gemma3", "internvl", "idefics3", "smolvlm", "llava")
PROMPT = ("paligemma", "florence2")
COMPOSED = ("siglip_linear_gemma", "siglip_mlp_qwen2", "dinosiglip_fused_llama", "eagle_qwen3")

# Templates as the published checkpoints have them, shortened where tools and video would stand.
QWEN = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{%- for message in messages -%}"
    "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('roles must alternate') }}"
    "{%- endif -%}{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}"
    "{{ '<start_of_turn>' + role + '\n' }}{%- if message['content'] is string -%}{{ message['content'] | trim }}"
    "{%- else -%}{%- for item in message['content'] -%}{%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}"
    "{%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{{ '<end_of_turn>\n' }}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)
SMOL = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
LLAVA = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
THINKING = (  # thoughts are shown for the last answer only, as in Qwen3.5
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
PUBLISHED = [
    ("qwen2_5_vl", QWEN),
    ("qwen3_vl", QWEN),
    ("gemma3", GEMMA),
    ("smolvlm", SMOL),
    ("idefics3", SMOL),
    ("llava", LLAVA),
]
TOKENS = ("input_ids", "attention_mask")
STOPS = {
    "gemma3": "<end_of_turn>",
    "idefics3": "<end_of_utterance>",
    "smolvlm": "<end_of_utterance>",
    "llava": "</s>",
}


def picture(seed, size=(64, 64)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), np.uint8))


def conversation(*turns, name="file.json", number=0):
    """A conversation of texts; a leading number in a question says how many images it shows."""
    messages, images = [], []
    for place, text in enumerate(turns):
        shown = int(text[0]) if text[0].isdigit() else 0
        text = text.removeprefix(str(shown)) if shown else text
        images += [picture(10 * number + len(images) + i) for i in range(shown)]
        content = [{"type": "image"}] * shown + [{"type": "text", "text": text}]
        messages.append({"role": ("user", "assistant")[place % 2], "content": content})
    return {"messages": messages, "image": images, "dataset": "d", "origin": f"{name} entry {number}"}


SAMPLES = [
    conversation("1open the drawer", "the window and the button", number=0),
    conversation("close", "open", "press", "the button", "top?", "yes, from the top", number=1),
    conversation("2which one?", "the second.", "1and now?", "press it", number=2),
    conversation("1say nothing but: open", "open", "1say: open open", "open open", number=3),
]


def with_template(prepare, template):
    """The same preparation under another chat template."""
    processor = copy.copy(prepare.processor)
    processor.chat_template = template
    return type(prepare)(processor)


def labels_from_prompts(prepare, sample, stop):
    """The trained ids of one conversation, with their places, from ids of prompts alone."""
    render = prepare.processor.apply_chat_template
    text, tokenizer = render(sample["messages"]), prepare.processor.tokenizer
    if ends_without := stop not in text:  # the last answer is followed by the tokenizer's own end
        text = text.rstrip() + stop
    ids = prepare.encode([text], [sample["image"]])["input_ids"][0].tolist()
    end, expected, shown = tokenizer.convert_tokens_to_ids(stop), [-100] * len(ids), 0
    for place, message in enumerate(sample["messages"]):
        shown += sum(part["type"] == "image" for part in message["content"])
        if message["role"] == "assistant":
            asked = render(sample["messages"][:place], add_generation_prompt=True)
            prompt = prepare.encode([asked], [sample["image"][:shown]])["input_ids"][0].tolist()
            assert ids[: len(prompt)] == prompt
            answer, begin = message["content"][0]["text"], len(prompt)
            last = begin
            while tokenizer.decode(ids[begin:last]).strip() != answer:
                last += 1
            last += last < len(ids) and ids[last] == end
            if not ends_without or place + 1 == len(sample["messages"]):
                expected[begin:last] = ids[begin:last]
    return ids, expected


def up_to(sample, round):
    """A conversation that ends with this round."""
    return sample | {"messages": sample["messages"][: len(round.messages) + 1], "image": round.images}


@pytest.fixture(scope="session")
def prepares(home):
    return {kind: load_prepare(home / kind) for kind in (*CHAT, *PROMPT)}


@pytest.mark.parametrize(("kind", "template"), [*((k, None) for k in CHAT if k != "gemma3"), *PUBLISHED])
@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s["origin"])
def test_exactly_what_follows_the_prompt_is_trained(prepares, kind, template, sample):
    prepare = with_template(prepares[kind], template) if template else prepares[kind]
    batch, stop = ConversationPrepare(prepare)([sample]), STOPS.get(kind, "<|im_end|>")
    rows = [up_to(sample, round) for round in rounds(sample)] if kind == "llava" else [sample]
    assert len(batch["labels"]) == len(rows)
    for own, found, mask, labels in zip(rows, *(batch["inputs"][n] for n in TOKENS), batch["labels"]):
        ids, expected = labels_from_prompts(prepare, own, stop)
        assert found[mask.bool()].tolist() == ids
        assert labels[mask.bool()].tolist() == expected


@pytest.mark.parametrize("kind", CHAT)
def test_a_batch_has_the_rows_of_its_conversations(prepares, kind):
    """Images of several sizes, texts alone, padding on the backbone's side: every row as alone."""
    chat = ConversationPrepare(prepares[kind])
    batch, alone = chat(SAMPLES), [chat([sample]) for sample in SAMPLES]
    seen = dict.fromkeys(range(len(SAMPLES)), 0)
    for row, number in enumerate(batch["sample"].tolist()):
        own, there = seen[number], batch["inputs"]["attention_mask"][row].bool()
        mask = alone[number]["inputs"]["attention_mask"][own].bool()
        assert torch.equal(
            batch["inputs"]["input_ids"][row][there], alone[number]["inputs"]["input_ids"][own][mask]
        )
        assert torch.equal(batch["labels"][row][there], alone[number]["labels"][own][mask])
        assert (batch["labels"][row][~there] == -100).all()
        seen[number] += 1
    assert list(seen.values()) == [len(each["labels"]) for each in alone]


@pytest.mark.parametrize("kind", CHAT)
def test_inputs_are_those_of_every_other_prompt(prepares, kind):
    """The pixels and ids are what the backbone's own call makes of the rendered text."""
    prepare = prepares[kind]
    samples = [up_to(sample, rounds(sample)[0]) for sample in SAMPLES]
    texts = [ChatTemplate(prepare).spans(sample["messages"])[0] for sample in samples]
    expected = prepare.encode(texts, [sample["image"] for sample in samples])
    made = ConversationPrepare(prepare)(samples)["inputs"]
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[name], expected[name]) for name in expected)


def test_an_image_in_a_later_round_moves_the_labels_behind_it_only(prepares):
    without = conversation("1first", "open", "second", "the top")
    image = conversation("1first", "open", "1second", "the top")
    chat = ConversationPrepare(prepares["internvl"])
    spans = [(chat([s])["labels"][0] != -100).nonzero().flatten().tolist() for s in (without, image)]
    own = len(prepares["internvl"].processor.tokenizer.encode("open<|im_end|>"))
    assert spans[0][:own] == spans[1][:own]
    moved = {later - earlier for earlier, later in zip(spans[0][own:], spans[1][own:])}
    assert len(moved) == 1 and moved.pop() > 4


def test_thoughts_of_earlier_turns_that_the_template_drops_are_no_trouble(prepares):
    prepare = with_template(prepares["qwen3_5"], THINKING)
    sample = conversation("1what?", "open", "why?", "the top")
    batch = ConversationPrepare(prepare)([sample])
    labels, decode = batch["labels"][0], prepare.processor.tokenizer.decode
    assert decode(labels[labels != -100]) == "open<|im_end|>\n</think>\n\nthe top<|im_end|>"


def test_a_system_text_is_not_trained(prepares):
    sample = conversation("what?", "open")
    sample["messages"].insert(0, {"role": "system", "content": [{"type": "text", "text": "be short"}]})
    labels = ConversationPrepare(with_template(prepares["qwen2_5_vl"], QWEN))([sample])["labels"][0]
    assert prepares["qwen2_5_vl"].processor.tokenizer.decode(labels[labels != -100]) == "open<|im_end|>"


def test_an_answer_that_repeats_the_question_is_found_at_its_place(prepares):
    sample = conversation("open the drawer", "open the drawer", "open the drawer", "open the drawer")
    for kind in CHAT:
        batch = ConversationPrepare(prepares[kind])([sample])
        shown = marked_text(prepares[kind], batch["inputs"]["input_ids"][-1], batch["labels"][-1])
        answers = ("⟦ open the drawer</s>⟧",) if kind == "llava" else ("⟦open the drawer<",) * 2
        assert shown.count("⟦") == len(answers) and shown.count("open the drawer") == 4
        places = [place for place in range(len(shown)) if shown.startswith(answers[0], place)]
        assert len(places) == len(answers) and shown[: places[-1]].count("open the drawer") == 3


@pytest.mark.parametrize("change", ["| upper", "| replace('button', 'knob')", "| truncate(5)"])
def test_a_template_that_changes_answers_is_refused(prepares, change):
    template = prepares["qwen3_vl"].processor.chat_template.replace("part['text']", f"part['text'] {change}")
    prepare = with_template(prepares["qwen3_vl"], template)
    with pytest.raises(ValueError, match="file.json entry 0: its chat template (changes|leaves)"):
        ConversationPrepare(prepare)([SAMPLES[0]])


def test_a_template_that_cannot_take_the_roles_names_the_entry(prepares):
    sample = conversation("what?", "open", number=5)
    sample["messages"].insert(0, {"role": "system", "content": [{"type": "text", "text": "be short"}]})
    with pytest.raises(ValueError, match="file.json entry 5: roles must alternate"):
        ConversationPrepare(with_template(prepares["gemma3"], GEMMA))([sample])


@pytest.mark.parametrize("kind", [*CHAT, *PROMPT])
def test_control_tokens_in_a_text_are_refused(prepares, kind):
    token = prepares[kind].processor.tokenizer.eos_token
    for sample in (conversation(f"1open {token}", "yes"), conversation("1open", f"yes {token}")):
        with pytest.raises(ValueError, match="file.json entry 0: the text .* reads as a control token"):
            ConversationPrepare(prepares[kind])([sample])


# Backbones whose prompt is not a chat template: every round is a row.


def check_rounds(prepare, samples):
    """Each row is the backbone's own prompt for the question, then the answer's ids, then end-of-text."""
    batch, tokenizer = ConversationPrepare(prepare)(samples), prepare.processor.tokenizer
    each = [round for sample in samples for round in rounds(sample)]
    assert len(batch["labels"]) == len(each)
    for round, ids, mask, labels in zip(
        each, batch["inputs"]["input_ids"], batch["inputs"]["attention_mask"], batch["labels"]
    ):
        asked = prepare([round.images], [round.question])
        prompt = asked["input_ids"][0][asked["attention_mask"][0].bool()].tolist()
        answer = [*tokenizer.encode(round.answer, add_special_tokens=False), tokenizer.eos_token_id]
        assert ids[mask.bool()].tolist() == prompt + answer
        assert labels[mask.bool()].tolist() == [-100] * len(prompt) + answer
        assert (labels[~mask.bool()] == -100).all()


@pytest.mark.parametrize("kind", PROMPT)
def test_without_a_template_each_round_is_a_question_and_an_answer(prepares, kind):
    assert not uses_chat_template(prepares[kind])
    check_rounds(
        prepares[kind],
        [sample for sample in SAMPLES if sample["messages"][0]["content"][0]["type"] == "image"],
    )


@pytest.mark.parametrize("kind", COMPOSED)
def test_composed_backbones_keep_their_prompt(composed_backbones, kind):
    check_rounds(composed_backbones[kind].prepare, SAMPLES)


def test_a_round_holds_what_was_said_and_shown_before_it():
    found = rounds(SAMPLES[2])
    assert [(r.question, len(r.images), r.answer) for r in found] == [
        ("which one?", 2, "the second."),
        ("which one?\nthe second.\nand now?", 3, "press it"),
    ]


def test_a_backbone_that_needs_an_image_names_the_entry_without_one(prepares):
    with pytest.raises(ValueError, match="file.json entry 1.*PaliGemma reads at least one image"):
        ConversationPrepare(prepares["paligemma"])([SAMPLES[1]])


# Length


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "smolvlm", "gemma3", "paligemma"])
def test_over_long_conversations_are_dropped_whole_and_counted(prepares, kind):
    samples = [sample for sample in SAMPLES if sample["image"]]
    whole = ConversationPrepare(prepares[kind])(samples)
    lengths = whole["inputs"]["attention_mask"].sum(1)
    most = int(lengths.sort().values[len(lengths) // 2])
    kept = ConversationPrepare(prepares[kind], most)(samples)
    assert int(kept["inputs"]["attention_mask"].sum(1).max()) == most
    assert len(kept["labels"]) + len(kept["dropped"]) == len(whole["labels"])
    assert kept["dropped"] == [o for o, length in zip(whole["origin"], lengths) if length > most]
    images = lambda batch: (batch["inputs"]["pixel_values"] != 0).any(-1).sum()
    assert images(kept) < images(whole)  # the pixels of what is dropped go with it
    again = ConversationPrepare(prepares[kind])([s for s in samples if s["origin"] in kept["origin"]])
    if len(again["labels"]) == len(kept["labels"]):
        assert all(torch.equal(again["inputs"][n], kept["inputs"][n]) for n in kept["inputs"])


def test_refusing_names_the_entry_and_its_length(prepares):
    with pytest.raises(
        ValueError, match=r"file.json entry 2: \d+ tokens, images included; model_max_length is 40"
    ):
        ConversationPrepare(prepares["qwen2_5_vl"], 40, "refuse")([conversation("so?", "yes"), SAMPLES[2]])


def test_preparation_is_deterministic_and_can_be_pickled(prepares):
    for kind in (*CHAT, "florence2"):
        chat = ConversationPrepare(prepares[kind])
        first, second = chat(SAMPLES), pickle.loads(pickle.dumps(chat))(SAMPLES)
        assert torch.equal(first["labels"], second["labels"])
        assert all(torch.equal(first["inputs"][name], second["inputs"][name]) for name in first["inputs"])
