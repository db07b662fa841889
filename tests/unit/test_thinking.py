"""Thoughts: prompts and labels by each generation's chat template, as TRL's templates for training have them."""

import copy
import random

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor
from trl import chat_template_utils

from collator import VisionSFTCollator, chat_of, collate_prompts, load_pixels, render, render_prompt
from data_prep.labels import strip_thinking
from demo.tiny_model import build_processor
from helpers.runs import TEXTS
from models.families import FAMILIES
from models.thinking import CLOSING, OPENING, check_thought, set_thinking, split_thought
from training.data import check_thoughts

THINKING = ("qwen3_5_nothink", "qwen3_5_think", "qwen3_6", "qwen3_8")
TEMPLATES = [("qwen2_5_vl", "qwen2_vl"), ("qwen2_5_vl", "qwen2_5_vl"), ("qwen3_vl", "qwen3_vl")]
TEMPLATES += [(template, "qwen3_5") for template in THINKING]
WORDS = ["melanoma", "It is", "psoriasis.", "vitiligo?", "\n", "\n\n", "Look", "ä", "皮肤", "  ", "urticaria", "1.5"]


def processor_of(template, family):
    processor = build_processor(TEXTS, family=family)
    processor.image_processor.size = {"shortest_edge": 1024, "longest_edge": 112 * 112}
    processor.chat_template = getattr(chat_template_utils, f"{template}_chat_template")
    return processor


def text(rng, *, words=6):
    return (" ".join(rng.choices(WORDS, k=rng.randint(1, words))).strip() or "Dark") + rng.choice(["", ".", "!"])


def conversation(number, *, thoughts):
    """Return a sample: perhaps a system turn, one to three turns, up to two images each, and perhaps thoughts."""
    rng = random.Random(number)
    messages = [{"role": "system", "content": text(rng)}] if rng.random() < 0.4 else []
    images = []
    for _ in range(rng.randint(1, 3)):
        markers = rng.choice([0, 0, 1, 2])
        images += [Image.new("RGB", (rng.randint(28, 120), rng.randint(28, 120)), "red") for _ in range(markers)]
        parts = [text(rng, words=3) for _ in range(markers + 1)]
        answer = text(rng)
        if thoughts and rng.random() < 0.6:
            answer = f"<think>{rng.choice(['', chr(10)])}{text(rng)}{rng.choice(['', chr(10)])}</think>\n\n{answer}"
        messages += [{"role": "user", "content": "<image>".join(parts)}, {"role": "assistant", "content": answer}]
    return {"id": str(number), "images": images, "messages": messages}


def trl_mask(processor, stock, sample, thinking):
    """Return ids and mask of the answers by TRL's template for training of the same generation."""
    images = iter(load_pixels(sample, processor))
    chat = copy.deepcopy(chat_of(processor, sample["messages"]))
    for block in (block for message in chat for block in message["content"] if block["type"] == "image"):
        block["image"] = next(images)
    theirs = processor.apply_chat_template(
        chat, chat_template=getattr(chat_template_utils, f"{stock}_training_chat_template"), tokenize=True,
        return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt", enable_thinking=thinking,
        processor_kwargs={"images_kwargs": {"do_resize": False}},
    )  # fmt: skip
    return torch.as_tensor(theirs["input_ids"]), torch.as_tensor(theirs["assistant_masks"]).bool()


def without(ids, mask, tokenizer, *, block):
    """Return the mask without the newline after an answer's end, and without the think block at an answer's start."""
    end, newline = tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.encode("\n")[0]
    mask = mask.clone()
    mask[:, 1:] &= ~((ids[:, :-1] == end) & (ids[:, 1:] == newline))
    if block:
        for start in (mask[0] & ~torch.cat([mask.new_zeros(1), mask[0, :-1]])).nonzero().flatten().tolist():
            assert ids[0, start : start + len(block)].tolist() == block
            mask[0, start : start + len(block)] = False
    return mask


@pytest.mark.parametrize(
    ("template", "family", "thinking"),
    [(*kind, thinking) for kind in TEMPLATES for thinking in (("off", "on") if kind[0] in THINKING else ("off",))],
)
def test_labels_are_trls(template, family, thinking):
    """Of 30 conversations; without thoughts, the empty think block that TRL learns belongs to the prompt here."""
    processor = processor_of(template, family)
    set_thinking(processor, thinking)
    collate = VisionSFTCollator(processor)
    block = processor.tokenizer.encode(OPENING + CLOSING) if template in THINKING and thinking == "off" else []
    for number in range(30):
        sample = conversation(number, thoughts=thinking == "on")
        ids, mask = trl_mask(processor, template, sample, thinking == "on")
        ours = collate([sample])
        assert torch.equal(ours["input_ids"], ids)
        assert torch.equal(ours["labels"] != -100, without(ids, mask, processor.tokenizer, block=block))


@pytest.mark.parametrize("thinking", ["off", "on"])
@pytest.mark.parametrize("template", THINKING)
def test_every_turn_is_asked_as_it_was_learnt(template, thinking, tmp_path):
    """By training, by evaluation, by answers that are scored, and by a server that loads the saved processor."""
    processor = processor_of(template, "qwen3_5")
    set_thinking(processor, thinking)
    processor.save_pretrained(tmp_path)
    served = AutoProcessor.from_pretrained(tmp_path)
    for number in range(10):
        messages = conversation(number, thoughts=thinking == "on")["messages"]
        learnt = render(processor, messages)
        for turn in [n for n, message in enumerate(messages) if message["role"] == "assistant"]:
            prompt = render_prompt(processor, messages[:turn])
            assert learnt.startswith(prompt)
            assert prompt == served.apply_chat_template(chat_of(served, messages[:turn]), add_generation_prompt=True)
            assert prompt.endswith(OPENING if thinking == "on" else OPENING + CLOSING)
            assert render_prompt(processor, messages[:turn], skip_thought=True).endswith(OPENING + CLOSING)


