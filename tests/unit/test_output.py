"""The output folder of convert is one process's, leaves nothing beside it, and says how full a disk is."""

import errno
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from data_prep import output
from data_prep.__main__ import main as data_prep
from data_prep.class_folders import is_system_name

ROOT = Path(__file__).parents[2]


def arguments(write_records, out):
    path, images = write_records([{"image": "red.jpg", "question": "a", "answer": "b c", "group": "p"}])
    return ["convert", "--annotations", str(path), "--images", str(images), "--out", str(out), "--workers", "1"]


def test_a_second_convert_into_one_folder_is_one_line(write_records, tmp_path):
    out = tmp_path / "out"
    with output.claim(out, overwrite=False, links_dir=None) as work:
        assert work.parent == tmp_path and is_system_name(work.name) and work.is_dir()
        with pytest.raises(ValueError, match=rf"--out: {out} is in use by process {os.getpid()} on "):
            data_prep(arguments(write_records, out))
    assert data_prep(arguments(write_records, out)) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "images", "out"]


def test_what_a_killed_process_left_is_removed(write_records, tmp_path):
    for name in (".out.work", "out.unfinished"):
        (tmp_path / name / "train").mkdir(parents=True)
    data_prep(arguments(write_records, tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "images", "out"]


def test_a_full_disk_is_reported_with_place_and_sizes(write_records, tmp_path, monkeypatch):
    def fill(splits, folder, *, final):
        (folder / "train").mkdir(parents=True)
        (folder / "train" / "x.arrow").write_bytes(b"x" * 1000)
        raise OSError(errno.ENOSPC, "Error writing bytes to file")

    monkeypatch.setattr(output, "save_splits", fill)
    rule = (
        rf"--out: the disk is full, or its quota used up, at {tmp_path}/out: 1,000 bytes are written, [\d,]+ are free"
    )
    with pytest.raises(ValueError, match=rule):
        data_prep(arguments(write_records, tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "images"]


def test_another_error_of_the_system_stays_as_it_is(tmp_path):
    with pytest.raises(PermissionError, match="x"), output.claim(tmp_path / "o", overwrite=False, links_dir=None):
        raise PermissionError("x")


HELD = """
import runpy, sys, time
import data_prep.convert
def prepare(*args, **options):
    print("held", flush=True)
    time.sleep(60)
data_prep.convert.prepare = prepare
runpy.run_module("data_prep", run_name="__main__", alter_sys=True)
"""


def test_sigterm_leaves_no_folder(write_records, tmp_path):
    words = [sys.executable, "-c", HELD, *arguments(write_records, tmp_path / "out")]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n" and (tmp_path / ".out.work").is_dir()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM and process.stderr.read() == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "images"]


@pytest.mark.parametrize("command", ["import common.cli", "import data_prep"])
def test_ctrl_c_during_imports_is_one_line(command):
    # Where the tests run in the background, SIGINT is ignored, and would be in the script too.
    handler = "signal.signal(signal.SIGINT, signal.default_int_handler)"
    script = f"{command}; import os, signal, time; {handler}; os.kill(os.getpid(), signal.SIGINT); time.sleep(9)"
    ran = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stderr) == (-signal.SIGINT, "interrupted\n")


def test_a_limit_on_the_size_of_files_is_reported_with_its_place(write_records, tmp_path):
    path, images = write_records([{"image": "red.jpg", "question": "a", "answer": "b c", "group": "p"}])
    Image.effect_noise((300, 300), 90).save(images / "red.jpg")
    command = (
        f"ulimit -f 8; exec {sys.executable} -m data_prep convert --workers 1 --annotations {path} --images {images}"
    )
    run = subprocess.run(
        ["bash", "-c", f"{command} --out {tmp_path / 'out'}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert re.search(r"^error: --out: .*out.*: a file cannot become larger there; `ulimit -f` or", run.stderr, re.M)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "images"]


@pytest.mark.parametrize("change", [Path.unlink, lambda path: path.write_bytes(b"cut off"), Path.touch])
def test_an_image_that_changes_after_its_check_is_not_written(write_records, tmp_path, monkeypatch, change):
    image, save = tmp_path / "images" / "red.jpg", output.save_splits

    def save_and_change(*args, **options):
        save(*args, **options)
        change(image)

    words = arguments(write_records, tmp_path / "out")
    monkeypatch.setattr(output, "save_splits", save_and_change)
    with pytest.raises(
        ValueError, match=rf"image {image}: the file was changed or removed while the data set was wri"
    ):
        data_prep(words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "images"]


SLOW = """
import multiprocessing, runpy, time
import data_prep.inspection as inspection
def slow(image):
    print("decoding", flush=True)
    time.sleep(60)
inspection.decode = slow
multiprocessing.set_start_method("fork")
runpy.run_module("data_prep", run_name="__main__", alter_sys=True)
"""


def test_workers_end_with_a_killed_convert_and_the_folder_is_free(write_records, tmp_path):
    words = arguments(write_records, tmp_path / "out")
    with subprocess.Popen(
        [sys.executable, "-c", SLOW, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "decoding\n"
        process.kill()
        assert process.stdout.read() == ""  # it ends when the worker, which has it open too, has ended
    assert data_prep(words) is None
