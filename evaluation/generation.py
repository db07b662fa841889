"""Answers of a model, and the likelihood of answers given to it."""

import copy

import torch
from peft import PeftModel
from transformers import ProcessorMixin, TextStreamer

from collator import collate_prompts
from models.families import family_of


def encode_prompts(model, processor: ProcessorMixin, examples: list[dict]) -> dict[str, torch.Tensor]:
    """Return a left-padded batch of prompts, on the model's device and in its precision."""
    inputs = {name: tensor.to(model.device) for name, tensor in collate_prompts(processor, examples).items()}
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    return inputs


@torch.inference_mode()
def answer(
    model, processor: ProcessorMixin, examples: list[dict], max_new_tokens: int, streamer: TextStreamer | None = None
) -> list[str]:
    """Return the model's answer to each example, decoded greedily; a `streamer` gets a single one as it comes."""
    inputs = encode_prompts(model, processor, examples)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, streamer=streamer)
    new_tokens = output[:, inputs["input_ids"].size(1) :]
    return [text.strip() for text in processor.batch_decode(new_tokens, skip_special_tokens=True)]


@torch.inference_mode()
def score_answers(
    model, processor: ProcessorMixin, examples: list[dict], answers: list[list[str]], *, rows: int = 64
) -> torch.Tensor:
    """Return the log-likelihood of each of K given answers to each of B examples, shape (B, K), float32.

    Image and question are encoded once; the answers, each closed by "<|im_end|>", go on from their key-value cache.

    Args:
        model: the base model, or an adapter on it.
        processor: the model's processor.
        examples: samples whose messages end with the user's turn.
        answers: K answers for each example.
        rows: most answers in one forward pass, which bounds the memory of the cache's copies.
    """
    inputs = encode_prompts(model, processor, examples)
    positions = prompt_positions(model, inputs)
    prefix = model(**inputs, position_ids=positions, use_cache=True, logits_to_keep=1)
    width = max(1, rows // len(examples))
    chunks = [[own[start : start + width] for own in answers] for start in range(0, len(answers[0]), width)]
    scores = [_score_chunk(model, processor.tokenizer, inputs, positions, prefix, chunk) for chunk in chunks]
    return torch.cat(scores, dim=1)


def prompt_positions(model, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the positions of a padded batch in time, height and width, shape (3, B, T)."""
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return base.model.get_rope_index(**{name: inputs[name] for name in names if name in inputs})[0]


def _score_chunk(model, tokenizer, inputs: dict, positions: torch.Tensor, prefix, answers: list[list[str]]):
    """Score K answers to each of B prompts, whose forward pass is `prefix`: (B, K)."""
    count, size = len(answers[0]), len(answers)
    texts = [text + family_of(model).end_token for own in answers for text in own]
    encoded = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt").to(inputs["input_ids"].device)
    cache = copy.deepcopy(prefix.past_key_values)
    cache.batch_repeat_interleave(count)
    past = inputs["attention_mask"].repeat_interleave(count, dim=0)
    after = positions.amax(dim=(0, 2)).repeat_interleave(count) + 1  # (B K)
    steps = after[:, None] + torch.arange(encoded["input_ids"].size(1), device=after.device)
    output = model(
        input_ids=encoded["input_ids"],
        attention_mask=torch.cat([past, encoded["attention_mask"]], dim=1),
        position_ids=steps.expand(3, -1, -1),
        past_key_values=cache,
    )
    first = prefix.logits[:, -1:].repeat_interleave(count, dim=0)
    logs = torch.cat([first, output.logits[:, :-1]], dim=1).float().log_softmax(-1)
    own = logs.gather(2, encoded["input_ids"][:, :, None])[:, :, 0]
    return (own * encoded["attention_mask"]).sum(1).view(size, count)
