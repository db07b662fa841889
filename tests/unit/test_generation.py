"""Our decoding gives the texts of `model.generate`, in any batch, with prompts that are read once."""

import pytest
import torch
from transformers import TextStreamer

from demo.tiny_model import save_tiny_model
from evaluation.generation import (
    answer_and_score,
    decode,
    encode_prompts,
    end_tokens,
    generate,
    pad_after_end,
    read_prompts,
    score_answers,
)
from evaluation.static_decoding import StaticDecoders, decode_static
from models.adapters import end_answers, load_answering_model
from models.loading import load_processor

TOKENS = 12
ANSWERS = ["This is melanoma.", "It is psoriasis, vitiligo, urticaria.", "x"]


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def answering(request, tmp_path_factory):
    """A tiny model of a family and its processor; some answers end early."""
    folder = tmp_path_factory.mktemp(request.param)
    texts = ["This is melanoma. It is psoriasis, vitiligo, urticaria. Is the skin dark? What is shown?"]
    save_tiny_model(folder, texts, num_layers=4, family=request.param)
    model = load_answering_model(None, base=str(folder), quantization="none", dtype="float32")
    return model, load_processor(str(folder))


@pytest.fixture
def examples(demo_splits):
    """Prompts of three lengths, and one without an image."""
    samples = [demo_splits["train"][n] for n in (0, 1, 2)]
    prompts = [{"id": s["id"], "images": s["images"], "messages": s["messages"][:-1]} for s in samples]
    return [*prompts, {"id": "text", "images": [], "messages": [{"role": "user", "content": "Is the skin dark?"}]}]


def expected_tokens(model, processor, examples):
    inputs = encode_prompts(model, processor, examples)
    output = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    return output[:, inputs["input_ids"].size(1) :]


def end_answers_early(model, processor, examples):
    """Make tokens that the model writes at some places its end tokens, so that rows end at different steps."""
    model.generation_config.eos_token_id = []
    tokens = expected_tokens(model, processor, examples)
    model.generation_config.eos_token_id = [int(tokens[0, 2]), int(tokens[1, 5])]


@pytest.mark.parametrize(("named", "kept"), [(None, []), (3, [3]), ([3, 5], [3, 5])])
def test_answers_end_as_in_training_whatever_the_base_names(answering, named, kept):
    model, processor = answering
    model.generation_config.eos_token_id = named
    end_answers(model, processor)
    assert set(end_tokens(model).tolist()) == {processor.tokenizer.convert_tokens_to_ids("<|im_end|>"), *kept}


@pytest.mark.parametrize("early", [False, True])
def test_the_texts_are_those_of_transformers(answering, examples, early):
    model, processor = answering
    model.generation_config.eos_token_id = [processor.tokenizer.convert_tokens_to_ids("<|im_end|>")]
    if early:
        end_answers_early(model, processor, examples)
    tokens = expected_tokens(model, processor, examples)
    ends = torch.tensor(model.generation_config.eos_token_id)
    texts, cut = generate(model, processor, examples, TOKENS)
    assert texts == [t.strip() for t in processor.batch_decode(tokens, skip_special_tokens=True)]
    assert cut == (~torch.isin(tokens, ends).any(1)).tolist()
    assert not early or not all(cut)


@pytest.mark.parametrize("early", [False, True])
def test_a_cache_of_fixed_size_gives_the_same_tokens(answering, examples, early):
    """What a GPU captures, here without capturing: rows filled up, the decoder used again."""
    model, processor = answering
    model.generation_config.eos_token_id = []
    if early:
        end_answers_early(model, processor, examples)
    decoder = StaticDecoders().get(model, 5, 400)
    assert (decoder.rows, decoder.length) == (8, 448)
    for batch in (examples, examples[1:], examples[3:]):
        inputs = encode_prompts(model, processor, batch)
        with torch.inference_mode():
            expected = decode(model, read_prompts(model, inputs), TOKENS)
            decoder.load(read_prompts(model, inputs))
            ends = end_tokens(model)
            found = decode_static(model, decoder, len(batch), TOKENS, ends)
        found = pad_after_end(found, ends, model.generation_config.pad_token_id or 0)
        assert torch.equal(found, expected)


def test_a_decoder_serves_batches_that_need_at_least_half_of_it(answering):
    decoders = StaticDecoders()
    first = decoders.get(answering[0], 16, 500)
    assert (first.rows, first.length) == (16, 512)
    assert decoders.get(answering[0], 9, 300) is first and decoders.get(answering[0], 16, 257) is first
    assert decoders.get(answering[0], 8, 200) is not first
    alone = decoders.get(answering[0], 1, 200)
    assert (alone.rows, list(decoders.kept)) == (1, [(8, 256), (1, 256)])


def test_answers_and_scores_of_one_reading_are_those_of_two(answering, examples):
    model, processor = answering
    asked = [ANSWERS, [], ANSWERS, ANSWERS]
    texts, cut, scores = answer_and_score(model, processor, examples, TOKENS, asked)
    assert (texts, cut) == generate(model, processor, examples, TOKENS)
    scored = [examples[n] for n in (0, 2, 3)]
    expected = score_answers(model, processor, scored, [ANSWERS] * 3)
    assert scores[1] == []
    assert torch.allclose(torch.tensor([scores[n] for n in (0, 2, 3)]), expected, atol=1e-4)


def test_results_do_not_depend_on_the_batch(answering, examples):
    model, processor = answering
    together = answer_and_score(model, processor, examples, TOKENS, [ANSWERS] * 4)
    alone = [answer_and_score(model, processor, [one], TOKENS, [ANSWERS]) for one in examples]
    assert together[0] == [texts[0] for texts, _, _ in alone]
    assert torch.allclose(torch.tensor(together[2]), torch.tensor([scores[0] for *_, scores in alone]), atol=1e-4)


def test_logits_that_are_not_finite_give_no_answer(answering, examples):
    model, processor = answering
    weight = model.lm_head.weight
    kept = weight[3].clone()
    try:
        weight.data[3] = float("nan")
        for ask in (generate, lambda *args: answer_and_score(*args, [[] for _ in examples])):
            with pytest.raises(ValueError, match=r"sample .*: the model's logits are not finite"):
                ask(model, processor, examples, TOKENS)
    finally:
        weight.data[3] = kept


def test_a_streamer_gets_the_prompt_and_then_each_token(answering, examples):
    class Kept(TextStreamer):
        def __init__(self):
            self.got = []

        def put(self, value):
            self.got.append(value.flatten().tolist())

        def end(self):
            self.got.append("end")

    model, processor = answering
    model.generation_config.eos_token_id = []
    kept, (prompt, *_) = Kept(), encode_prompts(model, processor, examples[:1])["input_ids"]
    generate(model, processor, examples[:1], TOKENS, kept)
    [tokens] = expected_tokens(model, processor, examples[:1]).tolist()
    assert kept.got == [prompt.tolist(), *[[token] for token in tokens], "end"]
