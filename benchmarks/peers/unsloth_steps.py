"""Steps of Unsloth by QLoRA: `python unsloth_steps.py SETTINGS`; prints a line of JSON.

A side of benchmarks/gpu_peers.py, in an environment of its own: of this project it imports `measure` alone, which lies
beside it.
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {"UNSLOTH_DISABLE_STATISTICS": "1", "HF_HUB_OFFLINE": "1"}
from unsloth import FastVisionModel  # isort: skip  # first: it changes what the others do
from unsloth.trainer import UnslothVisionDataCollator  # isort: skip

from measure import Clock, count_tokens, note_held, report
from PIL import Image
from trl import SFTConfig, SFTTrainer


def main(settings: dict) -> None:
    folder = Path(settings["folder"])
    model, processor = FastVisionModel.from_pretrained(
        str(folder / "base"), load_in_4bit=True, max_seq_length=2048, local_files_only=True,
        use_gradient_checkpointing="unsloth" if settings["recompute"] else False,
        attn_implementation=settings["attention"],
    )  # fmt: skip
    model = FastVisionModel.get_peft_model(
        model, finetune_vision_layers=False, finetune_language_layers=True, finetune_attention_modules=True,
        finetune_mlp_modules=True, r=8, lora_alpha=16, lora_dropout=0, bias="none",
    )  # fmt: skip
    processor = getattr(processor, "processor", processor)  # Unsloth may return it within a wrapper
    processor.image_processor.size = settings["size"]
    data = [to_messages(row, folder) for row in json.loads((folder / "samples.json").read_text())]
    FastVisionModel.for_training(model)
    clock, seen = Clock(), []
    args = SFTConfig(
        output_dir=str(folder / "run"), per_device_train_batch_size=settings["batch"], max_steps=settings["steps"],
        gradient_accumulation_steps=1,  # Unsloth takes 2 where none are named
        learning_rate=1e-4, bf16=True, logging_steps=1000, save_strategy="no", report_to="none", max_length=2048,
        gradient_checkpointing=settings["recompute"], remove_unused_columns=False, dataset_text_field="",
        dataset_kwargs={"skip_prepare_dataset": True}, optim="adamw_torch_fused", disable_tqdm=True,
    )  # fmt: skip
    collate = count_tokens(UnslothVisionDataCollator(model, processor, resize="max"), seen)  # not to 512 pixels
    trainer = SFTTrainer(
        model=model, processing_class=processor.tokenizer, data_collator=collate, train_dataset=data, args=args,
        callbacks=[clock],
    )  # fmt: skip
    held = note_held(trainer.model)
    trainer.train()
    report(clock, seen, held, trainer.model)


def to_messages(row: dict, folder: Path) -> dict:
    """Return a sample as Unsloth's collator reads it."""
    image = Image.open(folder / "images" / row["image"]).convert("RGB")
    question = [{"type": "image", "image": image}, {"type": "text", "text": row["question"]}]
    answer = [{"type": "text", "text": row["answer"]}]
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
