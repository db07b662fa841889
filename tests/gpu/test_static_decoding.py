"""Captured graphs of decoding on a GPU: the tokens of single steps, for the adapter and for the base."""

from argparse import Namespace

import pytest
import torch

from benchmarks.gpu_7b import build_demo_processor
from benchmarks.gpu_answers import build_adapted, make_questions
from evaluation.generation import decode, decode_step_by_step, encode_prompts, read_prompts
from evaluation.static_decoding import decoders_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("shapes", ["Qwen2.5-VL-7B", "Qwen3-VL-8B", "Qwen3.5-9B"])
@torch.inference_mode()
def test_graphs_give_the_tokens_of_single_steps(shapes, rows, capsys):
    processor = build_demo_processor(shapes)
    model = build_adapted(processor, Namespace(tiny=True, shapes=shapes), torch.device("cuda")).float()
    inputs = encode_prompts(model, processor, make_questions(rows, (112, 84)))

    def both():
        steps = decode_step_by_step(model, read_prompts(model, inputs), 12)
        assert torch.equal(decode(model, read_prompts(model, inputs), 12), steps)
        return steps

    adapted = both()
    with model.disable_adapter():
        base = both()
    assert torch.equal(both(), adapted) and not torch.equal(base, adapted)
    [decoder] = decoders_of(model).kept.values()
    assert len(decoder.graphs) == 2 and capsys.readouterr().err == ""
