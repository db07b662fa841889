"""Scores of given answers equal those of full forward passes, in any batch."""

import pytest
import torch

from collator import render
from evaluation.generation import prompt_positions, score_answers
from models.adapters import load_answering_model


@pytest.fixture(scope="module")
def model(tiny_base):
    return load_answering_model(None, base=str(tiny_base), quantization="nf4", dtype="float32")


@pytest.fixture
def examples(demo_splits):
    """Two prompts of other lengths, and one without an image."""
    samples = [demo_splits["train"][n] for n in (0, 1)]
    prompts = [{"id": s["id"], "images": s["images"], "messages": s["messages"][:-1]} for s in samples]
    return [*prompts, {"id": "text", "images": [], "messages": [{"role": "user", "content": "Is the skin dark?"}]}]


ANSWERS = ["This is melanoma.", "It is psoriasis, vitiligo, urticaria.", "x"]


@torch.inference_mode()
def separately(model, processor, example, answer):
    """The log-likelihood of an answer by one forward pass over prompt and answer."""
    from collator import load_pixels

    prompt = render(processor, example["messages"], add_generation_prompt=True)
    images = load_pixels(example, processor) or None
    options = {"images": images, "images_kwargs": {"do_resize": False}, "return_tensors": "pt"}
    start = processor(text=[prompt], **options)["input_ids"].size(1)
    batch = processor(text=[prompt + answer + "<|im_end|>"], **options)
    logs = model(**batch).logits[0, start - 1 : -1].log_softmax(-1)
    return logs.gather(1, batch["input_ids"][0, start:, None]).sum()


@pytest.mark.parametrize("rows", [64, 3])
def test_scores_equal_separate_forward_passes(model, processor, examples, rows):
    found = score_answers(model, processor, examples, [ANSWERS] * 3, rows=rows)
    expected = [[separately(model, processor, example, answer) for answer in ANSWERS] for example in examples]
    assert torch.allclose(found, torch.tensor(expected), atol=1e-4)
    assert (found[:, 0] != found[:, 1]).all()


def test_each_example_can_have_different_answers(model, processor, examples):
    one = score_answers(model, processor, examples[:2], [ANSWERS[:2], ANSWERS[1:]])
    both = score_answers(model, processor, examples[:2], [ANSWERS] * 2)
    assert torch.allclose(one, torch.stack([both[0, :2], both[1, 1:]]), atol=1e-4)


def test_positions_equal_those_of_the_model(model, processor, examples):
    from evaluation.generation import encode_prompts

    inputs = encode_prompts(model, processor, examples[:2])
    positions = prompt_positions(model, inputs)
    with torch.inference_mode():
        plain = model(**inputs).logits
        given = model(**inputs, position_ids=positions).logits
    kept = inputs["attention_mask"].bool()
    assert torch.equal(plain[kept], given[kept])
