"""Answers with equal beginnings share tokens of a tree, in which no branch sees another."""

import torch

from evaluation.answer_trees import build_tree, stack_trees

ANSWERS = ((5, 6, 7, 9), (5, 6, 8, 9), (5, 9), (6, 9))  # 9 ends them


def test_each_beginning_is_read_once():
    tree = build_tree(ANSWERS)
    assert tree.tokens.tolist() == [5, 6, 7, 8, 6]
    assert tree.depths.tolist() == [0, 1, 2, 2, 0]
    assert [row.nonzero().flatten().tolist() for row in tree.visible] == [[0], [0, 1], [0, 1, 2], [0, 1, 3], [4]]
    assert tree.targets.tolist() == [[5, 6, 7, 9], [5, 6, 8, 9], [5, 9, 0, 0], [6, 9, 0, 0]]
    assert tree.sources.tolist() == [[0, 1, 2, 3], [0, 1, 2, 4], [0, 1, 0, 0], [0, 5, 0, 0]]
    assert tree.is_token.sum(1).tolist() == [4, 4, 2, 2]


def test_answers_of_one_token_need_no_tree():
    tree = build_tree(((5,), (6,)))
    assert (tree.tokens.tolist(), tree.targets.tolist(), tree.sources.tolist()) == ([], [[5], [6]], [[0], [0]])


def test_trees_of_a_batch_are_filled_up_to_the_largest():
    batch = stack_trees([ANSWERS, ((5,), (6,), (7, 8), (9,))])
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 6], [7, 0, 0, 0, 0]]
    assert torch.equal(batch.visible[1], torch.eye(5, dtype=torch.bool))  # a row that sees nothing has no softmax
    assert torch.equal(batch.visible[0], build_tree(ANSWERS).visible)
    assert batch.targets[1].tolist() == [[5, 0, 0, 0], [6, 0, 0, 0], [7, 8, 0, 0], [9, 0, 0, 0]]
    assert batch.is_token[1].sum(1).tolist() == [1, 1, 2, 1]
