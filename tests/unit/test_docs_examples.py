"""The examples of data in the documentation are read as the pages say."""

import re
from pathlib import Path

import pytest
from PIL import Image

from data_prep.__main__ import build_parser, read_sources
from data_prep.convert import prepare
from data_prep.sources import Source, mixing_shares

DOCS = Path(__file__).parents[2] / "docs"


def block_of(page, language, number=0):
    """Return the content of one of the page's blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)[number]


def draw(path, number):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.radial_gradient("L").rotate(37 * number).crop((20 * number, 0, 20 * number + 150, 200))
    image.convert("RGB").save(path)


@pytest.fixture
def samples(tmp_path):
    """Return a function that prepares a source and returns its samples by id."""

    def read(source):
        train = prepare([source], split=(1, 0, 0), show_progress=False).splits["train"]
        return {sample["id"]: sample for sample in train}

    return read


def test_the_three_records_of_the_page_on_data(tmp_path, samples):
    for number, name in enumerate(("0412a.jpg", "0412b.jpg", "0977.png")):
        draw(tmp_path / "images" / name, number)
    (tmp_path / "annotations.json").write_text(block_of("data.md", "json"))
    found = samples(Source(tmp_path / "annotations.json", tmp_path / "images"))
    assert {key: (len(sample["images"]), len(sample["messages"])) for key, sample in found.items()} == {
        "a1": (1, 2), "a2": (2, 2), "a3": (1, 4),
    }  # fmt: skip
    assert (found["a3"]["label"], found["a3"]["skin_type"]) == ("nevus", "IV")
    assert found["a1"]["group"] == found["a2"]["group"] != found["a3"]["group"]


def test_the_mapping_of_the_page_on_data_sets(tmp_path, samples):
    for number, name in enumerate(("P001_1", "P001_2", "P002_1")):
        draw(tmp_path / "photos" / f"{name}.jpg", number)
    (tmp_path / "cases.csv").write_text(block_of("adding_a_data_set.md", "csv"))
    (tmp_path / "cases.yaml").write_text(block_of("adding_a_data_set.md", "yaml"))
    found = samples(Source(tmp_path / "cases.csv", tmp_path / "photos", mapping=str(tmp_path / "cases.yaml")))
    assert {key: (sample["label"], sample["skin_type"], sample["age"]) for key, sample in found.items()} == {
        "1": ("melanoma", "II", "64"), "2": ("melanocytic nevus", "II", "64"), "3": ("melanocytic nevus", "V", "31"),
    }  # fmt: skip
    assert found["1"]["messages"][-1]["content"] == "This is melanoma."
    assert found["1"]["group"] == found["2"]["group"] != found["3"]["group"]


def test_the_list_of_sources_of_the_page_on_data(tmp_path):
    (tmp_path / "sources.yaml").write_text(block_of("data.md", "yaml"))
    (tmp_path / "skin" / "images").mkdir(parents=True)
    options = ["check", "--sources", str(tmp_path / "sources.yaml")]
    ours, ham = read_sources(build_parser().parse_args(options))
    assert ours == Source(tmp_path / "skin" / "annotations.json", tmp_path / "skin" / "images", weight=0.7)
    assert (ham.data, ham.mapping) == (tmp_path / "HAM10000_metadata.csv", "ham10000")
    assert mixing_shares([ours, ham]) == {"annotations": 0.7, "HAM10000": 0.3}
