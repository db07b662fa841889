"""A trained adapter on its base, loaded as in training; its answers, and how likely it finds answers given to it."""

import copy
import json
import sys
from contextlib import suppress
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedModel, ProcessorMixin, TextStreamer

from collator import END_TOKEN, collate_prompts
from hub import RUN_FACTS, WEIGHTS
from modeling import load_model


def load_answering_model(
    adapter: str | None, *, base: str | None = None, quantization: str = "auto", dtype: str | None = None
) -> PreTrainedModel | PeftModel:
    """Load the base model, as it was in training unless told otherwise, and the adapter on it.

    Args:
        adapter: folder or Hub id of an adapter; None for the base alone.
        base: folder or Hub id of a base model; the one that the adapter names when None.
        quantization: "nf4", "none", or "auto": as in training, none without an adapter.
        dtype: of the arithmetic; as in training when None, bfloat16 without an adapter.

    Raises:
        ValueError: the adapter or the base cannot be loaded.
    """
    settings = loading_settings(adapter, base=base, quantization=quantization, dtype=dtype)
    model = load_model(base or read_adapter_config(adapter).base_model_name_or_path, **settings)
    decode_greedily(model)
    try:
        return (PeftModel.from_pretrained(model, adapter) if adapter else model).eval()
    except SafetensorError as error:
        raise ValueError(f"--adapter: {adapter}: unreadable weights: {error}") from error


def decode_greedily(model: PreTrainedModel) -> None:
    """Let `generate` take the likeliest token; it would mix in the family's defaults, which penalise repeated ones."""
    own = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id
    )


def load_adapters(adapters: list[str], **options) -> tuple[PreTrainedModel | PeftModel, dict[str, str]]:
    """Load several adapters over one base, and return the model and each adapter's path by its name in the model.

    Args:
        adapters: folders or Hub ids; none for the base alone.
        options: see `load_answering_model`.

    Raises:
        ValueError: two adapters were trained on other bases, or on a base that was loaded otherwise.
    """
    model = load_answering_model(adapters[0] if adapters else None, **options)
    names = {"default": adapters[0]} if adapters else {}
    wanted = _foundation(adapters[0], **options) if adapters else None
    for number, adapter in enumerate(adapters[1:], start=1):
        if (found := _foundation(adapter, **options)) != wanted:
            raise ValueError(f"--adapter: {adapter} goes on {found}, and {adapters[0]} on {wanted}")
        names[f"adapter-{number}"] = adapter
        try:
            model.load_adapter(adapter, adapter_name=f"adapter-{number}")
        except SafetensorError as error:
            raise ValueError(f"--adapter: {adapter}: unreadable weights: {error}") from error
    return model, names


def _foundation(adapter: str, *, base: str | None, quantization: str, dtype: str | None) -> dict:
    settings = loading_settings(adapter, base=base, quantization=quantization, dtype=dtype)
    return {"base": base or read_adapter_config(adapter).base_model_name_or_path, **settings}


def loading_settings(adapter: str | None, *, base: str | None, quantization: str, dtype: str | None) -> dict:
    """Return the keywords of `load_model`: what the adapter's run noted, changed by the options."""
    settings = read_run_facts(adapter) if adapter else {}
    if adapter and not settings and quantization == "auto":
        print(f"{adapter} does not say how its base was loaded; taking 16 bit (--quantization)", file=sys.stderr)
    settings = {"quantization": None, "dtype": "bfloat16", **settings}
    if quantization != "auto":
        settings["quantization"] = None if quantization == "none" else quantization
    if dtype:
        settings["dtype"] = dtype
    if base:
        settings["revision"] = None
    return settings


def read_adapter_config(adapter: str) -> PeftConfig:
    """Return an adapter's configuration.

    Raises:
        ValueError: there is no adapter, or its weights are not in safetensors, which hold tensors and nothing else.
    """
    try:
        config = PeftConfig.from_pretrained(adapter)
    except (OSError, ValueError) as error:
        raise ValueError(f"--adapter: no adapter in {adapter!r}, neither a folder nor on the Hub") from error
    if find_file(adapter, WEIGHTS):
        return config
    raise ValueError(f"--adapter: {adapter} has no {WEIGHTS}; weights of another format are not loaded")


