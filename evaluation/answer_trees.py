"""Answers to one prompt as a tree: tokens that several answers begin with are in it once, and all are read at once."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True)
class AnswerTree:
    """The tokens of K answers, N of them different beginnings. The last token of each is only predicted.

    Attributes:
        tokens: ids to read, shape (N,).
        depths: tokens of the answer before each one, shape (N,).
        visible: whether a token (row) belongs to the beginning that ends in another (or the same) one, shape (N, N).
        sources: where each answer's tokens are predicted: 0 at the end of the prompt, n + 1 at token n; shape (K, L).
        targets: ids of the answers' tokens, shape (K, L).
        is_token: whether an answer has so many tokens, shape (K, L).
    """

    tokens: torch.Tensor
    depths: torch.Tensor
    visible: torch.Tensor
    sources: torch.Tensor
    targets: torch.Tensor
    is_token: torch.Tensor


def build_tree(answers: tuple[tuple[int, ...], ...]) -> AnswerTree:
    """Return the tree of answers, each of one token or more."""
    nodes: dict[tuple[int, ...], int] = {}
    for ids in answers:
        for end in range(1, len(ids)):
            nodes.setdefault(ids[:end], len(nodes))
    visible = torch.eye(len(nodes), dtype=torch.bool)
    for beginning, n in nodes.items():  # those of a shorter beginning are known already
        if len(beginning) > 1:
            visible[n] |= visible[nodes[beginning[:-1]]]
    rows = [torch.tensor([0, *(nodes[ids[:end]] + 1 for end in range(1, len(ids)))]) for ids in answers]
    return AnswerTree(
        tokens=torch.tensor([beginning[-1] for beginning in nodes], dtype=torch.long),
        depths=torch.tensor([len(beginning) - 1 for beginning in nodes], dtype=torch.long),
        visible=visible,
        sources=pad_sequence(rows, batch_first=True),
        targets=pad_sequence([torch.tensor(ids) for ids in answers], batch_first=True),
        is_token=pad_sequence([torch.ones(len(ids), dtype=torch.bool) for ids in answers], batch_first=True),
    )


def stack_trees(rows: list[tuple[tuple[int, ...], ...]]) -> AnswerTree:
    """Return the trees of B prompts with K answers each as one with B as first dimension, filled up with tokens 0."""
    build = lru_cache(build_tree)  # most prompts have the same answers
    trees = [build(answers) for answers in rows]
    size, length = max(len(tree.tokens) for tree in trees), max(tree.targets.size(1) for tree in trees)
    visible = torch.eye(size, dtype=torch.bool).repeat(len(trees), 1, 1)
    for square, tree in zip(visible, trees, strict=True):
        square[: len(tree.tokens), : len(tree.tokens)] = tree.visible

    def fill(name: str, width: int) -> torch.Tensor:
        tensors = [getattr(tree, name) for tree in trees]
        return torch.stack([torch.nn.functional.pad(tensor, (0, width - tensor.size(-1))) for tensor in tensors])

    nodes = {name: fill(name, size) for name in ("tokens", "depths")}
    return AnswerTree(**nodes, visible=visible, **{n: fill(n, length) for n in ("sources", "targets", "is_token")})
