"""Links and Hub data sets come in when asked for, and only then."""

import http.server
import io
import os
import socket
import threading
from functools import partial

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image

from data_prep import download
from data_prep.__main__ import main as data_prep
from data_prep.convert import InvalidRecordsError, prepare
from data_prep.sources import Source


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path):
    """Serve `web/` and yield its address."""
    (tmp_path / "web").mkdir()
    Image.effect_noise((60, 40), 60).convert("RGB").save(tmp_path / "web" / "a.jpg")
    (tmp_path / "web" / "page.jpg").write_text("<html>not found</html>")
    handler = partial(QuietHandler, directory=str(tmp_path / "web"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def ask(image, name):
    return {"id": name, "image": image, "question": "What?", "answer": "A nevus."}


def test_links_are_downloaded_once_and_bad_ones_named(write_records, tmp_path, server):
    local = (tmp_path / "web" / "a.jpg").as_uri()
    names = [f"{server}/a.jpg", local, f"{server}/gone.jpg", f"{server}/page.jpg", "ftp://x/a.jpg"]
    path, _ = write_records([ask(name, f"r{n}") for n, name in enumerate(names)])
    options = {"split": (1, 0, 0), "on_error": "drop", "links_dir": tmp_path / "links", "show_progress": False}
    prepared = prepare([Source(path)], **options)
    assert prepared.splits["train"]["image_sizes"] == [[[60, 40]], [[60, 40]]]
    reasons = [error.reason for error in prepared.errors]
    assert reasons[0] == f"image '{server}/gone.jpg': cannot be downloaded: HTTP Error 404: File not found"
    assert reasons[1] == f"image '{server}/page.jpg': not an image"
    assert reasons[2] == "image 'ftp://x/a.jpg' is an address, expected http, https or file"
    (tmp_path / "web" / "a.jpg").rename(tmp_path / "web" / "b.jpg")
    again = prepare([Source(path)], **options)
    assert again.splits["train"]["id"] == ["r0"]  # the download is still there, the local file is not


def test_a_link_is_refused_unless_asked_for(write_records, server):
    path, images = write_records([ask(f"{server}/a.jpg", "r0")])
    with pytest.raises(InvalidRecordsError, match=r"is an address, expected a path inside the image folder"):
        prepare([Source(path, images)], show_progress=False)


def test_a_download_that_never_ends_is_cut_off(tmp_path, server, monkeypatch):
    monkeypatch.setattr(download, "MAX_BYTES", 100)
    link = f"{server}/a.jpg"
    failed = download.fetch_links({link: tmp_path / "x"}, show_progress=False)
    assert failed == {str(tmp_path / "x"): "cannot be downloaded: over 100 bytes"}
    assert not (tmp_path / "x").exists()


@pytest.fixture
def hub(monkeypatch):
    """A Hub data set with a class label and an image column, as `load_dataset` returns it."""
    rows = {
        "image": [Image.effect_noise((30 + n, 50), 90) for n in range(4)],
        "dx": [0, 1, 1, 0],
        "patient": [1, 1, 2, 2],
    }
    features = Features(
        {"image": ImageFeature(), "dx": ClassLabel(names=["nevus", "acne"]), "patient": Value("int64")}
    )
    splits = DatasetDict({"train": Dataset.from_dict(rows, features=features)})
    splits["test"] = splits["train"].select([0])
    monkeypatch.setattr(download, "load_dataset", lambda name: splits)


def test_a_hub_data_set_with_a_mapping_is_a_source(hub, tmp_path):
    mapping = tmp_path / "r.yaml"
    mapping.write_text(
        "id: id\nimages: ['{image}']\nlabel: {columns: [dx]}\ngroup: [patient]\nsplit: [split]\n"
        "questions: ['What is it?']\nanswer: 'This is {label}.'\n"
    )
    source = Source(download.Path("someone/skin"), mapping=str(mapping))
    options = {"hub_dir": tmp_path / "hub", "show_progress": False, "split": (1, 0, 0), "on_error": "drop"}
    prepared = prepare([source], **options)
    train = prepared.splits["train"]
    assert train["id"] == ["train-000002", "train-000003"]
    assert train["label"] == ["acne", "nevus"]
    assert train["image_sizes"][1] == [[33, 50]]
    assert train[0]["messages"][1]["content"] == "This is acne."
    assert prepared.splits["test"]["id"] == ["test-000000"]
    [leak] = [finding for finding in prepared.findings if finding.kind == "leak"]  # one patient is in train and test
    assert (leak.sample_id, leak.others) == ("train-000000", ("train-000001",))


def test_a_copy_of_ham10000_on_the_hub_is_read_with_its_images_and_splits(tmp_path, monkeypatch):
    names = ("image_id", "lesion_id", "dx", "dx_type", "age", "sex", "localization")
    rows = [("ISIC_1", "L1", "melanocytic_Nevi", "histo", 45.0, "male", "back"),
            ("ISIC_2", "L2", "actinic_keratoses", "histo", None, "unknown", "face")]  # fmt: skip
    splits = DatasetDict()
    for number, (split, row) in enumerate(zip(("train", "test"), rows, strict=True)):
        pictures = {"image": [Image.new("RGB", (30 + number, 50), ("red", "blue")[number])]}
        columns = {name: [value] for name, value in zip(names, row, strict=True)}
        splits[split] = Dataset.from_dict(pictures | columns).cast_column("image", ImageFeature())
    monkeypatch.setattr(download, "load_dataset", lambda name: splits)
    source = Source(download.Path("someone/ham"), mapping="ham10000")
    prepared = prepare([source], hub_dir=tmp_path / "hub", show_progress=False, split=(1, 0, 0))
    [first], [second] = prepared.splits["train"], prepared.splits["test"]
    assert (first["id"], first["label"], first["age"]) == ("ISIC_1", "melanocytic nevus", "45")
    assert (second["id"], second["label"], second["image_sizes"]) == (
        "ISIC_2", "actinic keratosis or Bowen's disease", [[31, 50]]
    )  # fmt: skip


@pytest.mark.parametrize("many", [False, True])
def test_images_of_the_hub_under_another_name_are_not_lost(tmp_path, monkeypatch, many):
    feature, picture = ImageFeature(), Image.new("RGB", (30, 50))
    features = Features(
        {"question": Value("string"), "answer": Value("string"), "scan": List(feature) if many else feature}
    )
    rows = {"question": ["What?"], "answer": ["Acne."], "scan": [[picture] if many else picture]}
    splits = DatasetDict({"train": Dataset.from_dict(rows, features=features)})
    monkeypatch.setattr(download, "load_dataset", lambda name: splits)
    with pytest.raises(
        ValueError, match=r"someone/x: the images are in the column 'scan'; expected 'image' or 'images'"
    ):
        prepare([Source(download.Path("someone/x"))], hub_dir=tmp_path / "hub", show_progress=False)


def test_a_hub_data_set_of_chats_needs_no_mapping(tmp_path, monkeypatch):
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "Acne."}]
    features = Features(
        {"messages": List({"role": Value("string"), "content": Value("string")}), "images": List(ImageFeature())}
    )
    rows = {"messages": [turns], "images": [[Image.new("RGB", (30, 50)), Image.new("RGB", (40, 50))]]}
    splits = DatasetDict({"train": Dataset.from_dict(rows, features=features)})
    monkeypatch.setattr(download, "load_dataset", lambda name: splits)
    data_prep(["convert", "--annotations", "someone/chats", "--out", str(tmp_path / "out"), "--split", "1", "0", "0"])
    [row] = DatasetDict.load_from_disk(str(tmp_path / "out"))["train"]
    assert row["image_sizes"] == [[30, 50], [40, 50]]
    assert row["messages"][0]["content"] == "<image><image>What?"
    assert (row["images"][0].size, row["source"]) == ((30, 50), "chats")


