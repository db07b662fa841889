"""A real vLLM, in the environment of `make vllm`: the same answers and label likelihoods as the transformers engine.

`make test-vllm` runs these and prints the figures. A server takes half a minute to start, so tests share them.
"""

import argparse
import dataclasses
import json
from contextlib import contextmanager
from pathlib import Path

from common.cli import run

import pytest
from PIL import Image

import merge_adapter
import predict
import train_sft
from data_prep import load_splits, prepare_dataset
from demo.draw import write_demo
from demo.tiny_model import save_tiny_model
from evaluation import vllm_server
from evaluation.engines import open_engine
from evaluation.examples import example_of_sample
from helpers.runs import TEXTS, train_args
from models.loading import load_processor
from models.serving import describe_serving

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not vllm_server.PYTHON.is_file(), reason="needs the environment of `make vllm`"),
]
QUESTIONS, TOKENS = 60, 12
SCORED = 20  # of them, by both engines
ANSWERS = [f"This is {label}." for label in ("melanoma", "psoriasis", "vitiligo", "urticaria")]
DEFAULTS = {"server": None, "quantization": "none", "dtype": "float32", "min_pixels": None, "max_pixels": None}
TOWER = {"freeze_vision_encoder": "false", "train_merger": "true"}


def engine_args(engine="transformers", **options):
    return argparse.Namespace(**{"engine": engine, "batch_size": 20, **DEFAULTS, **options})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with 80 samples of pictures that are resized: 200 x 150 px become 168 x 112."""
    folder = tmp_path_factory.mktemp("data")
    write_demo(folder / "raw", count=80)
    for path in (folder / "raw" / "images").iterdir():
        Image.open(path).resize((200, 150)).save(path)
    raw = folder / "raw"
    prepare_dataset(raw / "annotations.json", raw / "images", show_progress=False).save_to_disk(
        str(folder / "prepared")
    )
    return folder / "prepared"


@pytest.fixture(scope="module")
def questions(data):
    return [example_of_sample(sample) for sample in load_splits(str(data))["train"]][:QUESTIONS]


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen2_vl", "qwen3_vl"])
def family(request, data, tmp_path_factory):
    """A folder with a base model, the adapters `text` (a name that vLLM takes for a kind of content) and `tower`."""
    folder = tmp_path_factory.mktemp(request.param)
    save_tiny_model(folder / "base", TEXTS, hidden_size=64, num_layers=3, family=request.param)
    settings = {"max_steps": 60, "save_steps": 60, "eval_strategy": "no", "learning_rate": 5e-3, "lora_r": 8}
    settings |= {"per_device_train_batch_size": 8, "load_in_4bit": "false", "min_pixels": 7000, "max_pixels": 20000}
    for name, more in (("text", {}), ("tower", TOWER)):
        train_sft.main(train_args(folder / "base", data, folder / name, **settings, **more))
    merge_adapter.main(["--adapter", str(folder / "tower"), "--out", str(folder / "merged")])
    return folder


@pytest.fixture(scope="module")
def engines(family, tmp_path_factory):
    """Ours and vLLM's, with both adapters."""
    with both_engines([family / "text", family / "tower"], None, tmp_path_factory.mktemp("server") / "log") as both:
        yield both


@contextmanager
def both_engines(adapters: list[Path], base: Path | None, log: Path):
    paths = [str(path) for path in adapters], base and str(base)
    with open_engine(*paths, engine_args()) as ours, open_engine(*paths, engine_args("vllm"), log) as theirs:
        yield ours, theirs


def compare(title, engines, names, questions, capsys):
    """Check one adapter's answers and scores by both engines; `names` are those that the engines have for it."""
    pairs = list(zip(engines, names, strict=True))
    expected, found = (engine.answers(questions, TOKENS, adapter=name) for engine, name in pairs)
    answers = [ANSWERS] * SCORED
    scores, others = (engine.scores(questions[:SCORED], answers, adapter=name) for engine, name in pairs)
    equal = sum(a == b for a, b in zip(expected[0], found[0], strict=True))
    distance = (scores - others).abs().max().item()
    with capsys.disabled():
        print(
            f"\n{title}: {equal} of {len(questions)} answers equal, likelihoods to {distance:.1e}", end="", flush=True
        )
    assert equal >= 59 / 60 * len(questions) and distance < 1e-3
    assert sum(a == b for a, b in zip(expected[1], found[1], strict=True)) >= equal  # cut, or not
    return expected[0]


def test_two_adapters_and_their_base_in_one_server(family, engines, questions, data, capsys):
    named = zip(("base", "text", "tower"), *([None, *engine.adapters] for engine in engines), strict=True)
    texts = [compare(f"{family.name}, {title}", engines, names, questions, capsys) for title, *names in named]
    assert texts[0] != texts[1] != texts[2]
    assert check(data, engines[1].client.url, family / "text", family / "tower") == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if "answers equal" in line]
    assert len(printed) == 2 and all(line.endswith("as expected") for line in printed)


@pytest.mark.parametrize("family", ["qwen2_5_vl"], indirect=True)
def test_predictions_by_the_server_have_its_probabilities(family, engines, data, tmp_path):
    rows = []
    for engine in ("transformers", "vllm"):
        server = ["--server", engines[1].client.url] if engine == "vllm" else []
        out = tmp_path / f"{engine}.jsonl"
        words = ["--adapter", family / "text", "--dataset", data, "--split", "test", "--out", out, "--top-k", 4]
        words += ["--max-new-tokens", TOKENS, "--dtype", "float32", "--wording", "This is {label}."]
        words += ["--engine", engine, *server]
        assert predict.main([str(word) for word in words]) == 0
        rows.append([json.loads(line) for line in out.read_text().splitlines()])
    for ours, theirs in zip(*rows, strict=True):
        assert ours["prediction"] == theirs["prediction"] and ours["likeliest"].keys() == theirs["likeliest"].keys()
        assert all(abs(ours["likeliest"][label] - theirs["likeliest"][label]) < 1e-3 for label in ours["likeliest"])


def test_a_merged_model(family, questions, capsys, tmp_path):
    with both_engines([], family / "merged", tmp_path / "log") as engines:
        compare(f"{family.name}, merged", engines, (None, None), questions, capsys)


def check(data, url, *adapters):
    words = ["--adapter", *adapters, "--dataset", data, "--split", "train", "--check-server", url]
    words += ["--max-new-tokens", TOKENS, "--quantization", "none", "--dtype", "float32"]
    return run(lambda: predict.main([str(word) for word in words]))


@pytest.mark.parametrize("family", ["qwen2_5_vl"], indirect=True)
def test_a_tower_served_without_its_flag_is_caught(family, data, capsys, tmp_path):
    adapter = str(family / "tower")
    options = {"base": None, "quantization": "none", "dtype": "float32"}
    serving = describe_serving([adapter], [load_processor(adapter)], **options)
    assert serving.tower
    with vllm_server.start_server(dataclasses.replace(serving, tower=False), tmp_path / "log") as client:
        assert check(data, client.url, adapter) == 1
    line = next(line for line in capsys.readouterr().out.splitlines() if "answers equal" in line)
    with capsys.disabled():
        print(f"\nwithout --enable-tower-connector-lora: {line}", end="")
    assert line.endswith("expected at least 95%")
