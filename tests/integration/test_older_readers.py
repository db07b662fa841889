"""A merged folder is read by transformers 4.57 as by ours: the same settings, prompts and logits."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import merge_adapter
from collator import collate_prompts
from demo.tiny_model import save_tiny_model
from evaluation.merge_checks import draw_samples, sample_logits
from evaluation.older_readers import add_rope_scaling, rename_special_tokens
from helpers.runs import TEXTS
from models.families import FAMILIES
from models.loading import load_model, load_processor

# What a person would write: the stock processor makes the prompt, the stock model computes.
READER = """
import json, sys
import numpy, torch, transformers
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

folder, files, out = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder)
model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
files = json.loads(files)
text = [{"type": "image"} for _ in files] + [{"type": "text", "text": "What condition is shown?"}]
prompt = processor.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
inputs = processor(text=[prompt], images=[Image.open(file) for file in files], return_tensors="pt")
with torch.inference_mode():
    logits = model(**inputs).logits[0]
generated = model.generate(**inputs, max_new_tokens=8)
numpy.savez(out, logits=logits, ids=inputs["input_ids"][0], generated=generated[0])
print(transformers.__version__, json.dumps(dict(processor.image_processor.size)))
"""


def test_older_names_stand_beside_the_newer_ones():
    text = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}}
    add_rope_scaling(config := {"text_config": text})
    assert config["text_config"]["rope_parameters"]["rope_theta"] == config["text_config"]["rope_theta"] == 1e6
    assert config["text_config"]["rope_scaling"] == {"rope_type": "default", "mrope_section": [4, 6, 6]}
    rename_special_tokens(tokens := {"extra_special_tokens": ["<|im_end|>"], "eos_token": "<|im_end|>"})
    assert tokens == {"additional_special_tokens": ["<|im_end|>"], "eos_token": "<|im_end|>"}
    rename_special_tokens(named := {"extra_special_tokens": {"image_token": "<|image_pad|>"}})
    assert named == {"extra_special_tokens": {"image_token": "<|image_pad|>"}}


@pytest.fixture(scope="module")
def older(tmp_path_factory):
    """A folder with transformers 4.57 and its own companions; torch and the rest are this environment's."""
    folder = tmp_path_factory.mktemp("older")
    packages = ["transformers==4.57.6", "tokenizers==0.22.2", "huggingface_hub==0.36.2"]
    uv = Path(sys.executable).with_name("uv")
    command = [uv, "pip", "install", "--quiet", "--no-deps", "--python", sys.executable, "--target", folder]
    subprocess.run([*command, *packages], check=True)
    return folder


def read_by(older, folder, files, out):
    environment = {**os.environ, "PYTHONPATH": str(older), "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-c", READER, folder, json.dumps(list(map(str, files))), out]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, cwd=older)
    assert done.returncode == 0, done.stderr
    version, _, size = done.stdout.strip().splitlines()[-1].partition(" ")
    return version, json.loads(size), np.load(out)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_4_57_computes_what_ours_does(family, older, tmp_path):
    base, merged = tmp_path / "base", tmp_path / "merged"
    save_tiny_model(base, TEXTS, hidden_size=64, num_layers=3, family=family)
    processor = load_processor(str(base), min_pixels=7000, max_pixels=60000)
    model = load_model(str(base), quantization=None, dtype="float32")
    merge_adapter.save(model, processor, merged, card="", shard_size="5GB")
    ours = load_model(str(merged), quantization=None, dtype="float32").eval()
    sample = draw_samples()[0]  # of 224 x 224 px, which need no resizing: that of 4.57 rounds otherwise
    files = []
    for number, image in enumerate(sample["images"]):
        image.save(tmp_path / f"{number}.png")
        files.append(tmp_path / f"{number}.png")
    version, size, found = read_by(older, merged, files, tmp_path / "found.npz")
    assert version == "4.57.6" and size == {"shortest_edge": 7000, "longest_edge": 60000}
    read = load_processor(str(merged))
    assert found["ids"].tolist() == collate_prompts(read, [sample])["input_ids"][0].tolist()
    np.testing.assert_allclose(found["logits"], sample_logits(ours, read)[0].numpy(), atol=2e-3)
    inputs = collate_prompts(read, [sample])
    generated = ours.generate(**inputs, max_new_tokens=8)[0]
    assert found["generated"].tolist() == generated.tolist()


@pytest.mark.slow
def test_transformers_4_57_opens_a_merged_adapter(adapter, older, demo_raw, tmp_path):
    merged = tmp_path / "merged"
    merge_adapter.main(["--adapter", str(adapter), "--out", str(merged), "--device", "cpu"])
    shutil.copy(demo_raw / "images" / "0001.jpg", tmp_path / "1.jpg")
    _, _, found = read_by(older, merged, [tmp_path / "1.jpg"], tmp_path / "found.npz")
    ours, read = load_model(str(merged), quantization=None, dtype="float32").eval(), load_processor(str(merged))
    question = {"role": "user", "content": "<image>What condition is shown?"}
    inputs = collate_prompts(read, [{"id": "x", "images": [tmp_path / "1.jpg"], "messages": [question]}])
    assert found["generated"].tolist() == ours.generate(**inputs, max_new_tokens=8)[0].tolist()