@pytest.mark.parametrize("image", ["private", "fifo", None])
def test_a_row_of_the_hub_cannot_name_a_file_of_this_machine(tmp_path, monkeypatch, image):
    Image.new("RGB", (30, 50)).save(tmp_path / "private", "PNG")
    os.mkfifo(tmp_path / "fifo")
    good, out = io.BytesIO(), tmp_path / "out"
    Image.new("RGB", (30, 50)).save(good, "PNG")
    images = [{"bytes": good.getvalue(), "path": None}, image and {"bytes": None, "path": str(tmp_path / image)}]
    rows = {"images": [[one] for one in images], "question": ["What?"] * 2, "answer": ["Acne."] * 2}
    features = Features({"images": List(ImageFeature()), "question": Value("string"), "answer": Value("string")})
    splits = DatasetDict({"train": Dataset.from_dict(rows, features=features)})
    monkeypatch.setattr(download, "load_dataset", lambda name: splits)
    words = [
        "convert",
        "--annotations",
        "someone/x",
        "--out",
        str(out),
        "--split",
        "1",
        "0",
        "0",
        "--on-error",
        "drop",
    ]
    data_prep(words)
    assert DatasetDict.load_from_disk(str(out))["train"]["id"][:] == ["train-000000"]
    problem = (out / "rejected.jsonl").read_text()
    assert ("is a path, and no file" if image else "an image is empty") in problem


def test_a_hub_data_set_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="'someone/skin' is no local path, and the Hub says"):
        prepare([Source(download.Path("someone/skin"))], hub_dir=tmp_path, show_progress=False)


def test_downloads_into_the_data_sets_own_folder_stay(write_records, tmp_path, server, monkeypatch):
    path, _ = write_records([ask(f"{server}/a.jpg", "r0")])
    out = tmp_path / "out"
    command = ["convert", "--annotations", str(path), "--fetch-links", str(out / "links"), "--out", str(out)]
    with monkeypatch.context() as patch:  # a first try that ends after the download
        patch.setattr("data_prep.output.save_splits", lambda *args, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            data_prep(command)
    data_prep(command)
    (tmp_path / "web" / "a.jpg").unlink()
    data_prep([*command, "--overwrite"])
    assert len(list((out / "links").iterdir())) == 1
    assert len(DatasetDict.load_from_disk(str(out))["train"]) == 1


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nshort", "it ended after 5 of 1,000 bytes"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nshort", "IncompleteRead"),
        (b"nonsense\r\n\r\n", "nonsense"),
    ],
)
def test_an_answer_that_is_cut_short_or_none_is_a_reason(tmp_path, answer, reason):
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve():
            connection, _ = listening.accept()
            with connection:
                connection.recv(10_000)
                connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        link = f"http://127.0.0.1:{listening.getsockname()[1]}/a.jpg"
        [found] = download.fetch_links({link: tmp_path / "a.jpg"}, show_progress=False).values()
    assert found.startswith("cannot be downloaded: ") and reason in found
    assert not (tmp_path / "a.jpg").exists()


def test_a_link_with_a_space_is_a_reason(tmp_path):
    [found] = download.fetch_links({"http://127.0.0.1:9/a b.jpg": tmp_path / "x"}, show_progress=False).values()
    assert found.startswith("cannot be downloaded: URL can't contain control characters")
