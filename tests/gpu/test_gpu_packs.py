"""Packs on a GPU: no sample sees another, in any family that needs no kernels of a package."""

import pytest
import torch
from transformers import AutoModelForImageTextToText

from collator import VisionSFTCollator
from data_prep.convert import FEATURES
from demo.tiny_model import save_tiny_model
from helpers.runs import TEXTS
from models.attention import use_varlen
from models.families import FAMILIES
from models.loading import load_processor

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
PLAIN = [name for name, family in FAMILIES.items() if not family.linear_attention]


def samples():
    texts = ["Is it dark?", "What condition is shown? " * 12, "Look, and say what it is, please.", "?"]
    turns = [[("user", text), ("assistant", "It is melanoma. " * (n + 1))] for n, text in enumerate(texts)]
    messages = [[{"role": role, "content": text} for role, text in turn] for turn in turns]
    return [{**dict.fromkeys(FEATURES), "id": str(n), "images": [], "messages": m} for n, m in enumerate(messages)]


def logits_of(model, batch):
    batch = {name: value.cuda() if torch.is_tensor(value) else value for name, value in batch.items()}
    return model(**batch, use_cache=False).logits.float(), batch


@torch.no_grad()
@pytest.mark.parametrize("family", PLAIN)
def test_a_pack_has_the_logits_of_separate_samples(tmp_path, family):
    """In bfloat16, where the kernel runs, it may be no further off than SDPA's padded batch."""
    save_tiny_model(tmp_path, TEXTS, hidden_size=64, num_layers=2, family=family)
    processor = load_processor(str(tmp_path))
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=dtype).cuda().eval()
        single = [VisionSFTCollator(processor)([one]) for one in samples()]
        padded, batch = logits_of(model, VisionSFTCollator(processor)(samples()))
        alone = torch.cat([logits_of(model, one)[0] for one in single], dim=1)
        batched = (padded[batch["attention_mask"].bool()][None] - alone).norm()
        use_varlen(model)
        packed = logits_of(model, VisionSFTCollator(processor, packed=True)(samples()))[0] - alone
        print(f"{family} {dtype}: packed {packed.norm():.2e}, padded {batched:.2e}, of {alone.norm():.1f}")
        assert packed.abs().max() < 1e-4 if dtype == torch.float32 else packed.norm() < 1.5 * batched + 1e-3
