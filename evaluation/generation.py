"""Greedy answers of a model, and log-likelihoods of given answers.

A prompt is read once for both. Rows of a batch do not depend on each other: in float32, texts are the same in every
batch, and likelihoods to 1e-4. In bfloat16 a product's rounding depends on the shape of the batch, about 0.4 % of a
value, so that an answer can change where two tokens are that close.
"""

import copy
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, PreTrainedModel, ProcessorMixin, TextStreamer

from collator import collate_prompts, load_pixels, opens_thought
from evaluation.answer_trees import AnswerTree, stack_trees
from evaluation.image_features import ImageFeatures, digests_of
from evaluation.static_decoding import decode_static, open_decoder
from models.families import family_of

TREE_TOKENS = 64  # of the answers to each prompt, that are read in one forward pass
LEAST_TOKENS = 2048  # of a batch's answers, which small batches fill
LOGIT_ROWS = 512  # whose probabilities are computed at a time


@dataclass
class Prefix:
    """A batch of prompts that the model has read.

    Attributes:
        cache: keys and values of their tokens; layers with linear attention have states.
        mask: 1 for tokens and 0 for the padding before them, shape (B, T).
        logits: of the token after each prompt, shape (B, V).
        positions: of that token, shape (B,).
    """

    cache: Cache | None
    mask: torch.Tensor
    logits: torch.Tensor
    positions: torch.Tensor

    def select(self, rows: torch.Tensor) -> "Prefix":
        """Return a copy with these rows, each as often as it is named."""
        cache = copy.deepcopy(self.cache)
        cache.reorder_cache(rows)
        return Prefix(cache, self.mask[rows], self.logits[rows], self.positions[rows])


def encode_prompts(
    model,
    processor: ProcessorMixin,
    examples: list[dict],
    *,
    skip_thought: bool = False,
    features: ImageFeatures | None = None,
) -> dict[str, torch.Tensor | dict]:
    """Return a left-padded batch of prompts, see `collate_prompts`, on the model's device and in its dtype.

    With `features`, the outputs of the vision tower are in the place of its inputs.
    """
    if features is not None:
        examples = [{**example, "images": load_pixels(example, processor), "fitted": True} for example in examples]
    inputs = collate_prompts(processor, examples, skip_thought=skip_thought, patches=features is None)
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    if features is not None and (images := [image for example in examples for image in example["images"]]):
        keys = [key for example in examples for key in digests_of(example)]
        inputs["mm_encoder_outputs"] = {"image": features(images, keys, processor.image_processor)}
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
    if streamer is not None:
        streamer.put(inputs["input_ids"].cpu())
    prefix = read_prompts(model, inputs)
    check_finite(prefix.logits, examples)
    return read_answers(model, processor, decode(model, prefix, max_new_tokens, streamer))


def check_finite(logits: torch.Tensor, examples: list[dict]) -> None:
    """Raise ValueError for logits (B, V) that are NaN or infinite: the likeliest token would be a meaningless one."""
    finite = logits.isfinite().all(dim=1).tolist()
    if not all(finite):
        problem = f"sample {examples[finite.index(False)].get('id')!r}: the model's logits are not finite"
        remedy = "compute in another dtype (--dtype bfloat16 or float32); if it has no effect, the weights are damaged"
        raise ValueError(f"{problem}; {remedy}")


@torch.inference_mode()
def score_answers(
    model,
    processor: ProcessorMixin,
    examples: list[dict],
    answers: list[list[str]],
    *,
    rows: int | None = None,
    features: ImageFeatures | None = None,
) -> torch.Tensor:
    """Return the log-likelihood of each of K given answers to each of B examples, shape (B, K), float32.

    The prompt is encoded once; the answers, each with the family's end token, continue from its cache, as one tree in
    which no branch sees another. A model that thinks is asked for them behind an empty thought.

    Args:
        model: base model, with or without an adapter.
        processor: the model's processor.
        examples: samples whose messages end with the user's turn.
        answers: K answers for each example.
        rows: largest number of answers in one forward pass; see `most_answers` when None.
        features: keeps the outputs of the vision tower for other batches.
    """
    inputs = encode_prompts(model, processor, examples, skip_thought=True, features=features)
    return score_continuations(model, processor, read_prompts(model, inputs), answers, rows=rows)


