"""Small models, data and runs that the tests share; all are made here, nothing is downloaded."""

import gc
import json
import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # models are tiny, and two tests run at a time
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp()  # of lengths that an earlier version may have counted otherwise
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"

import common.cli  # noqa: F401  switches telemetry off, as the commands do

import pytest
from PIL import Image

# What loads torch is imported where it is needed, so that a test of data starts within two seconds.
from data_prep import load_splits, prepare_dataset
from demo.draw import write_demo
from helpers.processes import ForkServer
from helpers.runs import TEXTS, train_args


def pytest_collection_finish():
    gc.freeze()  # the libraries: each run ends with a collection, which would look at all of them


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    """A folder with a Qwen2.5-VL of 0.6 M random weights and its processor."""
    from demo.tiny_model import save_tiny_model

    folder = tmp_path_factory.mktemp("base")
    save_tiny_model(folder, TEXTS, hidden_size=64, num_layers=2)
    return folder


@pytest.fixture
def processor(tiny_base):
    from models.loading import load_processor

    return load_processor(str(tiny_base), min_pixels=28 * 28, max_pixels=112 * 112)


@pytest.fixture(scope="session")
def demo_raw(tmp_path_factory):
    """Forty drawn images and their LLaVA file, `annotations.json`."""
    folder = tmp_path_factory.mktemp("raw")
    write_demo(folder, count=40)
    return folder


@pytest.fixture(scope="session")
def demo_data(demo_raw, tmp_path_factory):
    """The same as a prepared folder."""
    folder = tmp_path_factory.mktemp("data") / "demo"
    splits = prepare_dataset(demo_raw / "annotations.json", demo_raw / "images", show_progress=False)
    splits.save_to_disk(str(folder))
    return folder


@pytest.fixture
def demo_splits(demo_data):
    return load_splits(str(demo_data))


@pytest.fixture
def write_records(tmp_path):
    """Write records to `a.json` beside an `images` folder that holds red.jpg, green.png and blue.jpg."""
    images = tmp_path / "images"
    images.mkdir()
    for colour, name in (("red", "red.jpg"), ("green", "green.png"), ("blue", "blue.jpg")):
        Image.new("RGB", (60, 40), colour).save(images / name)

    def write(records, name="a.json"):
        path = tmp_path / name
        path.write_text(records if isinstance(records, str) else json.dumps(records), encoding="utf-8")
        return path, images

    return write


@pytest.fixture(scope="session")
def adapter(tiny_base, demo_data, tmp_path_factory):
    """A run of 30 NF4 steps that has learnt to say something; who changes its files puts them back."""
    import train_sft

    out = tmp_path_factory.mktemp("run") / "adapter"
    settings = {"max_steps": 30, "save_steps": 30, "eval_strategy": "no", "learning_rate": 5e-3, "lora_r": 8}
    train_sft.main(train_args(tiny_base, demo_data, out, **settings, per_device_train_batch_size=8))
    return out


@pytest.fixture(scope="session")
def mixed_data(demo_raw, tmp_path_factory):
    """Forty samples, every second of them without an image."""
    folder = tmp_path_factory.mktemp("mixed")
    rows = json.loads((demo_raw / "annotations.json").read_text())
    for number in range(1, len(rows), 2):
        rows[number] = {
            "id": f"text-{number}",
            "question": f"What is {number}?",
            "answer": f"It is melanoma {number}.",
        }
    (folder / "mixed.json").write_text(json.dumps(rows))
    splits = prepare_dataset(folder / "mixed.json", demo_raw / "images", show_progress=False)
    splits.save_to_disk(str(folder / "data"))
    return folder / "data"


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory):
    """Starts commands in processes of their own, without the seconds that loading the libraries takes."""
    server = ForkServer(tmp_path_factory.mktemp("logs"))
    yield server
    server.close()
