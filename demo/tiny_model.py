"""A Qwen2.5-VL of two million random weights with its own tokenizer: the real classes, made in a second anywhere."""

import argparse
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)
from trl.chat_template_utils import qwen2_5_vl_chat_template

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


def build_processor(texts: list[str]) -> Qwen2_5_VLProcessor:
    """Return the family's processor (image sizing, chat template) around a small tokenizer."""
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(),
        tokenizer=build_tokenizer(texts),
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=qwen2_5_vl_chat_template,
    )


def build_config(tokenizer: Qwen2Tokenizer, *, hidden_size: int, num_layers: int) -> Qwen2_5_VLConfig:
    """Return a Qwen2.5-VL configuration: the family's structure (M-RoPE, window attention), few and narrow layers."""
    head_size = 32
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden_size,
        "intermediate_size": 3 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": hidden_size // head_size,
        "num_key_value_heads": hidden_size // head_size // 2,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
        "bos_token_id": None,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "depth": 2,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_heads": hidden_size // head_size,
        "out_hidden_size": hidden_size,
        "fullatt_block_indexes": [1],
    }
    names = ("image", "video", "vision_start", "vision_end")
    tokens = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    ids = {f"{n}_token_id": tokenizer.convert_tokens_to_ids(t) for n, t in zip(names, tokens, strict=True)}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)


def save_tiny_model(folder: Path, texts: list[str], *, hidden_size: int = 128, num_layers: int = 4, seed: int = 0):
    """Write a base model with its processor to `folder`, in the form that a Hub download has."""
    torch.manual_seed(seed)
    processor = build_processor(texts)
    config = build_config(processor.tokenizer, hidden_size=hidden_size, num_layers=num_layers)
    model = Qwen2_5_VLForConditionalGeneration(config)
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
    args = parser.parse_args()
    records = json.loads(args.annotations.read_text(encoding="utf-8"))
    texts = [turn["value"] for record in records for turn in record["conversations"]]
    model = save_tiny_model(args.out, texts)
    print(f"tiny Qwen2.5-VL: {model.num_parameters() / 1e6:.1f} M random parameters in {args.out}")


if __name__ == "__main__":
    main()