@torch.inference_mode()
def answer_and_score(
    model,
    processor: ProcessorMixin,
    examples: list[dict],
    max_new_tokens: int,
    answers: list[list[str]],
    *,
    features: ImageFeatures | None = None,
) -> tuple[list[str], list[bool], list[list[float]]]:
    """Return what `generate` does, and the log-likelihoods of each example's given answers; each prompt is read once.

    Args:
        model: base model, with or without an adapter.
        processor: the model's processor.
        examples: samples whose messages end with the user's turn.
        max_new_tokens: longest answer.
        answers: for each example K answers to score, or none.
        features: keeps the outputs of the vision tower for other batches.
    """
    scored = [n for n, texts in enumerate(answers) if texts]
    given = [answers[n] for n in scored]
    prefix = read_prompts(model, encode_prompts(model, processor, examples, features=features))
    check_finite(prefix.logits, examples)
    if scored and opens_thought(processor):  # scores need another prompt, see `render_prompt`
        values = score_answers(model, processor, [examples[n] for n in scored], given, features=features)
    elif scored:
        every = len(scored) == len(examples)
        rows = torch.tensor(scored, device=prefix.mask.device)
        values = score_continuations(model, processor, prefix if every else prefix.select(rows), given)
    scores = [[] for _ in examples]
    for n, row in zip(scored, values.tolist() if scored else [], strict=True):
        scores[n] = row
    tokens = decode(model, prefix, max_new_tokens)
    return *read_answers(model, processor, tokens), scores


def read_prompts(model, inputs: dict[str, torch.Tensor]) -> Prefix:
    """Let the model read a batch of `encode_prompts`."""
    positions = prompt_positions(model, inputs)
    output = model(**inputs, position_ids=positions, use_cache=True, logits_to_keep=1)
    return Prefix(output.cache, inputs["attention_mask"], output.logits[:, -1], positions.amax(dim=(0, 2)) + 1)


