"""Greedy answers of a model, and log-likelihoods of given answers."""

import copy

import torch
from peft import PeftModel
from transformers import Cache, ProcessorMixin, TextStreamer

from collator import collate_prompts, opens_thought
from models.families import family_of


def encode_prompts(
    model, processor: ProcessorMixin, examples: list[dict], *, skip_thought: bool = False
) -> dict[str, torch.Tensor]:
    """Return a left-padded batch of prompts, see `collate_prompts`, on the model's device and in its dtype."""
    inputs = collate_prompts(processor, examples, skip_thought=skip_thought)
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    return inputs


def out_of_memory_advice(batch_size: int) -> str:
    """Return which options to lower."""
    first = f"lower --batch-size (now {batch_size}), then " if batch_size > 1 else "lower "
    return f"{first}--max-pixels or --max-new-tokens, or load the base in 4 bit (--quantization nf4)"


@torch.inference_mode()
def generate(
    model, processor: ProcessorMixin, examples: list[dict], max_new_tokens: int, streamer: TextStreamer | None = None
) -> tuple[list[str], list[bool]]:
    """Return the greedy answer to each example, and whether it was cut: it had not ended at `max_new_tokens`.

    A `streamer` prints the answer to a single example token by token.
    """
    inputs = encode_prompts(model, processor, examples)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, streamer=streamer)
    new_tokens = output[:, inputs["input_ids"].size(1) :]
    ends = torch.tensor(model.generation_config.eos_token_id or [], device=output.device)
    ended = torch.isin(new_tokens, ends).any(dim=1)
    opening = opens_thought(processor)  # is in the prompt; with it, a thought that was cut is known as one
    texts = [(opening + text).strip() for text in processor.batch_decode(new_tokens, skip_special_tokens=True)]
    return texts, (~ended).tolist()


@torch.inference_mode()
def score_answers(
    model, processor: ProcessorMixin, examples: list[dict], answers: list[list[str]], *, rows: int = 64
) -> torch.Tensor:
    """Return the log-likelihood of each of K given answers to each of B examples, shape (B, K), float32.

    The prompt is encoded once; the answers, each with the family's end token, continue from its cache. A model that
    thinks is asked for them behind an empty thought.

    Args:
        model: base model, with or without an adapter.
        processor: the model's processor.
        examples: samples whose messages end with the user's turn.
        answers: K answers for each example.
        rows: largest number of answers in one forward pass; bounds the memory for copies of the cache.
    """
    inputs = encode_prompts(model, processor, examples, skip_thought=True)
    positions = prompt_positions(model, inputs)
    prefix = model(**inputs, position_ids=positions, use_cache=True, logits_to_keep=1)
    width = max(1, rows // len(examples))
    chunks = [[row[start : start + width] for row in answers] for start in range(0, len(answers[0]), width)]
    scores = [_score_chunk(model, processor.tokenizer, inputs, positions, prefix, chunk) for chunk in chunks]
    return torch.cat(scores, dim=1)


def prompt_positions(model, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the M-RoPE positions (time, height, width) of a padded batch, shape (3, B, T)."""
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return base.model.get_rope_index(**{name: inputs[name] for name in names if name in inputs})[0]


def repeat_cache(cache: Cache, size: int, count: int) -> Cache:
    """Return a copy of the cache of `size` prompts with each `count` times; linear attention has states, no keys."""
    copied = copy.deepcopy(cache)
    copied.reorder_cache(torch.arange(size).repeat_interleave(count))
    return copied


def _score_chunk(model, tokenizer, inputs: dict, positions: torch.Tensor, prefix, answers: list[list[str]]):
    """Return the log-likelihoods of K answers to each of B prompts, shape (B, K); `prefix` is the prompts' output."""
    count, size = len(answers[0]), len(answers)
    texts = [text + family_of(model).end_token for row in answers for text in row]
    encoded = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt").to(inputs["input_ids"].device)
    cache = repeat_cache(prefix.cache, size, count)
    prompt_mask = inputs["attention_mask"].repeat_interleave(count, dim=0)
    start = positions.amax(dim=(0, 2)).repeat_interleave(count) + 1  # (B K)
    steps = start[:, None] + torch.arange(encoded["input_ids"].size(1), device=start.device)
    output = model(
        input_ids=encoded["input_ids"],
        attention_mask=torch.cat([prompt_mask, encoded["attention_mask"]], dim=1),
        position_ids=steps.expand(3, -1, -1),
        cache=cache,
    )
    first = prefix.logits[:, -1:].repeat_interleave(count, dim=0)
    logs = torch.cat([first, output.logits[:, :-1]], dim=1).float().log_softmax(-1)
    token_logs = logs.gather(2, encoded["input_ids"][:, :, None])[:, :, 0]
    return (token_logs * encoded["attention_mask"]).sum(1).view(size, count)
