"""Which questions are answered together: of similar length, and as many as memory allows."""

import argparse
import gc
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

from common.cli import positive_int

import torch
from accelerate.utils.memory import should_reduce_batch_size
from transformers import PreTrainedConfig, ProcessorMixin

from collator import load_pixels
from data_prep.sizes import count_image_tokens, fit_options
from evaluation.image_features import digest
from evaluation.questions import Questions

AUTO = "auto"
SIZES = (128, 96, 64, 48, 32, 24, 16, 12, 8, 6, 4, 3, 2, 1)  # few, as each has captured graphs of its own on a GPU
MOST_ON_CPU = 32  # 96 take as long
CPU_TOKENS = 8192  # of a batch
SHARE = 0.25  # of the GPU's memory for what grows with a batch; weights and other processes have the rest
CACHE_COPIES = 4  # at a time: the prompts', those of two decoders, and room for longer ones
AHEAD = 2  # batches whose images are decoded while the model is busy
DECODERS = 8  # threads


def batch_size(text: str) -> int | str:
    """Return the value of `--batch-size`: a number, or "auto"."""
    if text == AUTO:
        return text
    try:
        return positive_int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a number of questions or {AUTO!r}, found {text!r}") from error


def token_budget(config: PreTrainedConfig) -> int:
    """Return how many tokens a batch may have, padding and answers included.

    It depends on the machine and the model, not on what is free at the moment: a resumed evaluation has equal batches.
    """
    if not torch.cuda.is_available():
        return CPU_TOKENS
    text = config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    cache = 2 * 2 * text.num_hidden_layers * text.num_key_value_heads * head  # bytes, 16 bit
    width = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    activations = 2 * (3 * width + 8 * text.hidden_size)  # bytes of one layer, without gradients
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return int(SHARE * total / (CACHE_COPIES * cache + activations))


def make_batches(lengths: list[int], size: int | str, max_new_tokens: int, budget: int) -> list[list[int]]:
    """Return the numbers of the prompts of each batch, longest prompts first.

    Args:
        lengths: of the prompts, tokens.
        size: prompts in a batch, or "auto": as many as `budget` tokens allow.
        max_new_tokens: longest answer.
        budget: tokens, see `token_budget`.
    """
    order, batches = sorted(range(len(lengths)), key=lambda n: -lengths[n]), []
    most = SIZES[0] if torch.cuda.is_available() else MOST_ON_CPU
    while order:
        fitting = budget // (lengths[order[0]] + max_new_tokens)
        count = next((n for n in SIZES if n <= min(most, fitting)), 1) if size == AUTO else size
        batches.append(order[:count])
        order = order[count:]
    return batches


def order_batches(
    runs: dict[str, Questions], processor: ProcessorMixin, args: argparse.Namespace, budget: int
) -> list[tuple[str, list[int]]]:
    """Return the batches of all runs; runs that show the same images take turns, so that these are read once."""
    lengths, groups = {}, []
    for name, questions in runs.items():
        groups.append(next(n for n, other in enumerate(runs.values()) if other.image_rows is questions.image_rows))
        lengths[name] = prompt_lengths(questions, processor)
    options = {"size": args.batch_size, "max_new_tokens": args.max_new_tokens, "budget": budget}
    numbered = [
        (group, number, name, indices)
        for group, name in zip(groups, runs, strict=True)
        for number, indices in enumerate(make_batches(lengths[name], **options))
    ]
    return [(name, indices) for _, _, name, indices in sorted(numbered, key=lambda entry: entry[:2])]


def prompt_lengths(questions: Questions, processor: ProcessorMixin) -> list[int]:
    """Return about how many tokens each prompt has: those of its texts, and of all images of its sample."""
    options = fit_options(processor.image_processor)
    images = [
        sum(count_image_tokens(height, width, **options) for width, height in sizes)
        for sizes in questions.images["image_sizes"][:]
    ]
    texts = ["\n".join(message["content"] for message in messages) for messages in questions.messages]
    ids = processor.tokenizer(texts)["input_ids"] if texts else []
    return [images[row] + len(row_ids) for row, row_ids in zip(questions.image_rows, ids, strict=True)]


def load_ahead(
    batches: Iterable[list[dict]], processor: ProcessorMixin, threads: int = DECODERS
) -> Iterator[list[dict]]:
    """Yield batches of examples with their images decoded, resized and digested, while threads do the next ones.

    Raises:
        ValueError: see `load_pixels`; where the example would be.
    """

    def load(example: dict) -> dict:
        images = load_pixels(example, processor)
        return {**example, "images": images, "fitted": True, "digests": [digest(image) for image in images]}

    with ThreadPoolExecutor(threads) as pool:
        started = ([pool.submit(load, example) for example in batch] for batch in batches)
        waiting: list[list[Future]] = list(islice(started, AHEAD))
        try:
            while waiting:
                waiting += islice(started, 1)
                yield [future.result() for future in waiting.pop(0)]
        finally:
            pool.shutdown(cancel_futures=True)


class FittingParts:
    """Calls `ask` with a batch, or where memory is too short with halves of it, and remembers what was too many.

    Args:
        ask: returns a result for each row of a list; its other arguments are those of the call.
    """

    def __init__(self, ask: Callable[..., list]):
        self.ask, self.limit = ask, None

    def __call__(self, rows: list, *others) -> list:
        """Return a result for each row.

        Raises:
            RuntimeError: out of memory with a single row, or another error.
        """
        if (limit := self.limit) and len(rows) > limit:  # a part may lower the attribute
            return [result for n in range(0, len(rows), limit) for result in self(rows[n : n + limit], *others)]
        try:
            return self.ask(rows, *others)
        except RuntimeError as error:
            if len(rows) == 1 or not should_reduce_batch_size(error):
                raise
        self.limit = (len(rows) + 1) // 2  # here, where nothing holds the tensors of the failed call any more
        gc.collect()
        torch.cuda.empty_cache()
        print(f"out of memory with {len(rows)} questions: going on with {self.limit}", file=sys.stderr, flush=True)
        return self(rows, *others)
