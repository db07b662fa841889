"""Who answers: the model in this process, or a vLLM server. Both have `answers`, `scores` and `answer_and_score`."""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel, ProcessorMixin, TextStreamer

from collator import expand_images, load_pixels, opens_thought, render_prompt
from data_prep.sizes import fit_options
from evaluation.batching import AUTO, FittingParts
from evaluation.chat_client import CHAT, ChatClient, chat_messages, check_url
from evaluation.generation import answer_and_score, base_of, generate, out_of_memory_advice, score_answers
from evaluation.image_features import ImageFeatures, is_adapted
from evaluation.vllm_server import start_server
from models.adapters import end_answers, load_adapters, loading_settings
from models.answering import speed_up_answering
from models.families import families_of
from models.loading import load_processor, readable_out_of_memory
from models.serving import describe_serving, served_name, served_names

ENGINES = ("transformers", "vllm")
BATCH_SIZES = {"transformers": 8, "vllm": 128}  # questions that are answered together
CONCURRENT = 64  # requests at a time


def add_engine_options(parser) -> None:
    """Add the options that `check_engine_options` and `open_engine` read."""
    parser.add_argument(
        "--engine", choices=ENGINES, default=ENGINES[0],
        help="who answers: this process, or a vLLM server (`make vllm`), started here unless --server names one",
    )  # fmt: skip
    parser.add_argument("--server", metavar="URL", help="a running vLLM server, such as http://127.0.0.1:8000")


def check_engine_options(args: argparse.Namespace, processes: int = 1) -> None:
    """Set the batch size to the engine's unless it is given.

    Raises:
        ValueError: options that do not go together.
    """
    if args.server:
        check_url(args.server)
    if args.server and args.engine != "vllm":
        raise ValueError("--server: goes with --engine vllm")
    if args.engine == "vllm" and processes > 1 and not args.server:
        rule = "start one process, or one server for all (--data-parallel-size, see --print-server) and --server"
        raise ValueError(f"--engine vllm: {processes} processes would start {processes} servers; {rule}")
    if args.batch_size is None or (args.engine == "vllm" and args.batch_size == AUTO):
        args.batch_size = BATCH_SIZES[args.engine]


class TransformersEngine:
    """The model in this process.

    A batch of `scores` and `answer_and_score` that memory does not hold is divided. With a frozen vision tower they
    read an image once for adapter and base.

    Args:
        model: base model, with the adapters on it.
        adapters: path of each adapter by its name in the model.
        processors: by the adapter's name; under None that for the base alone.
        batch_size: for the advice when memory is short.
    """

    def __init__(
        self, model: PreTrainedModel | PeftModel, adapters: dict[str, str], processors: dict, batch_size: int | str
    ):
        self.model, self.adapters, self.processors = model, adapters, processors
        end_answers(model, next(iter(processors.values())))
        self.advice = out_of_memory_advice(1 if batch_size == AUTO else batch_size)
        self.features = None if is_adapted(base_of(model)) else ImageFeatures(base_of(model))
        self.answering, self.scoring = FittingParts(self._answer_rows), FittingParts(self._score_rows)

    def answers(
        self, examples: list[dict], max_new_tokens: int, *, adapter: str | None, streamer: TextStreamer | None = None
    ) -> tuple[list[str], list[bool]]:
        """Return the greedy answer to each example, and whether it was cut at `max_new_tokens`."""
        with self._use(adapter), readable_out_of_memory(self.advice):
            return generate(self.model, self.processors[adapter], examples, max_new_tokens, streamer)

    def scores(self, examples: list[dict], answers: list[list[str]], *, adapter: str | None) -> torch.Tensor:
        """Return the log-likelihood of each of K given answers to each of B examples, shape (B, K), float32."""
        rows = list(zip(examples, answers, strict=True))
        with self._use(adapter), readable_out_of_memory(self.advice):
            return torch.stack(self.scoring(rows, self.processors[adapter]))

    def answer_and_score(
        self, examples: list[dict], max_new_tokens: int, answers: list[list[str]], *, adapter: str | None
    ) -> tuple[list[str], list[bool], list[list[float]]]:
        """Return what `answers` does, and the log-likelihoods of each example's given answers, if it has any.

        Each prompt is read once for both.
        """
        rows = list(zip(examples, answers, strict=True))
        with self._use(adapter), readable_out_of_memory(self.advice):
            texts, cut, scores = zip(*self.answering(rows, self.processors[adapter], max_new_tokens), strict=True)
        return list(texts), list(cut), list(scores)

    def _answer_rows(self, rows: list[tuple], processor: ProcessorMixin, max_new_tokens: int) -> list[tuple]:
        examples, answers = map(list, zip(*rows, strict=True))
        found = answer_and_score(self.model, processor, examples, max_new_tokens, answers, features=self.features)
        return list(zip(*found, strict=True))

    def _score_rows(self, rows: list[tuple], processor: ProcessorMixin) -> list[torch.Tensor]:
        examples, answers = map(list, zip(*rows, strict=True))
        return list(score_answers(self.model, processor, examples, answers, features=self.features))

    def _use(self, adapter: str | None):
        """Return a context in which the model has this adapter, or none."""
        if adapter is None:
            return self.model.disable_adapter() if self.adapters else nullcontext()
        if len(self.adapters) > 1:
            self.model.set_adapter(adapter)
        return nullcontext()


