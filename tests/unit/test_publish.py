"""What a push of a data set sends: private, without file names, with a card that names no path."""

import shutil
from types import SimpleNamespace

import pytest
from datasets import DatasetDict
from huggingface_hub import DatasetCard

from data_prep import publish
from data_prep.__main__ import main as data_prep


@pytest.fixture
def sent(monkeypatch):
    """Record what would be sent."""
    calls = {}

    def push_splits(self, repo_id, **options):
        calls["splits"] = (self, repo_id, options)
        return SimpleNamespace(repo_url=SimpleNamespace(repo_id=repo_id))

    def push_card(self, repo_id, **options):
        calls["card"] = (self.content, repo_id)

    def claim(repo_id, **options):
        calls["claimed"] = repo_id, options
        return f"me/{repo_id}"

    monkeypatch.setattr(publish, "open_repository", claim)
    monkeypatch.setattr(DatasetDict, "push_to_hub", push_splits)
    monkeypatch.setattr(DatasetCard, "push_to_hub", push_card)
    return calls


def test_a_push_is_private_and_names_no_file(demo_raw, tmp_path, sent):
    source = ["--annotations", str(demo_raw / "annotations.json"), "--images", str(demo_raw / "images")]
    data_prep(["convert", *source, "--out", str(tmp_path / "set")])
    data_prep(["push", str(tmp_path / "set"), "skin"])
    splits, repo_id, options = sent["splits"]
    assert (repo_id, options) == ("me/skin", {"private": True})
    assert sent["claimed"] == ("skin", {"private": True, "repo_type": "dataset"})
    assert splits["train"]["id"][:2] == ["train-000000", "train-000001"]
    assert all(group is None or group.startswith("group-") for group in splits["train"]["group"])
    stored = [image for table in splits.data.values() for row in table["images"].to_pylist() for image in row]
    assert len(stored) == 40
    assert all(image["path"] is None and image["bytes"] for image in stored)
    card, card_id = sent["card"]
    assert card_id == "me/skin"
    assert "| train | 32 | 32 |" in card and "melanoma, psoriasis, urticaria, vitiligo" in card
    assert ".jpg" not in card and str(tmp_path) not in card
    data_prep(["push", str(tmp_path / "set"), "skin", "--public"])
    assert sent["splits"][2] == {"private": False}


def test_push_wants_a_prepared_folder(tmp_path):
    with pytest.raises(ValueError, match="is not a data set that `python -m data_prep convert` wrote"):
        data_prep(["push", str(tmp_path), "skin"])


def test_the_name_of_an_annotation_file_is_not_pushed(demo_raw, tmp_path, sent):
    shutil.copy(demo_raw / "annotations.json", tmp_path / "Erika Mueller 1957.json")
    source = ["--annotations", str(tmp_path / "Erika Mueller 1957.json"), "--images", str(demo_raw / "images")]
    data_prep(["convert", *source, "--out", str(tmp_path / "set")])
    data_prep(["push", str(tmp_path / "set"), "skin"])
    assert {source for split in sent["splits"][0].values() for source in split["source"]} == {"source-1"}
    assert "Mueller" not in sent["card"][0] and "source-1" in sent["card"][0]
