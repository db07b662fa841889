"""What a push uploads: the allow-list, to a private repository, with no token in sight."""

from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi

from hub import ALLOWED, open_repository, push_adapter


@pytest.fixture
def calls(monkeypatch):
    """Record what would be sent."""
    made = {}

    def create_repo(self, repo_id, **options):
        made["create"] = (repo_id, options)
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def upload_folder(self, **options):
        made["upload"] = options
        return SimpleNamespace(commit_url="https://hub/me/skin/commit/1")

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return made


def test_a_repository_is_private_unless_asked_otherwise(calls):
    assert open_repository("skin") == "me/skin"
    assert calls["create"] == ("skin", {"private": True, "exist_ok": True})
    open_repository("skin", private=False)
    assert calls["create"][1]["private"] is False


def test_push_takes_only_listed_files(calls, tmp_path):
    assert push_adapter(tmp_path, "me/skin") == "https://hub/me/skin/commit/1"
    assert calls["upload"]["repo_id"] == "me/skin"
    assert calls["upload"]["folder_path"] == tmp_path
    assert calls["upload"]["allow_patterns"] == ALLOWED
    assert not any("*" in name or "training_args" in name or "metrics.jsonl" in name for name in ALLOWED)


def test_push_goes_to_a_branch_when_asked(calls, tmp_path):
    push_adapter(tmp_path, "me/skin", revision="v2")
    assert calls["upload"]["revision"] == "v2"
