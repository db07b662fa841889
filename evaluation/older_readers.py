"""A merged model's folder for older programs: transformers 5 writes names that transformers 4.57 does not know.

llama.cpp's converter, llm-compressor and servers often have the older library. The newer ones read both forms.
"""

import json
from pathlib import Path

from common.files import atomic_write

OLDEST_READERS = {"transformers": "4.57", "vLLM": "0.32"}  # of those that were tried


def add_older_forms(folder: Path) -> None:
    """Write what transformers 4.57 reads beside, or in place of, what transformers 5 has written.

    Rotary settings also as `rope_scaling` and `rope_theta`; special tokens under their older key; the image and video
    processors' settings also in files of their own.
    """
    edit(folder / "config.json", add_rope_scaling)
    edit(folder / "tokenizer_config.json", rename_special_tokens)
    settings = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))
    for part, name in {"image_processor": "preprocessor", "video_processor": "video_preprocessor"}.items():
        if part in settings:
            write(folder / f"{name}_config.json", {**settings[part], "processor_class": settings["processor_class"]})


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    write(path, content)


def write(path: Path, content: dict) -> None:
    atomic_write(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def add_rope_scaling(config: dict) -> None:
    text = config["text_config"]
    rope = dict(text["rope_parameters"])
    text["rope_theta"] = rope.pop("rope_theta")
    text["rope_scaling"] = rope


def rename_special_tokens(config: dict) -> None:
    """Rename a list of tokens; under the newer key, transformers 4.57 expects a table of named ones."""
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
