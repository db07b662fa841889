"""One loaded model for all sessions: answers that are streamed, and likelihoods of answers."""

import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from itertools import islice

import numpy as np
from peft import PeftModel
from transformers import ProcessorMixin, TextIteratorStreamer

from collator import opens_thought
from evaluation.generation import generate, out_of_memory_advice, score_answers
from models.adapters import end_answers
from models.loading import readable_out_of_memory


class StoppedError(Exception):
    """The session does not want the rest of its answer."""


class _Streamer(TextIteratorStreamer):
    """Yields an answer's text while it is generated, and ends the generation when `stop` is set."""

    def __init__(self, tokenizer, stop: threading.Event):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.stop = stop

    def put(self, value) -> None:
        if self.stop.is_set():
            raise StoppedError
        super().put(value)


class Engine:
    """An adapter on its base model, which one computation at a time may use.

    Args:
        model: with one adapter.
        processor: the adapter's.
        max_new_tokens: longest answer.
        batch_size: examples in one forward pass.
    """

    def __init__(self, model: PeftModel, processor: ProcessorMixin, *, max_new_tokens: int, batch_size: int):
        self.model, self.processor = model, processor
        end_answers(model, processor)
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        self._lock = threading.Lock()

    @property
    def busy(self) -> bool:
        return self._lock.locked()

    @contextmanager
    def _use(self, *, adapter: bool, batch_size: int) -> Iterator[None]:
        without_adapter = nullcontext() if adapter else self.model.disable_adapter()
        with self._lock, without_adapter, readable_out_of_memory(out_of_memory_advice(batch_size)):
            yield

    def stream(self, example: dict, stop: threading.Event, *, adapter: bool = True) -> Iterator[tuple[str, str]]:
        """Yield the greedy answer so far, and a note: empty, or at the end why the answer is not complete.

        Args:
            example: see `collate_prompts`.
            stop: ends the answer at its next token.
            adapter: whether the adapter is enabled; without it the base model answers.

        Raises:
            ValueError: out of memory.
        """
        streamer, text = _Streamer(self.processor.tokenizer, stop), opens_thought(self.processor)
        with ThreadPoolExecutor(1) as pool:
            finished = pool.submit(self._generate, example, streamer, adapter)
            try:
                for piece in streamer:
                    text += piece
                    yield text.strip(), ""
            except GeneratorExit:  # nobody reads on
                stop.set()
                raise
            try:
                texts, cut = finished.result()
                yield texts[0], f"cut at {self.max_new_tokens} tokens" if cut[0] else ""
            except StoppedError:
                yield text.strip(), "stopped"

    def _generate(self, example: dict, streamer: _Streamer, adapter: bool) -> tuple[list[str], list[bool]]:
        try:
            with self._use(adapter=adapter, batch_size=1):
                return generate(self.model, self.processor, [example], self.max_new_tokens, streamer)
        finally:
            streamer.end()

    def score(self, examples: list[dict], answers: list[str]) -> np.ndarray:
        """Return the adapter's log-likelihood of K answers to each of B examples, shape (B, K)."""
        with self._use(adapter=True, batch_size=len(examples)):
            return score_answers(self.model, self.processor, examples, [answers] * len(examples)).cpu().numpy()

    def score_all(self, examples: Iterable[dict], answers: list[str]) -> Iterator[np.ndarray]:
        """Yield what `score` returns for each batch; other computations may come between two batches."""
        examples = iter(examples)
        while batch := list(islice(examples, self.batch_size)):
            yield self.score(batch, answers)
