"""The loss of a pack from the hidden states that predict answers, found without a stop of the GPU.

TRL looks for the labels on the GPU, where the host waits for the forward pass twice, and once more for each metric.
The GPU then has nothing to do while the host starts the LM head and the backward pass. The collator knows the places.
"""

import functools
from dataclasses import dataclass
from types import MethodType

import torch
from transformers import PreTrainedModel
from transformers.utils import ModelOutput
from trl.kernels import ChunkedLogProbFunction

CHUNK = 32768  # tokens of the vocabulary at a time, as TRL takes them


@dataclass
class AnswerScores(ModelOutput):
    """What the LM head says of a pack's K labels.

    Attributes:
        log_probs: log-probabilities of the labels, shape (K,).
        entropy: of the predictions, nats, shape (K,).
        is_top1: whether the label is the likeliest token, shape (K,).
    """

    log_probs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None


def add_answers_head(model: PreTrainedModel) -> None:
    """Let `model(..., answers_only=True)` return a pack's `AnswerScores`, in place, beside TRL's fused LM head."""
    before = model.forward

    @functools.wraps(before)  # generation reads the arguments that a forward pass takes
    def forward(self, *args, answers_only: bool = False, **kwargs):
        return score_answers(self, **kwargs) if answers_only else before(*args, **kwargs)

    model.forward = MethodType(forward, model)


def score_answers(
    model: PreTrainedModel, *, labels: torch.Tensor, answer_rows: torch.Tensor, **inputs
) -> AnswerScores:
    """Return what a model without LoRA's wrapper says of a pack's labels (1, T), see `collator.answer_rows`."""
    hidden = model.base_model(**inputs, answer_rows=answer_rows, use_cache=False).last_hidden_state
    head, targets = model.get_output_embeddings(), labels[0].index_select(0, answer_rows + 1)
    rows = hidden[0].index_select(0, answer_rows)
    # temperature 1, no cap and no scale of the logits: as in the forward pass of all families
    log_probs, entropy, _, _, is_top1 = ChunkedLogProbFunction.apply(
        rows, head.weight, head.bias, targets, 1.0, CHUNK, None, 1.0, ("entropy", "is_top1")
    )
    return AnswerScores(log_probs=log_probs, entropy=entropy, is_top1=is_top1)
