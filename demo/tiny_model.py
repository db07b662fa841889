"""A model of the family of two million random weights with its own tokenizer: the real classes, made in a second."""

import argparse
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    ProcessorMixin,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)
from trl.chat_template_utils import qwen2_5_vl_chat_template, qwen3_vl_chat_template

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")  # by their model_type
HEAD_SIZE = 32

# The family's special tokens, in the order of Qwen2.5's tokenizer_config.json; the ids follow the small vocabulary.
SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)
ROLES = ("system", "user", "assistant", "You are a helpful assistant.")


def build_tokenizer(texts: list[str], *, vocab_size: int = 512) -> Qwen2Tokenizer:
    """Train a byte-level BPE of `vocab_size` tokens on `texts` and add the family's special tokens behind it."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([*texts, *ROLES], trainer)
    model = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        eos_token="<|im_end|>",
        extra_special_tokens=list(SPECIAL_TOKENS),
        model_max_length=4096,
    )
    return tokenizer


def build_processor(texts: list[str], *, family: str = "qwen2_5_vl") -> ProcessorMixin:
    """Return the family's processor (image sizing, chat template) around a small tokenizer."""
    make, template = Qwen2_5_VLProcessor, qwen2_5_vl_chat_template
    images, videos = Qwen2VLImageProcessor(), Qwen2VLVideoProcessor()
    if family == "qwen2_vl":
        make = Qwen2VLProcessor  # its template is the same
    elif family == "qwen3_vl":
        make, template = Qwen3VLProcessor, qwen3_vl_chat_template
        sizes = {"shortest_edge": 65536, "longest_edge": 16777216}
        images = Qwen2VLImageProcessor(patch_size=16, size=sizes, image_mean=[0.5] * 3, image_std=[0.5] * 3)
        videos = Qwen3VLVideoProcessor()
    parts = {"image_processor": images, "video_processor": videos, "tokenizer": build_tokenizer(texts)}
    return make(**parts, chat_template=template)


def build_config(
    tokenizer: Qwen2Tokenizer, *, hidden_size: int, num_layers: int, family: str = "qwen2_5_vl", tied: bool = False
) -> PreTrainedConfig:
    """Return the family's structure (M-RoPE, window attention or deepstack) with few and narrow layers.

    Args:
        tokenizer: gives the vocabulary and the ids of its tokens.
        hidden_size: of language model and vision tower; a multiple of 64.
        num_layers: of the language model; at least 3 for Qwen3-VL, whose tower adds to the first two.
        family: one of `FAMILIES`.
        tied: let the LM head share the embeddings' weights, as the family's small models do.
    """
    names = ("image", "video", "vision_start", "vision_end")
    tokens = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    ids = {f"{n}_token_id": tokenizer.convert_tokens_to_ids(t) for n, t in zip(names, tokens, strict=True)}
    text = text_settings(tokenizer, hidden_size, num_layers, family)
    vision = vision_settings(hidden_size, family)
    return AutoConfig.for_model(family, text_config=text, vision_config=vision, tie_word_embeddings=tied, **ids)


def text_settings(tokenizer: Qwen2Tokenizer, hidden_size: int, num_layers: int, family: str) -> dict:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden_size,
        "intermediate_size": 3 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": hidden_size // HEAD_SIZE,
        "num_key_value_heads": hidden_size // HEAD_SIZE // 2,
        "max_position_embeddings": 4096,
        "rope_parameters": rope,
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
        "bos_token_id": None,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if family == "qwen3_vl":
        rope |= {"mrope_section": [6, 5, 5], "mrope_interleaved": True}
        settings["head_dim"] = HEAD_SIZE
    return settings


def vision_settings(hidden_size: int, family: str) -> dict:
    settings = {"depth": 2, "hidden_size": hidden_size, "num_heads": hidden_size // HEAD_SIZE}
    if family == "qwen2_vl":
        return {**settings, "embed_dim": hidden_size, "mlp_ratio": 2}
    settings |= {"intermediate_size": 2 * hidden_size, "out_hidden_size": hidden_size}
    if family == "qwen2_5_vl":
        return {**settings, "fullatt_block_indexes": [1]}
    # What its first two blocks see is added behind the first two layers of the language model.
    return {**settings, "num_position_embeddings": 8 * 8, "deepstack_visual_indexes": [0, 1]}


def save_tiny_model(
    folder: Path,
    texts: list[str],
    *,
    hidden_size: int = 128,
    num_layers: int = 4,
    seed: int = 0,
    family: str = "qwen2_5_vl",
    tied: bool = False,
):
    """Write a base model with its processor to `folder`, in the form that a Hub download has."""
    torch.manual_seed(seed)
    processor = build_processor(texts, family=family)
    sizes = {"hidden_size": hidden_size, "num_layers": num_layers}
    config = build_config(processor.tokenizer, **sizes, family=family, tied=tied)
    model = AutoModelForImageTextToText.from_config(config)
    # The head stays frozen: at its usual scale of 0.02 no adapter could make this narrow model sure of anything.
    torch.nn.init.normal_(model.lm_head.weight, std=0.1)
    model.generation_config.eos_token_id = config.text_config.eos_token_id
    model.generation_config.pad_token_id = config.text_config.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--annotations", type=Path, required=True, help="the tokenizer learns from this file's texts")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--family", choices=FAMILIES, default="qwen2_5_vl")
    args = parser.parse_args()
    records = json.loads(args.annotations.read_text(encoding="utf-8"))
    texts = [turn["value"] for record in records for turn in record["conversations"]]
    model = save_tiny_model(args.out, texts, family=args.family)
    print(f"tiny {args.family}: {model.num_parameters() / 1e6:.1f} M random parameters in {args.out}")


if __name__ == "__main__":
    main()