def read_run_facts(adapter: str) -> dict:
    """Return the keywords of `load_model` that `train_sft.py` noted; none for adapters from elsewhere."""
    found = find_file(adapter, RUN_FACTS, f"../{RUN_FACTS}")  # a checkpoint's are in the run's folder
    try:
        return json.loads(found.read_text(encoding="utf-8")) if found else {}
    except ValueError as error:
        raise ValueError(f"{found}: not JSON: {error}") from error


def find_file(adapter: str, name: str, *elsewhere: str) -> Path | None:
    """Return the file of an adapter, a folder (the first that is there) or a repository of the Hub."""
    if Path(adapter).is_dir():
        return next((path for n in (name, *elsewhere) if (path := Path(adapter) / n).is_file()), None)
    with suppress(OSError, ValueError):  # not there, or no network: the caller says what that means
        return Path(hf_hub_download(adapter, name))
    return None


def encode_prompts(model, processor: ProcessorMixin, examples: list[dict]) -> dict[str, torch.Tensor]:
    """Return a left-padded batch of prompts, on the model's device and in its precision."""
    inputs = {name: tensor.to(model.device) for name, tensor in collate_prompts(processor, examples).items()}
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    return inputs


@torch.inference_mode()
def answer(
    model, processor: ProcessorMixin, examples: list[dict], max_new_tokens: int, streamer: TextStreamer | None = None
) -> list[str]:
    """Return the model's answer to each example, decoded greedily; a `streamer` gets a single one as it comes."""
    inputs = encode_prompts(model, processor, examples)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, streamer=streamer)
    new_tokens = output[:, inputs["input_ids"].size(1) :]
    return [text.strip() for text in processor.batch_decode(new_tokens, skip_special_tokens=True)]


@torch.inference_mode()
def score_answers(
    model, processor: ProcessorMixin, examples: list[dict], answers: list[list[str]], *, rows: int = 64
) -> torch.Tensor:
    """Return the log-likelihood of each of K given answers to each of B examples, shape (B, K), float32.

    Image and question are encoded once; the answers, each closed by "<|im_end|>", go on from their key-value cache.

    Args:
        model: the base model, or an adapter on it.
        processor: the model's processor.
        examples: samples whose messages end with the user's turn.
        answers: K answers for each example.
        rows: most answers in one forward pass, which bounds the memory of the cache's copies.
    """
    inputs = encode_prompts(model, processor, examples)
    positions = prompt_positions(model, inputs)
    prefix = model(**inputs, position_ids=positions, use_cache=True, logits_to_keep=1)
    width = max(1, rows // len(examples))
    chunks = [[own[start : start + width] for own in answers] for start in range(0, len(answers[0]), width)]
    scores = [_score_chunk(model, processor.tokenizer, inputs, positions, prefix, chunk) for chunk in chunks]
    return torch.cat(scores, dim=1)


def prompt_positions(model, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the positions of a padded batch in time, height and width, shape (3, B, T)."""
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return base.model.get_rope_index(**{name: inputs[name] for name in names if name in inputs})[0]


def _score_chunk(model, tokenizer, inputs: dict, positions: torch.Tensor, prefix, answers: list[list[str]]):
    """Score K answers to each of B prompts, whose forward pass is `prefix`: (B, K)."""
    count, size = len(answers[0]), len(answers)
    texts = [text + END_TOKEN for own in answers for text in own]
    encoded = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt").to(inputs["input_ids"].device)
    cache = copy.deepcopy(prefix.past_key_values)
    cache.batch_repeat_interleave(count)
    past = inputs["attention_mask"].repeat_interleave(count, dim=0)
    after = positions.amax(dim=(0, 2)).repeat_interleave(count) + 1  # (B K)
    steps = after[:, None] + torch.arange(encoded["input_ids"].size(1), device=after.device)
    output = model(
        input_ids=encoded["input_ids"],
        attention_mask=torch.cat([past, encoded["attention_mask"]], dim=1),
        position_ids=steps.expand(3, -1, -1),
        past_key_values=cache,
    )
    first = prefix.logits[:, -1:].repeat_interleave(count, dim=0)
    logs = torch.cat([first, output.logits[:, :-1]], dim=1).float().log_softmax(-1)
    own = logs.gather(2, encoded["input_ids"][:, :, None])[:, :, 0]
    return (own * encoded["attention_mask"]).sum(1).view(size, count)
