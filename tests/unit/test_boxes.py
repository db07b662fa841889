"""Coordinates in answers fit the image that the model gets, or are reported."""

import json

import pytest
from PIL import Image

from data_prep.__main__ import main as data_prep
from data_prep.boxes import find_coordinates, scale_coordinates, wrong_coordinates
from data_prep.convert import InvalidRecordsError, prepare
from data_prep.load import load_splits
from data_prep.sizes import fit_size
from data_prep.sources import Source

LIMITS = {"min_pixels": 50176, "max_pixels": 602112}


def sample(answer, *sizes, question="<image>Where?"):
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    sizes = [list(size) for size in sizes or [(2000, 1000)]]
    return {"record": 3, "id": "x", "origin": "a.json", "messages": messages, "image_sizes": sizes}


def scaled(answer, convention, *sizes, **limits):
    changed = sample(answer, *sizes)
    assert scale_coordinates(changed, convention, **LIMITS | limits) is None
    return changed["messages"][1]["content"]


# 2000 x 1000 px becomes 1092 x 532 px under these limits
@pytest.mark.parametrize(
    ("answer", "resized", "relative"),
    [
        (
            '{"bbox_2d": [200, 100, 1000, 500]}',
            '{"bbox_2d": [109, 53, 546, 266]}',
            '{"bbox_2d": [100, 100, 500, 500]}',
        ),
        ('{"bbox_2d": [0.0, 0.0, 1.0, 1.0]}', '{"bbox_2d": [0, 0, 1092, 532]}', '{"bbox_2d": [0, 0, 1000, 1000]}'),
        ('{"bbox_2d": [1e-05, 0.2, 5E-1, 1]}', '{"bbox_2d": [0, 106, 546, 532]}', '{"bbox_2d": [0, 200, 500, 1000]}'),
        ('{"bbox_2d": [0, 0, 1, 1]}', '{"bbox_2d": [0, 0, 1, 1]}', '{"bbox_2d": [0, 0, 0, 1]}'),
        ('[{"point_2d": [2000, 0], "label": "a 5"}]', '[{"point_2d": [1092, 0], "label": "a 5"}]', None),
        ("{'bbox_2d': [ 200,100 , 1000.0, 500.4]}", "{'bbox_2d': [ 109,53 , 546, 266]}", None),
        ("bbox_2d=[200, 100, 1000, 500] and 300", "bbox_2d=[109, 53, 546, 266] and 300", None),
        ('{"points": [[200, 100], [1000, 500]]}', '{"points": [[109, 53], [546, 266]]}', None),
        ('{"polygon": [0, 0, 2000, 0, 2000, 1000]}', '{"polygon": [0, 0, 1092, 0, 1092, 532]}', None),
        ('{"bbox": [0.1, 0.1, 0.5, 0.5]}', '{"bbox": [109, 53, 546, 266]}', '{"bbox": [100, 100, 500, 500]}'),
        ('{"bbox_2d": [0, 0, 1, 1]}', '{"bbox_2d": [0, 0, 1, 1]}', '{"bbox_2d": [0, 0, 0, 1]}'),
        ("<box>(100,100),(500,500)</box>", "<box>(109,53),(546,266)</box>", "<box>(100,100),(500,500)</box>"),
        ("a <box> ( 0, 1000 ) </box> b", "a <box> ( 0, 532 ) </box> b", "a <box> ( 0, 1000 ) </box> b"),
        ("<box>(1,1),(2,2)</box>", "<box>(1,1),(2,1)</box>", "<box>(1,1),(2,2)</box>"),
        ("At 200, 100 it is [3, 4] mm.", "At 200, 100 it is [3, 4] mm.", "At 200, 100 it is [3, 4] mm."),
    ],
)
def test_coordinates_are_written_in_either_convention(answer, resized, relative):
    assert fit_size(2000, 1000, **LIMITS) == (1092, 532)
    assert scaled(answer, "resized") == resized
    if relative is not None:
        assert scaled(answer, "relative") == relative


def test_the_limits_of_training_count():
    small = {"min_pixels": 784, "max_pixels": 28 * 28 * 50}
    assert scaled('{"bbox_2d": [0, 0, 2000, 1000]}', "resized", **small) == '{"bbox_2d": [0, 0, 280, 140]}'
    assert scaled('{"bbox_2d": [0, 0, 560, 280]}', "resized", (560, 280)) == '{"bbox_2d": [0, 0, 560, 280]}'
    assert scaled('{"bbox_2d": [0, 0, 56, 28]}', "resized", (56, 28)) == '{"bbox_2d": [0, 0, 336, 168]}'


def test_coordinates_in_questions_are_scaled_too():
    asked = sample("A nevus.", question='<image>What is at {"bbox_2d": [200, 100, 1000, 500]}?')
    scale_coordinates(asked, "relative", **LIMITS)
    assert asked["messages"][0]["content"] == '<image>What is at {"bbox_2d": [100, 100, 500, 500]}?'
    assert find_coordinates(asked["messages"]) == ["[100, 100, 500, 500]"]


