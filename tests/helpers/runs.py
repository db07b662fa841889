"""Command lines of small training runs, and the curves that they leave."""

import json

TEXTS = [
    "What condition is shown? Is the skin light or dark?",
    "This is melanoma. It is psoriasis, vitiligo, urticaria.",
]
PACKED = {  # settings of a run with packs
    "packing": "true",
    "pack_tokens": 256,
    "max_length": 256,
    "attn_implementation": "varlen",
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
}


def train_args(base, data, out, **settings):
    """Return the command line of a small CPU run; `settings` add to it or replace."""
    defaults = {
        "config": "configs/demo.yaml",
        "model_name_or_path": base,
        "dataset_path": data,
        "output_dir": out,
        "max_steps": 4,
        "save_steps": 2,
        "eval_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "lora_r": 4,
        "disable_tqdm": "true",
    }
    return [word for key, value in {**defaults, **settings}.items() for word in (f"--{key}", str(value))]


def rows_of(out, *keys):
    """Return the values of `keys` in each row of `metrics.jsonl` that has the first of them."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [[row[key] for key in keys] for row in rows if keys[0] in row]
