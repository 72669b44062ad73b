"""A shortened language model is the beginning of the whole one, and new tokens change no old one."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from vla_bench.models.backbones.component_loading import quiet
from vla_bench.registry import LLM_BACKBONES

WORDS = ("open the drawer", "press the button from the top", "close the window")


SIZE, WIDTH = 64, 64


@pytest.fixture(scope="module")
def home(components) -> Path:
    return components


@pytest.mark.parametrize("kind", ["Llama", "Gemma", "Qwen2", "Qwen3"])
@torch.no_grad()
def test_a_shortened_language_model_is_the_beginning_of_the_whole(home, kind):
    path, ids = home / kind.lower(), torch.tensor([[5, 9, 13, 7]])
    with quiet():
        whole = AutoModelForCausalLM.from_pretrained(path).eval().model
    states = whole(ids, output_hidden_states=True).hidden_states
    for count in (1, 2):
        cut = LLM_BACKBONES.build({"type": kind, "path": path, "num_layers": count}).model.eval()
        assert len(cut.model.layers) == count
        torch.testing.assert_close(
            cut.model(ids).last_hidden_state, whole.norm(states[count]), atol=1e-6, rtol=1e-6
        )


@pytest.mark.parametrize("kind", ["Llama", "Qwen2"])
@torch.no_grad()
def test_new_tokens_change_no_old_one(home, kind):
    with quiet():
        before = AutoModelForCausalLM.from_pretrained(home / kind.lower()).eval()
    llm = LLM_BACKBONES.build({"type": kind, "path": home / kind.lower()})
    old = len(llm.tokenizer)
    assert llm.add_tokens("<image>")[0] >= old and llm.tokenizer.pad_token is not None
    rows = llm.model.get_input_embeddings().weight.shape[0]
    assert rows % 64 == 0 and rows >= len(llm.tokenizer) and llm.model.config.vocab_size == rows
    ids = torch.tensor([[5, 9, 13, 7]])
    logits = llm.model.eval()(ids).logits
    torch.testing.assert_close(logits[..., :old], before(ids).logits, atol=1e-6, rtol=1e-6)
