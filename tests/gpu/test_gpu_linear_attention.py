"""Packs of a hybrid model on a GPU, by flash-linear-attention's kernels: no sample sees another."""

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForImageTextToText

from collator import VisionSFTCollator
from data_prep.convert import FEATURES
from demo.tiny_model import save_tiny_model
from helpers.runs import TEXTS
from models.attention import use_varlen
from models.compilation import compile_layers
from models.families import FAMILIES
from models.linear_attention import check_kernels
from models.loading import load_processor
from models.lora import build_lora_config

try:
    check_kernels(FAMILIES["qwen3_5"], packed=True)
except ValueError as reason:
    pytest.skip(str(reason), allow_module_level=True)  # a run would be refused here, for this reason


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3_5")
    save_tiny_model(folder, TEXTS, hidden_size=64, num_layers=4, family="qwen3_5")
    return folder


def samples():
    texts = ["Is it dark?", "What condition is shown? " * 12, "Look, and say what it is, please.", "?"]
    turns = [[("user", text), ("assistant", "It is melanoma. " * (n + 1))] for n, text in enumerate(texts)]
    messages = [[{"role": role, "content": text} for role, text in turn] for turn in turns]
    return [{**dict.fromkeys(FEATURES), "id": str(n), "images": [], "messages": m} for n, m in enumerate(messages)]


def on_gpu(batch):
    return {name: value.cuda() if torch.is_tensor(value) else value for name, value in batch.items()}


def logits_of(model, processor, examples):
    """Return logits of the pack, and of each sample alone, both (1, T, V), and of the padded batch without padding."""
    pack = VisionSFTCollator(processor, packed=True)(examples)
    together = model(**on_gpu(pack), use_cache=False).logits.float()
    alone = [model(**on_gpu(VisionSFTCollator(processor)([one])), use_cache=False).logits.float() for one in examples]
    batch = VisionSFTCollator(processor)(examples)
    padded = model(**on_gpu(batch), use_cache=False).logits.float()
    return together, torch.cat(alone, dim=1), padded[batch["attention_mask"].bool()][None]


@torch.no_grad()
def test_a_pack_has_the_logits_of_separate_samples_in_float32(base):
    """Matrix products of the kernels are in TF32, which this tolerance is for: a leak is a hundred times larger."""
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32).cuda().eval()
    use_varlen(model)
    together, alone, _ = logits_of(model, load_processor(str(base)), samples())
    print(f"float32: {(together - alone).abs().max():.2e}")
    assert (together - alone).abs().max() < 1e-3


@torch.no_grad()
def test_a_pack_in_bfloat16_is_no_further_off_than_a_padded_batch(base):
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.bfloat16).cuda().eval()
    use_varlen(model)
    together, alone, padded = logits_of(model, load_processor(str(base)), samples())
    packed, batched = (together - alone).norm(), (padded - alone).norm()
    print(f"bfloat16: packed {packed:.3f}, padded {batched:.3f}, of {alone.norm():.1f}")
    assert packed < 1.5 * batched + 1e-3 * alone.norm()


@torch.no_grad()
def test_another_first_sample_changes_nothing_in_the_second(base):
    """Bit for bit: borders are kept, not blurred."""
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.bfloat16).cuda().eval()
    use_varlen(model)
    processor, examples = load_processor(str(base)), samples()
    collate, found = VisionSFTCollator(processor, packed=True), []
    for mark in "?!":  # one token each
        turns = [{"role": "user", "content": f"Is it dark{mark}"}, examples[0]["messages"][1]]
        pack = collate([{**examples[0], "messages": turns}, examples[2]])
        found.append(model(**on_gpu(pack), use_cache=False).logits[0, int(pack["text_cu_seqlens"][1]) :])
    assert torch.equal(*found)


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_of_a_pack_are_those_of_separate_samples(base, compiled):
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.bfloat16).cuda()
    use_varlen(model)
    model = get_peft_model(model, build_lora_config(model, r=4, lora_alpha=8, lora_dropout=0.0)).train()
    for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator("cuda").manual_seed(number))
    if compiled:
        compile_layers(model)
    processor, examples = load_processor(str(base)), samples()

    def gradients(batches):
        model.zero_grad()
        for batch in batches:
            loss = model(**on_gpu(batch), use_cache=False).loss
            (loss * (batch["labels"] != -100).sum()).backward()
        return torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])

    pack = gradients([VisionSFTCollator(processor, packed=True)(examples)])
    alone = gradients([VisionSFTCollator(processor)([one]) for one in examples])
    print(f"compiled {compiled}: relative {(pack - alone).norm() / alone.norm():.3f}")
    assert (pack - alone).norm() < 0.03 * alone.norm()
