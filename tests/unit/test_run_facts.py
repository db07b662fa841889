"""Files of a run that are damaged are named; a card is not made from half of them."""

import json

import pytest

from publishing.run_facts import adapter_digest, read_facts, read_metrics


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "facts.json is damaged: expected an object, found []"),
        ('{"data": 5}', "facts.json is damaged: 'data' is no object"),
        ('{"training": [1]}', "facts.json is damaged: 'training' is no object"),
        ('{"a":', "facts.json is damaged: not JSON"),
    ],
)
def test_damaged_facts_are_named(tmp_path, text, message):
    (tmp_path / "facts.json").write_text(text)
    with pytest.raises(ValueError) as caught:
        read_facts(tmp_path)
    assert f"{tmp_path}/{message}" in str(caught.value)


def test_metrics_without_the_adapter_are_named(tmp_path):
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x")
    (tmp_path / "eval").mkdir()
    for runs in ([], {}, {"base": {}}):
        (tmp_path / "eval" / "metrics.json").write_text(json.dumps({"runs": runs}))
        with pytest.raises(ValueError, match=r"metrics\.json is damaged: it has no figures of the adapter"):
            read_metrics(tmp_path)
    (tmp_path / "eval" / "settings.json").write_text('{"adapter": "of another one"}')
    assert read_metrics(tmp_path) is None
    (tmp_path / "eval" / "settings.json").write_text(json.dumps({"adapter": adapter_digest(tmp_path)}))
    (tmp_path / "eval" / "metrics.json").write_text('{"runs": {"adapter": {}}}')
    assert read_metrics(tmp_path) == {"runs": {"adapter": {}}}