class VllmEngine:
    """A vLLM server, reached by a client.

    Images are sent as the model needs them: decoded, turned and resized as in training. The ids of each prompt are
    compared with ours, so that a server with another chat template, or that resizes them again, is an error.

    Args:
        client: of the server.
        adapters: path of each adapter by its name.
        models: what the server calls each adapter, and under None the base.
        processors: by the adapter's name; under None that for the base alone.
    """

    def __init__(self, client: ChatClient, adapters: dict[str, str], models: dict[str | None, str], processors: dict):
        self.client, self.adapters, self.models, self.processors = client, adapters, models, processors

    def answers(
        self, examples: list[dict], max_new_tokens: int, *, adapter: str | None, streamer: None = None
    ) -> tuple[list[str], list[bool]]:
        """Return the greedy answer to each example, and whether it was cut at `max_new_tokens`."""

        def answer(example: dict) -> tuple[str, bool]:
            images = load_pixels(example, processor)
            messages = chat_messages(example["messages"], images)
            reply = self._ask(example, adapter, messages, max_tokens=max_new_tokens)
            check_prompt(example, reply["prompt_token_ids"], prompt_ids(processor, example, images))
            choice = reply["choices"][0]
            text = processor.decode(choice["token_ids"], skip_special_tokens=True)  # as ours: of broken UTF-8 too
            return (opening + text).strip(), choice["finish_reason"] == "length"

        processor = self.processors[adapter]
        opening = opens_thought(processor)  # is in the prompt, as in `generate`
        texts, cut = zip(*in_parallel(answer, examples), strict=True)
        return list(texts), list(cut)

    def scores(self, examples: list[dict], answers: list[list[str]], *, adapter: str | None) -> torch.Tensor:
        """Return the log-likelihood of each of K given answers to each of B examples, shape (B, K), float32.

        The server reads prompt and answer as one prompt, and returns the log-likelihoods of that. In templates with
        thoughts, an answer without one stands behind an empty one.
        """
        processor = self.processors[adapter]
        end_token = families_of(processor)[0].end_token

        def score(example: dict, texts: list[str]) -> list[float]:
            images = load_pixels(example, processor)
            messages = chat_messages(example["messages"], images)
            prompt = prompt_ids(processor, example, images, skip_thought=True)
            rows = processor.tokenizer([text + end_token for text in texts])["input_ids"]
            ask = partial(self._score, example, adapter, messages, prompt)
            return [ask(text, ids) for text, ids in zip(texts, rows, strict=True)]

        return torch.tensor(in_parallel(score, examples, answers))

    def answer_and_score(
        self, examples: list[dict], max_new_tokens: int, answers: list[list[str]], *, adapter: str | None
    ) -> tuple[list[str], list[bool], list[list[float]]]:
        """Return what `answers` does, and the log-likelihoods of each example's given answers, if it has any."""
        texts, cut = self.answers(examples, max_new_tokens, adapter=adapter)
        return texts, cut, score_given(self, examples, answers, adapter=adapter)

    def _score(self, example: dict, adapter: str | None, messages: list, prompt: list, text: str, ids: list) -> float:
        """Return the log-likelihood of the tokens `ids` of one answer after the prompt's."""
        turn = {"role": "assistant", "content": [{"type": "text", "text": text}]}
        options = {"add_generation_prompt": False, "prompt_logprobs": 0, "max_tokens": 1}
        reply = self._ask(example, adapter, [*messages, turn], **options)
        start, end = len(prompt), len(prompt) + len(ids)
        check_prompt(example, reply["prompt_token_ids"][:end], prompt + ids)
        return sum(
            log[str(token)]["logprob"] for log, token in zip(reply["prompt_logprobs"][start:end], ids, strict=True)
        )

    def _ask(self, example: dict, adapter: str | None, messages: list[dict], **options) -> dict:
        if adapter not in self.models:
            raise ValueError(f"{self.client.url} lists no base model, which --baseline needs")
        body = {"model": self.models[adapter], "messages": messages, "temperature": 0.0, "return_token_ids": True}
        try:
            return self.client.request(CHAT, body | options)
        except ValueError as error:
            raise ValueError(f"sample {example.get('id')!r}: {error}") from error


