"""`predict.py --check-server`: does a running server answer as we do?"""

import argparse
from collections.abc import Iterable, Iterator
from functools import partial

from collator import opens_thought
from common.progress import progress
from data_prep.sizes import fit_options, fit_size
from evaluation.chat_client import CHAT, ChatClient, chat_messages, check_url
from evaluation.engines import TransformersEngine, in_parallel, listed_models
from evaluation.examples import decode

SHOWN = 5  # answers that differ


def check_server(
    engine: TransformersEngine, base: str | None, examples: Iterable[dict], count: int, args: argparse.Namespace
) -> int:
    """Ask a server and our own model the same questions, print how many answers are equal, and return the exit code.

    The server gets what any client sends: the image upright, in its own size, as a PNG. So its pixel limits, chat
    template, generation settings and weights are all part of what is compared.

    Args:
        engine: our own model.
        base: folder or Hub id of the model that is asked when there is no adapter.
        examples: questions, see `load_examples`.
        count: how many there are.
        args: `check_server`, `sample`, `limit`, `batch_size`, `max_new_tokens`.

    Returns:
        1 if the share of equal answers, of one of the adapters, is under `limit`; else 0.

    Raises:
        ValueError: the server does not answer or lacks the model, or no question can be asked.
    """
    client = ChatClient(check_url(args.check_server, "--check-server"))
    models = listed_models(client, engine.adapters, base)
    asked = [example for example in spread(examples, count, args.sample) if "error" not in decode(example)]
    if not asked:
        raise ValueError("--check-server: none of the questions can be asked")
    shares = []
    for name in engine.adapters or [None]:
        ours = own_answers(engine, name, asked, args)
        opening = opens_thought(engine.processors[name])  # is in the prompt, as in `generate`
        theirs = in_parallel(partial(ask, client, models[name], args.max_new_tokens, opening), asked)
        shares.append(report(models[name], asked, ours, theirs, args.limit))
    return int(min(shares) < args.limit)


def spread(examples: Iterable[dict], count: int, size: int) -> Iterator[dict]:
    """Yield `size` of `count` examples, at equal distances."""
    chosen = {number * count // min(size, count) for number in range(min(size, count))}
    return (example for number, example in enumerate(examples) if number in chosen)


def own_answers(engine: TransformersEngine, name: str | None, examples: list[dict], args) -> list[str]:
    fit = partial(fit_size, **fit_options(engine.processors[name].image_processor))
    texts = []
    starts = range(0, len(examples), args.batch_size)
    for start in progress(starts, "answering", len(starts), "batches"):
        batch = [decode(example, fit=fit) for example in examples[start : start + args.batch_size]]
        texts += engine.answers(batch, args.max_new_tokens, adapter=name)[0]
    return texts


def ask(client: ChatClient, model: str, max_new_tokens: int, opening: str, example: dict) -> str:
    """Return a server's greedy answer to a question with its images as they are, behind what the prompt opens."""
    messages = chat_messages(example["messages"], decode(example)["images"])
    body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": max_new_tokens}
    return (opening + (client.request(CHAT, body)["choices"][0]["message"]["content"] or "")).strip()


def report(model: str, examples: list[dict], ours: list[str], theirs: list[str], limit: float) -> float:
    """Print how many answers are equal, and the first that are not; return the share of the equal ones."""
    different = [n for n, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b]
    equal = len(examples) - len(different)
    verdict = "as expected" if equal >= limit * len(examples) else f"expected at least {limit:.0%}"
    print(f"{model}: {equal} of {len(examples)} answers equal ({equal / len(examples):.0%}), {verdict}")
    for n in different[:SHOWN]:
        print(f"  {examples[n]['id']}: here {ours[n]!r}, there {theirs[n]!r}")
    return equal / len(examples)
