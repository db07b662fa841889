"""Thoughts before answers: one chat template for training, evaluation and serving, with or without them."""

import re

from transformers import ProcessorMixin

CHOICES = ("off", "on")
OPENING, CLOSING = "<think>\n", "\n</think>\n\n"  # of a thought, in Qwen's chat templates
_SWITCH = "enable_thinking"
_DEFAULT = re.compile(r"^\{%- set enable_thinking = enable_thinking \| default\((true|false)\) -%\}\n")
# Published templates omit the thoughts of all turns but the last, so that no sequence holds the prompts of two turns.
_LAST_TURN = re.compile(r"loop\.index0 > ns\.last_query_index")


def set_thinking(processor: ProcessorMixin, thinking: str | None) -> None:
    """Let the processor's chat template ask with or without thoughts by default, and keep those of earlier turns.

    The processor saves this template: whoever loads it from an adapter asks by the prompts of the training.

    Args:
        processor: is changed.
        thinking: "on" or "off"; None for what an earlier call has set, else "off".

    Raises:
        ValueError: the template has no thoughts to switch on, or cannot be made to keep those of earlier turns.
    """
    if not has_thoughts(processor):
        if thinking == "on":
            raise ValueError("thinking: the chat template of this model has no thoughts; set thinking: off")
        return
    template = processor.chat_template
    found = _DEFAULT.match(template)
    on = thinking == "on" if thinking else bool(found) and found[1] == "true"
    body = _LAST_TURN.sub("true", _DEFAULT.sub("", template))
    processor.chat_template = f"{{%- set {_SWITCH} = {_SWITCH} | default({str(on).lower()}) -%}}\n{body}"
    _check_prompts(processor, thought="yes" if on else "")


def has_thoughts(processor: ProcessorMixin) -> bool:
    """Return whether each answer starts with a think block in the processor's chat template."""
    return _SWITCH in processor.chat_template


def _check_prompts(processor: ProcessorMixin, *, thought: str) -> None:
    """Raise ValueError unless a chat starts with the prompt of each of its turns: training learns them at once."""
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!", "reasoning_content": thought}] * 2
    chat = processor.apply_chat_template(turns)
    for asked in (1, 3):
        prompt = processor.apply_chat_template(turns[:asked], add_generation_prompt=True)
        if not chat.startswith(prompt):
            rule = f"does not start with its prompt {prompt!r}; use that of the published Qwen3.5, 3.6 or 3.8"
            raise ValueError(f"chat template: turn {asked} of a chat {rule}")


def split_thought(answer: str) -> tuple[str, str]:
    """Return an answer's thought and what follows it, as the chat templates of Qwen3.5 and 3.6 split them."""
    before, closed, _ = answer.partition("</think>")
    if not closed:
        return "", answer
    return before.split("<think>")[-1].strip(), answer.split("</think>")[-1].lstrip("\n")


def check_thought(answer: str, thinking: str) -> str | None:
    """Return what is wrong with the thought of an answer to learn, None if nothing is.

    Args:
        answer: text of an assistant's turn.
        thinking: of the recipe.
    """
    opened, closed = answer.count("<think>"), answer.count("</think>")
    if not opened and not closed:
        return None
    if thinking == "off":
        return "it holds a thought, and thinking is off: set thinking: on, or leave the thought out"
    if (opened, closed) != (1, 1) or not answer.lstrip().startswith("<think>"):
        return "expected one thought, <think>...</think>, at its start"
    return None if split_thought(answer)[1].strip() else "nothing follows its thought"