def base_of(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def prompt_positions(model, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the M-RoPE positions (time, height, width) of a padded batch, shape (3, B, T).

    They are computed on the CPU, as they are many small steps for each row.
    """
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
    given = {name: inputs[name].cpu() for name in names if name in inputs}
    return base_of(model).model.get_rope_index(**given)[0].to(inputs["input_ids"].device)


def end_tokens(model) -> torch.Tensor:
    """Return the ids that end an answer, shape (E,)."""
    ids = model.generation_config.eos_token_id
    return torch.tensor([] if ids is None else ids, dtype=torch.long, device=model.device).flatten()


def decode(model, prefix: Prefix, max_new_tokens: int, streamer: TextStreamer | None = None) -> torch.Tensor:
    """Return the likeliest continuation of each prompt, token by token, shape (B, N), N at most `max_new_tokens`.

    A row is padded after its end token. The prefix is used up.
    """
    decoder = open_decoder(model, prefix, max_new_tokens) if streamer is None else None
    if decoder is None:
        return decode_step_by_step(model, prefix, max_new_tokens, streamer)
    prefix.cache, ends = None, end_tokens(model)  # the decoder has a copy
    tokens = decode_static(model, decoder, len(prefix.mask), max_new_tokens, ends)
    return pad_after_end(tokens, ends, model.generation_config.pad_token_id or 0)


def pad_after_end(tokens: torch.Tensor, ends: torch.Tensor, pad: int) -> torch.Tensor:
    """Return tokens (B, N) with padding after the first end token of each row."""
    is_end = torch.isin(tokens, ends).long()
    return tokens.masked_fill(is_end.cumsum(1) > is_end, pad)


def decode_step_by_step(
    model, prefix: Prefix, max_new_tokens: int, streamer: TextStreamer | None = None
) -> torch.Tensor:
    """Return what `decode` does; rows that have ended leave the batch."""
    ends, size = end_tokens(model), len(prefix.mask)
    tokens = prefix.mask.new_full((size, max_new_tokens), model.generation_config.pad_token_id or 0)
    live, token = torch.arange(size, device=tokens.device), prefix.logits.argmax(-1)
    mask, positions, cache = prefix.mask, prefix.positions, prefix.cache
    for step in range(max_new_tokens):
        tokens[live, step] = token
        if streamer is not None:
            streamer.put(token.cpu())
        going = (~torch.isin(token, ends)).nonzero().flatten()
        if not len(going) or step + 1 == max_new_tokens:
            break
        if len(going) < len(live):
            live, token, mask, positions = live[going], token[going], mask[going], positions[going]
            cache.reorder_cache(going)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        output = model(**_one_token(token, mask, positions + step, cache))
        token = output.logits[:, -1].argmax(-1)
    if streamer is not None:
        streamer.end()
    return tokens[:, : step + 1]


def _one_token(token: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Cache) -> dict:
    """Return the model's arguments for one more token of each row, at `positions` (B,)."""
    positions = positions[:, None].expand(3, -1, -1)
    return {"input_ids": token[:, None], "attention_mask": mask, "position_ids": positions, "cache": cache}


def read_answers(model, processor: ProcessorMixin, tokens: torch.Tensor) -> tuple[list[str], list[bool]]:
    """Return the texts of answers, and which of them have no end."""
    ended = torch.isin(tokens, end_tokens(model)).any(dim=1)
    opening = opens_thought(processor)  # is in the prompt; with it, a thought that was cut is known as one
    texts = [(opening + text).strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]
    return texts, (~ended).tolist()


def score_continuations(
    model, processor: ProcessorMixin, prefix: Prefix, answers: list[list[str]], *, rows: int | None = None
) -> torch.Tensor:
    """Return the log-likelihoods of K answers to each of B prompts, see `score_answers`; the prefix stays as it is."""
    end_token = family_of(model).end_token
    ids = [
        [tuple(row) for row in processor.tokenizer([text + end_token for text in texts])["input_ids"]]
        for texts in answers
    ]
    score = _score_in_copies if family_of(model).linear_attention else _score_in_tree
    width = max(1, (rows or most_answers(ids, in_copies=score is _score_in_copies)) // len(answers))
    chunks = [[row[start : start + width] for row in ids] for start in range(0, len(ids[0]), width)]
    return torch.cat([score(model, prefix, chunk) for chunk in chunks], dim=1)


def most_answers(answers: list[list[tuple[int, ...]]], *, in_copies: bool) -> int:
    """Return how many of the answers of B prompts are read in one forward pass."""
    if in_copies:
        return max(64, 2 * len(answers))
    longest = max(len(ids) for row in answers for ids in row)
    return max(TREE_TOKENS * len(answers), LEAST_TOKENS) // longest


def _score_in_tree(model, prefix: Prefix, answers: list[list[tuple[int, ...]]]) -> torch.Tensor:
    """Return the log-likelihoods of K answers to each of B prompts, shape (B, K), without copies of the cache."""
    tree, size, device = stack_trees(list(map(tuple, answers))), len(answers), prefix.mask.device
    tree = AnswerTree(**{name: tensor.to(device) for name, tensor in vars(tree).items()})
    count = tree.tokens.size(1)
    logits = prefix.logits[:, None]
    if count:
        before = prefix.mask.bool()[:, None].expand(-1, count, -1)
        output = model(
            input_ids=tree.tokens,
            attention_mask=torch.cat([before, tree.visible], dim=2)[:, None],
            position_ids=(prefix.positions[:, None] + tree.depths).expand(3, -1, -1),
            cache=prefix.cache,
        )
        prefix.cache.crop(-count)
        logits = torch.cat([logits, output.logits], dim=1)
    rows = max(1, LOGIT_ROWS // (count + 1))  # in float32 they are large
    parts = [slice(start, start + rows) for start in range(0, size, rows)]
    token_logs = [read_logs(logits[part], tree.sources[part], tree.targets[part]) for part in parts]
    return (torch.cat(token_logs) * tree.is_token).sum(2)


def read_logs(logits: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities, float32, of tokens `targets` at places `sources`, both (B, K, L), in (B, N, V)."""
    logs = logits.float().log_softmax(-1)
    return logs[torch.arange(len(logs), device=logs.device)[:, None, None], sources, targets]


def _score_in_copies(model, prefix: Prefix, answers: list[list[tuple[int, ...]]]) -> torch.Tensor:
    """Return what `_score_in_tree` does: each answer in a row of its own, as linear attention knows no tree."""
    device, count, size = prefix.mask.device, len(answers[0]), len(answers)
    ids = [torch.tensor(row, device=device) for rows in answers for row in rows]
    tokens, is_token = (pad_sequence(rows, batch_first=True) for rows in (ids, [torch.ones_like(row) for row in ids]))
    repeated = prefix.select(torch.arange(size, device=device).repeat_interleave(count))
    steps = repeated.positions[:, None] + torch.arange(tokens.size(1), device=device)
    output = model(
        input_ids=tokens,
        attention_mask=torch.cat([repeated.mask, is_token], dim=1),
        position_ids=steps.expand(3, -1, -1),
        cache=repeated.cache,
    )
    logits = torch.cat([repeated.logits[:, None], output.logits[:, :-1]], dim=1)
    places = torch.arange(tokens.size(1), device=device).expand(len(tokens), 1, -1)
    return (read_logs(logits, places, tokens[:, None])[:, 0] * is_token).sum(1).view(size, count)
