"""Steps of stock TRL by QLoRA: `python trl_steps.py SETTINGS`; prints a line of JSON.

A side of benchmarks/gpu_peers.py, in an environment of its own: of this project it imports `measure` alone, which lies
beside it.
"""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset, List
from datasets import Image as ImageFeature
from measure import Clock, count_tokens, note_held, report
from peft import LoraConfig
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

LANGUAGE = r"model\.language_model\.layers\.\d+\.\w+\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def main(settings: dict) -> None:
    gpu, folder = torch.cuda.is_available(), Path(settings["folder"])
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16, llm_int8_skip_modules=["model.visual", "lm_head"],
    )  # fmt: skip
    model = AutoModelForImageTextToText.from_pretrained(
        folder / "base", dtype=torch.bfloat16 if gpu else torch.float32, quantization_config=nf4 if gpu else None,
        attn_implementation=settings["attention"], device_map={"": 0} if gpu else None,
    )  # fmt: skip
    processor = AutoProcessor.from_pretrained(folder / "base")
    rows = json.loads((folder / "samples.json").read_text())
    turns = [
        [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}] for row in rows
    ]
    images = [[str(folder / "images" / row["image"])] for row in rows]
    data = Dataset.from_dict({"images": images, "messages": turns}).cast_column("images", List(ImageFeature()))
    clock, seen = Clock(), []
    args = SFTConfig(
        output_dir=str(folder / "run"), per_device_train_batch_size=settings["batch"], max_steps=settings["steps"],
        learning_rate=1e-4, bf16=gpu, use_cpu=not gpu, logging_steps=1000, save_strategy="no", report_to="none",
        max_length=None, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False},
        optim="adamw_torch_fused", disable_tqdm=True, remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    trainer = SFTTrainer(
        model=model, processing_class=processor, train_dataset=data, args=args, callbacks=[clock],
        data_collator=count_tokens(DataCollatorForVisionLanguageModeling(processor), seen),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=LANGUAGE, task_type="CAUSAL_LM"),
    )  # fmt: skip
    held = note_held(trainer.model)
    trainer.train()
    report(clock, seen, held, trainer.model)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
