"""The last layer's MLP for the tokens that predict a label alone: the same log-probabilities and gradients."""

import pytest
import torch
from peft import get_peft_model
from torch.nn.functional import cross_entropy

from collator import VisionSFTCollator
from data_prep.convert import FEATURES
from demo.tiny_model import save_tiny_model
from helpers.runs import TEXTS
from models.attention import use_varlen
from models.compilation import language_layers
from models.last_layer import spare_last_layer
from models.loading import load_model, load_processor
from models.lora import build_lora_config


def samples():
    turns = [[("user", "What is it? " * (n + 1)), ("assistant", "It is melanoma. " * (4 - n))] for n in range(4)]
    messages = [[{"role": role, "content": text} for role, text in turn] for turn in turns]
    return [{**dict.fromkeys(FEATURES), "id": str(n), "images": [], "messages": m} for n, m in enumerate(messages)]


def step(model, batch):
    """Return the log-probabilities of the labels and the gradients of all that trains."""
    logits, labels = model(**batch, use_cache=False).logits[0, :-1], batch["labels"][0, 1:]
    losses = cross_entropy(logits, labels, reduction="none")[labels != -100]
    losses.sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return losses.detach(), gradients


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_loss_and_gradients_stay_and_fewer_tokens_are_computed(tmp_path, family):
    save_tiny_model(tmp_path, TEXTS, hidden_size=64, num_layers=2, family=family)
    base = load_model(str(tmp_path), dtype="float32", quantization=None)
    use_varlen(base)
    model = get_peft_model(base, build_lora_config(base, r=4, lora_alpha=8, lora_dropout=0.0)).train()
    for parameter in filter(lambda p: p.requires_grad, model.parameters()):
        torch.nn.init.normal_(parameter, std=0.1)
    batch = VisionSFTCollator(load_processor(str(tmp_path)), packed=True)(samples())
    counts = []
    language_layers(model)[-1].mlp.register_forward_hook(lambda module, inputs, output: counts.append(output.size(1)))
    losses, gradients = step(model, batch)
    spare_last_layer(model)
    found, changed = step(model, batch)
    learnt = int((batch["labels"] != -100).sum())
    assert counts == [batch["labels"].size(1), learnt] and learnt < batch["labels"].size(1)
    torch.testing.assert_close(found, losses, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == changed.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(changed[name], gradient, rtol=1e-4, atol=1e-6)


def test_a_padded_batch_has_the_logits_of_before(tmp_path):
    save_tiny_model(tmp_path, TEXTS, hidden_size=64, num_layers=2)
    model = load_model(str(tmp_path), dtype="float32", quantization=None)
    batch = VisionSFTCollator(load_processor(str(tmp_path)))(samples())
    before = model(**batch, use_cache=False).logits
    spare_last_layer(model)
    assert torch.equal(model(**batch, use_cache=False).logits, before)


def test_other_layers_stay(tmp_path):
    save_tiny_model(tmp_path, TEXTS, hidden_size=64, num_layers=4, family="qwen3_5")
    model = load_model(str(tmp_path), dtype="float32", quantization=None)
    kinds = [type(layer) for layer in language_layers(model)]
    spare_last_layer(model)
    assert [type(layer) for layer in language_layers(model)] == kinds