def score_given(engine, examples: list[dict], answers: list[list[str]], *, adapter: str | None) -> list[list[float]]:
    """Return the log-likelihoods of each example's given answers; an example without any has an empty list."""
    scores, scored = [[] for _ in examples], [n for n, texts in enumerate(answers) if texts]
    if scored:
        values = engine.scores([examples[n] for n in scored], [answers[n] for n in scored], adapter=adapter)
        for n, row in zip(scored, values.tolist(), strict=True):
            scores[n] = row
    return scores


def in_parallel(work: Callable, *rows: list) -> list:
    """Return `work` of each row, several at a time; the first error ends the waiting for all that have not begun."""
    pool = ThreadPoolExecutor(CONCURRENT)
    try:
        return list(pool.map(work, *rows))
    finally:
        pool.shutdown(cancel_futures=True)


def prompt_ids(processor: ProcessorMixin, example: dict, images: list, *, skip_thought: bool = False) -> list[int]:
    """Return the ids of an example's prompt, each image's token repeated as often as it has tokens."""
    tokenizer, sizing = processor.tokenizer, processor.image_processor
    ids = tokenizer(render_prompt(processor, example["messages"], skip_thought=skip_thought))["input_ids"]
    area = (sizing.patch_size * sizing.merge_size) ** 2
    image_id = tokenizer.convert_tokens_to_ids(processor.image_token)
    return expand_images(ids, [image.width * image.height // area for image in images], image_id=image_id).tolist()


def check_prompt(example: dict, found: list[int], expected: list[int]) -> None:
    """Raise ValueError unless the server has read the prompt that the training would have."""
    if found == expected:
        return
    shorter = min(len(found), len(expected))
    place = next((n for n in range(shorter) if found[n] != expected[n]), shorter)
    counts = f"{len(found)} tokens there and {len(expected)} here, the first other one at {place}"
    rule = "start the server as predict.py --print-server vllm says (chat template, pixel limits)"
    raise ValueError(f"sample {example.get('id')!r}: the server reads another prompt: {counts}; {rule}")


def load_processors(adapters: dict[str, str], base: str | None, args: argparse.Namespace) -> dict:
    """Return each adapter's processor by name, and under None that of the base alone, with the limits of `args`."""
    pixels = {"min_pixels": args.min_pixels, "max_pixels": args.max_pixels}
    processors = {name: load_processor(path, **pixels) for name, path in adapters.items()}
    return {None: next(iter(processors.values())) if processors else load_processor(base, **pixels), **processors}


@contextmanager
def open_engine(adapters: list[str], base: str | None, args: argparse.Namespace, log: Path | None = None) -> Iterator:
    """Yield the engine that `args` names, with the model loaded or the server ready.

    Args:
        adapters: folders or Hub ids; none for the base alone.
        base: base model, in place of the one that the adapters name.
        args: `engine`, `server`, `quantization`, `dtype`, `min_pixels`, `max_pixels`, `batch_size`.
        log: of a server that is started here; a temporary file when None.

    Raises:
        ValueError: the model cannot be loaded, or the server does not start, or has other models.
    """
    if args.engine == "transformers":
        model, names = load_adapters(adapters, base=base, quantization=args.quantization, dtype=args.dtype)
        speed_up_answering(model)
        yield TransformersEngine(model, names, load_processors(names, base, args), args.batch_size)
        return
    names = dict(zip(served_names(adapters, base), adapters, strict=True))
    processors = load_processors(names, base, args)
    own = [processors[name] for name in names] or [processors[None]]
    serving = describe_serving(adapters, own, base=base, quantization=args.quantization, dtype=args.dtype)
    if args.server:
        client = ChatClient(check_url(args.server))
        yield VllmEngine(client, names, listed_models(client, names, serving.base), processors)
        return
    warn_of_4_bit(adapters, args)
    log = log or Path(tempfile.mkstemp(prefix="vllm-", suffix=".log")[1])
    with start_server(replace(serving, pixels=open_limits(own[0])), log) as client:
        yield VllmEngine(client, names, {None: serving.name, **{name: name for name in names}}, processors)


def open_limits(processor: ProcessorMixin) -> dict[str, int]:
    """Return pixel limits, px^2, that leave images as they are that were resized by the processor's own limits.

    Those can be too close together for its own results: an image that is shrunk to whole cells under the largest area
    can be under the smallest.
    """
    options = fit_options(processor.image_processor)
    largest = max(options["max_pixels"], 2 * options["min_pixels"])
    return {"min_pixels": options["cell"] ** 2, "max_pixels": largest}


def warn_of_4_bit(adapters: list[str], args: argparse.Namespace) -> None:
    options = {"base": None, "quantization": args.quantization, "dtype": args.dtype}
    if any(loading_settings(adapter, **options)["quantization"] for adapter in adapters):
        print(
            "the base was in 4 bit in training; vLLM has it in 16 bit, so answers may differ a little", file=sys.stderr
        )


def listed_models(client: ChatClient, adapters: dict[str, str], base: str | None) -> dict[str | None, str]:
    """Return what a given server calls each adapter, and under None the base.

    A model is listed under the last part of its path, as `--print-server` prints it, or under its whole path.

    Raises:
        ValueError: an adapter is not listed, or there are none and several models that the base could be.
    """
    listed = client.models()
    served = served_names(list(adapters.values()), base)
    names = {
        name: find_model(path, [own, path], listed, client.url)
        for (name, path), own in zip(adapters.items(), served, strict=True)
    }
    rest = [name for name in listed if name not in names.values()]
    if not adapters:
        return {None: rest[0] if len(rest) == 1 else find_model(base, [served_name(base), base], listed, client.url)}
    known = [name for name in ((served_name(base), base) if base else ()) if name in rest] or rest
    return {**({None: known[0]} if known else {}), **names}


def find_model(path: str, names: list[str], listed: list[str], url: str) -> str:
    if found := [name for name in names if name in listed]:
        return found[0]
    there = ", ".join(map(repr, listed)) or "nothing"
    raise ValueError(f"{url} serves {there}, expected {names[0]!r} for {path} (--print-server)")