@pytest.mark.parametrize(
    ("answer", "sizes", "reason"),
    [
        ('{"bbox_2d": [0, 0, 2001, 5]}', [(2000, 1000)], "2001 is outside of the image of 2000 x 1000 px"),
        ('{"point_2d": [5, -1]}', [(2000, 1000)], "-1 is outside of the image of 2000 x 1000 px"),
        ('{"bbox_2d": [1, 2, 3]}', [(2000, 1000)], "expected pairs of x and y, found 3 numbers"),
        (
            '{"bbox_2d": [1, 2, 3, 4]}',
            [(20, 10), (30, 10)],
            "images of different sizes (20 x 10, 30 x 10 px): of which",
        ),
    ],
)
def test_what_cannot_be_scaled_is_reported(answer, sizes, reason):
    assert reason in scale_coordinates(sample(answer, *sizes), "resized", **LIMITS)
    assert reason in wrong_coordinates(sample(answer, *sizes), **LIMITS)


@pytest.mark.parametrize(
    ("answer", "sizes"),
    [
        ("A nevus.", [(2000, 1000)]),
        ('{"bbox_2d": [1, 2, 3, 4]}', [(560, 280)]),  # the model gets it as it is
        ('{"bbox_2d": [1, 2, 3, 4]}', [(560, 280), (560, 280)]),
        ('{"bbox_2d": [0.1, 0.2, 0.3, 0.4]}', [(2000, 1000)]),
    ],
)
def test_right_coordinates_are_no_finding(answer, sizes):
    assert wrong_coordinates(sample(answer, *sizes), **LIMITS) is None


def test_the_older_form_has_thousandths_and_is_reported_as_such():
    found = wrong_coordinates(sample("<box>(100,100),(500,500)</box>"), **LIMITS)
    rule = "is in thousandths, which Qwen2-VL and Qwen3-VL expect, and Qwen2.5-VL does not"
    assert found == f"<box>(100,100),(500,500)</box> {rule}"
    outside = sample("<box>(100,1001)</box>")
    reason = "coordinates (100,1001): 1001 is outside of the image of 1000 x 1000 thousandths"
    assert scale_coordinates(outside, "resized", **LIMITS) == reason


def write(folder, *answers):
    Image.effect_noise((2000, 1000), 60).convert("RGB").save(folder / "a.jpg")
    rows = [{"id": f"r{n}", "image": "a.jpg", "question": "Where?", "answer": text} for n, text in enumerate(answers)]
    (folder / "a.json").write_text(json.dumps(rows))
    return Source(folder / "a.json", folder)


def test_the_checks_report_and_the_command_scales(tmp_path, capsys):
    source = write(tmp_path, '{"bbox_2d": [200, 100, 1000, 500]}')
    prepared = prepare([source], show_progress=False, num_workers=1)
    (found,) = [finding for finding in prepared.findings if finding.kind == "coordinates"]
    sizes = "of an image of 2000 x 1000 px, which the model gets at 1092 x 532 px"
    assert (found.sample_id, found.detail) == ("r0", f"[200, 100, 1000, 500] {sizes}")
    files = ["--annotations", str(tmp_path / "a.json"), "--images", str(tmp_path), "--workers", "1"]
    limits = ["--max-pixels", str(28 * 28 * 50), "--min-pixels", "784"]
    data_prep(["convert", *files, "--out", str(tmp_path / "out"), "--scale-boxes", "resized", *limits])
    out = capsys.readouterr().out
    assert "coordinates are right in training with min_pixels 784, max_pixels 39200 alone" in out
    assert "not those of the image" not in out
    row = load_splits(str(tmp_path / "out"))["train"][0]
    assert row["messages"][1]["content"] == '{"bbox_2d": [28, 14, 140, 70]}'


def test_records_that_cannot_be_scaled_end_the_preparation_or_are_dropped(tmp_path):
    source = write(tmp_path, '{"bbox_2d": [1, 2, 3, 4]}', '{"bbox_2d": [1, 2, 3, 4000]}')
    options = {"scale_boxes": "relative", "show_progress": False, "num_workers": 1}
    with pytest.raises(
        InvalidRecordsError, match=r"record 1 \(id 'r1'\), coordinates \[1, 2, 3, 4000\]: 4000 is outside"
    ):
        prepare([source], **options)
    prepared = prepare([source], on_error="drop", **options)
    assert [error.sample_id for error in prepared.errors] == ["r1"]
    with pytest.raises(ValueError, match="min_pixels: 50176 is above max_pixels, 784"):
        prepare([source], max_pixels=784)
    with pytest.raises(ValueError, match="scale_boxes: expected resized or relative, found 'qwen'"):
        prepare([source], scale_boxes="qwen")