def test_a_saved_setting_stays_until_another_is_asked_for():
    processor = processor_of("qwen3_8", "qwen3_5")
    set_thinking(processor, None)
    off = processor.chat_template
    set_thinking(processor, "on")
    on = processor.chat_template
    assert on != off
    set_thinking(processor, None)
    assert processor.chat_template == on
    set_thinking(processor, "off")
    assert processor.chat_template == off


def test_effort_is_asked_for_with_thoughts_only():
    """Qwen3.8 adds a system turn about it, also to the prompts of training."""
    processor, turn = processor_of("qwen3_8", "qwen3_5"), [{"role": "user", "content": "?"}]
    for thinking, expected in (("off", False), ("on", True)):
        set_thinking(processor, thinking)
        assert ("Reasoning effort" in render(processor, turn)) == expected


def test_thoughts_without_a_template_for_them_are_refused():
    processor = processor_of("qwen2_5_vl", "qwen2_5_vl")
    with pytest.raises(
        ValueError, match="thinking: the chat template of this model has no thoughts; set thinking: off"
    ):
        set_thinking(processor, "on")
    before = processor.chat_template
    set_thinking(processor, "off")
    assert processor.chat_template == before


def test_a_template_that_drops_thoughts_of_earlier_turns_is_refused():
    processor = processor_of("qwen3_6", "qwen3_5")
    processor.chat_template = processor.chat_template.replace("loop.index0 > ns.last_query_index", "loop.last")
    with pytest.raises(ValueError, match="chat template: turn 1 of a chat does not start with its prompt"):
        set_thinking(processor, "on")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("A nevus.", ("", "A nevus.")),
        ("<think>\nDark. \n</think>\n\nA nevus.", ("Dark.", "A nevus.")),
        ("<think></think>A nevus.", ("", "A nevus.")),
        ("Dark.</think>A nevus.", ("Dark.", "A nevus.")),
    ],
)
def test_an_answer_is_split_as_the_templates_do(answer, expected):
    assert split_thought(answer) == expected
    processor = processor_of("qwen3_6", "qwen3_5")
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    assert processor.apply_chat_template(turns) == processor.apply_chat_template(chat_of(processor, turns))


@pytest.mark.parametrize(
    ("answer", "thinking", "problem"),
    [
        ("A nevus.", "off", None),
        ("A nevus.", "on", None),
        ("<think>Dark.</think>A nevus.", "on", None),
        ("<think>Dark.</think>A nevus.", "off", "it holds a thought, and thinking is off: set thinking: on"),
        ("</think>A nevus.", "off", "it holds a thought, and thinking is off"),
        ("<think>Dark. A nevus.", "on", "expected one thought, <think>...</think>, at its start"),
        ("<think>a</think>b<think>c</think>d", "on", "expected one thought"),
        ("A nevus <think>Dark.</think>", "on", "expected one thought"),
        ("<think>Dark.</think>\n", "on", "nothing follows its thought"),
    ],
)
def test_thoughts_that_do_not_fit_the_recipe_have_a_reason(answer, thinking, problem):
    found = check_thought(answer, thinking)
    assert found is None if problem is None else problem in found


def test_prompts_that_skip_a_thought_are_those_of_models_that_do_not_think():
    example = {"id": "x", "images": [], "messages": [{"role": "user", "content": "What is it?"}]}
    processor = processor_of("qwen3_6", "qwen3_5")
    set_thinking(processor, "off")
    expected = collate_prompts(processor, [example])["input_ids"]
    set_thinking(processor, "on")
    assert torch.equal(collate_prompts(processor, [example], skip_thought=True)["input_ids"], expected)
    assert not torch.equal(collate_prompts(processor, [example])["input_ids"], expected)


def test_what_is_read_of_an_answer_follows_its_thought():
    assert strip_thinking(f"{OPENING}Not melanoma.{CLOSING}A nevus.").strip() == "A nevus."
    assert strip_thinking(f"{OPENING}Perhaps melanoma") == ""


def test_the_families_that_think_are_known_by_their_template():
    for family in FAMILIES.values():
        template = getattr(chat_template_utils, f"{family.chat_template}_chat_template")
        assert family.thinks == ("enable_thinking" in template)


def test_data_whose_thoughts_do_not_fit_the_recipe_names_the_first():
    def split(*answers):
        turns = [[{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}] for answer in answers]
        return {"id": [f"s{n}" for n in range(len(answers))], "messages": turns}

    good, bad = "<think>Dark.</think>A nevus.", "<think>Dark.</think>"
    splits = {"train": split("A nevus.", good), "validation": split(bad), "test": split(bad)}
    rule = "thinking: 2 answers have a wrong thought; the first is of sample 's1': it holds a thought"
    with pytest.raises(ValueError, match=rule):
        check_thoughts(splits, "off")
    with pytest.raises(ValueError, match=r"1 answers have a wrong thought; .* 's0': nothing follows its thought"):
        check_thoughts(splits, "on")
    check_thoughts({"train": splits["train"], "test": splits["test"]}, "on")
