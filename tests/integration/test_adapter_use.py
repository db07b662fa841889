"""Other programs with our results: PEFT and vLLM with the adapter, `transformers serve` with the merged model."""

import base64
import io
import json
import os
import re
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import torch
from peft import PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import merge_adapter
from collator import collate_prompts
from evaluation.generation import encode_prompts, generate
from models.loading import load_model
from models.lora import build_lora_config

QUESTION = "What condition is shown?"
# How vLLM names the module that an adapter's tensor belongs to: `hf_to_vllm_mapper` of its class for Qwen2.5-VL, in
# vllm/model_executor/models/qwen2_5_vl.py of the repository vllm-project/vllm. The longest prefix wins.
VLLM_PREFIXES = {
    "model.language_model.": "language_model.model.",
    "model.visual.": "visual.",
    "lm_head.": "language_model.lm_head.",
    "model.": "language_model.model.",
}
# Its linear layers, built in the same file and in qwen2.py. Those that it fuses take adapters by the names of their
# parts (`packed_modules_mapping`). An adapter of another layer is an error, or, worse, is not applied.
VLLM_MODULES = {
    "language": r"language_model\.model\.layers\.[01]\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)",
    "tower": r"visual\.blocks\.[01]\.(attn\.(qkv|proj)|mlp\.(gate|up|down)_proj)",
    "merger": r"visual\.merger\.mlp\.[02]",
}


def ask(image):
    return {"id": "x", "images": [image], "messages": [{"role": "user", "content": f"<image>{QUESTION}"}]}


def test_plain_peft_loads_every_tensor_and_the_logits_change(adapter, tiny_base, demo_raw):
    base = AutoModelForImageTextToText.from_pretrained(tiny_base)
    processor = AutoProcessor.from_pretrained(adapter)
    prompt = encode_prompts(base, processor, [ask(demo_raw / "images" / "0001.jpg")])
    with torch.inference_mode():
        before = base(**prompt).logits
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # PEFT warns of tensors that are missing
            model = PeftModel.from_pretrained(base, adapter)
        after = model(**prompt).logits
    stored = load_file(adapter / "adapter_model.safetensors")
    assert len(stored) == 2 * 14
    for name, tensor in stored.items():
        assert torch.equal(model.get_parameter(name.replace(".weight", ".default.weight")), tensor)
    assert (after - before).abs().max() > 1
    assert (after[0, -1].argmax() != before[0, -1].argmax()).item()


def vllm_module(key):
    """Return the module that vLLM looks for, as `parse_fine_tuned_lora_name` in its vllm/lora/utils.py does."""
    assert key.startswith("base_model.model.")
    name = key.removeprefix("base_model.model.")
    prefix = max((prefix for prefix in VLLM_PREFIXES if name.startswith(prefix)), key=len, default="")
    module, matrix, weight = (VLLM_PREFIXES.get(prefix, "") + name.removeprefix(prefix)).rsplit(".", 2)
    assert weight == "weight" and matrix in ("lora_A", "lora_B")
    return module


def kinds_of(adapter):
    """Return the kinds of vLLM's modules that the adapter's tensors belong to; "none" for no such module."""
    modules = {vllm_module(key) for key in load_file(adapter / "adapter_model.safetensors")}
    kinds = {m: [kind for kind, pattern in VLLM_MODULES.items() if re.fullmatch(pattern, m)] for m in modules}
    return {kind for found in kinds.values() for kind in found or ["none"]}


def test_vllm_finds_a_module_for_every_tensor(adapter, tiny_base, tmp_path):
    assert kinds_of(adapter) == {"language"}
    base = load_model(str(tiny_base), quantization=None, dtype="float32")
    settings = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "train_vision": True, "train_merger": True}
    get_peft_model(base, build_lora_config(base, **settings)).save_pretrained(tmp_path)
    assert kinds_of(tmp_path) == {"language", "tower", "merger"}  # the last two with --enable-tower-connector-lora


def test_vllm_accepts_the_adapters_configuration(adapter):
    """`PEFTHelper` in vllm/lora/peft_helper.py of vllm-project/vllm refuses DoRA and whole modules."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["r"] == 8 and config["lora_alpha"] == 32
    assert config["bias"] == "none" and not config["modules_to_save"] and not config["use_dora"]
    stored = load_file(adapter / "adapter_model.safetensors")
    assert all(tensor.shape[0 if ".lora_A." in name else 1] == 8 for name, tensor in stored.items())


@pytest.fixture(scope="module")
def merged(adapter, tmp_path_factory):
    out = tmp_path_factory.mktemp("merged") / "model"
    merge_adapter.main(["--adapter", str(adapter), "--out", str(out)])
    return out


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Address of a real `transformers serve` on a free port of loopback, stopped at the end."""
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [Path(sys.executable).with_name("transformers"), "serve", "--host", "127.0.0.1", "--port", port]
    log = tmp_path_factory.mktemp("serve") / "log"
    with log.open("w") as file:
        process = subprocess.Popen([*command, "--device", "cpu"], stdout=file, stderr=file, env=os.environ)
    try:
        wait_until_healthy(process, f"http://127.0.0.1:{port}/health", log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until_healthy(process, address, log, *, seconds=180):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()
        try:
            with urlopen(address, timeout=5) as reply:
                assert json.load(reply) == {"status": "ok"}
                return
        except (URLError, TimeoutError):
            time.sleep(0.2)
    raise AssertionError(f"not up after {seconds} s: {log.read_text()}")


def chat(server, model, image, **options):
    """Send one question about one image, as a data URI, and return the completion."""
    from openai import OpenAI  # only the tests of serving need it

    content = io.BytesIO()
    image.save(content, "PNG")  # without loss: decoders of JPEG differ in the last bit
    uri = f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": QUESTION}]
    with OpenAI(base_url=server, api_key="none", timeout=120, max_retries=0) as client:
        return client.chat.completions.create(
            model=str(model), messages=[{"role": "user", "content": parts}], **options
        )


@pytest.mark.slow
def test_transformers_serve_answers_about_an_image_like_the_merged_model(server, merged, demo_raw):
    model = AutoModelForImageTextToText.from_pretrained(merged)
    processor = AutoProcessor.from_pretrained(merged)
    with Image.open(demo_raw / "images" / "0001.jpg") as image:
        reply = chat(server, merged, image, max_tokens=16)
        [expected] = generate(model, processor, [ask(image)], 16)[0]
        prompt = collate_prompts(processor, [ask(image)])["input_ids"]
        large = chat(server, merged, image.resize((448, 448)), max_tokens=1)
    assert expected and reply.choices[0].message.content.strip() == expected
    assert reply.choices[0].message.role == "assistant"
    assert reply.usage.prompt_tokens == prompt.size(1)
    assert large.usage.prompt_tokens == prompt.size(1)  # the pixel limits of the training hold here too
