"""The page of app.py in a real browser, at the width of a laptop and of a phone, served by a process of its own."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from argparse import Namespace
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import urlopen

import pytest
from PIL import Image
from playwright.sync_api import expect, sync_playwright

import eval_sft
from data_prep.images import load_image
from helpers.processes import ROOT
from webapp.sessions import Sessions

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WIDTHS = {1280: 900, 390: 844}  # px, with the height
SECONDS = 60  # in which an answer must have come, on a busy machine
# Where Chromium asks for its updates and the kinds of form fields, whatever page is open
BROWSERS_OWN = (".googleapis.com", ".gvt1.com", "accounts.google.com", "clients2.google.com", "www.google.com")
# Runs the command, and writes down each address that the process asks for or connects to.
WATCHED = """
import runpy, sys
log = open(sys.argv[1], "a", buffering=1)
def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        print(event, arguments[1] if event == "socket.connect" else arguments[0], file=log)
sys.addaudithook(watch)
sys.argv = ["app.py", *sys.argv[2:]]
runpy.run_path("app.py", run_name="__main__")
"""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (apt-get install chromium)")


def plant_level(adapter, confidence):
    """Give the evaluation of so few samples a level at which to abstain."""
    path = adapter / "eval" / "metrics.json"
    metrics = json.loads(path.read_text())
    found = metrics["runs"]["adapter"]["probabilities"]
    assert found["abstain"] is None
    found["abstain"] = {"target": 0.9, "samples": 60, "confidence": confidence, "accuracy": 0.9, "coverage": 0.5}
    path.write_text(json.dumps(metrics))


class Server:
    """app.py in a process of its own: its `url` and output, the folder it may write to, and what it connects to."""

    def __init__(self, folder, *options):
        self.temporary, self.output, self.addresses = folder / "tmp", folder / "output", folder / "addresses"
        self.temporary.mkdir()
        self.addresses.touch()
        environment = {**os.environ, "TMPDIR": str(self.temporary), "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, "-c", WATCHED, self.addresses, *options]
        with self.output.open("w") as out:
            self.process = subprocess.Popen(
                list(map(str, command)), cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT
            )
        self.url = self._wait_for(r"open (http://127\.0\.0\.1:\d+/)")

    def _wait_for(self, pattern):
        deadline = time.monotonic() + 4 * SECONDS
        while not (found := re.search(pattern, self.output.read_text())):
            assert self.process.poll() is None and time.monotonic() < deadline, self.output.read_text()
            time.sleep(0.1)
        return found.group(1)

    def files(self):
        return [path for path in self.temporary.rglob("*") if path.is_file() and path.stat().st_size]

    def end(self):
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(SECONDS)


@pytest.fixture(scope="module")
def served(adapter, demo_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("app")
    copy = folder / "adapter"
    shutil.copytree(adapter, copy, ignore=shutil.ignore_patterns("checkpoint-*", "eval"))
    evaluate = ["--adapter", copy, "--dataset", demo_data, "--min-group", 2, "--max-new-tokens", 4]
    eval_sft.main([str(word) for word in evaluate])
    plant_level(copy, 0.999)
    server = Server(folder, "--adapter", copy, "--base-too", "--dataset", demo_data, "--max-new-tokens", 12)
    yield server
    server.end()


class Proxy(BaseHTTPRequestHandler):
    """Notes what a browser asks of any host but this machine, and refuses it."""

    asked = set()

    def do_GET(self):
        host = (urlsplit(self.path).hostname if "//" in self.path else None) or self.path.partition(":")[0]
        if host == "fonts.googleapis.com" or not host.endswith(BROWSERS_OWN):
            self.asked.add(host)
        self.send_error(403)

    do_CONNECT = do_POST = do_HEAD = do_GET  # noqa: N815

    def log_message(self, *args):
        """Say nothing."""


@pytest.fixture(scope="module")
def browser():
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    flags += ["--disable-sync", "--no-first-run", "--disable-domain-reliability", "--no-pings"]
    address = {"server": f"http://127.0.0.1:{proxy.server_port}", "bypass": "127.0.0.1"}
    with sync_playwright() as play:
        yield play.chromium.launch(executable_path=CHROMIUM, args=flags, proxy=address)
    proxy.shutdown()


@contextmanager
def opened(browser, server, width=1280):
    """Yield the page in a browser of its own, and check at the end that it was quiet and asked this server alone."""
    context = browser.new_context(viewport={"width": width, "height": WIDTHS[width]})
    page, asked, errors = context.new_page(), [], []
    page.set_default_timeout(SECONDS * 1000)
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(server.url)
    page.wait_for_selector("#ask")
    yield page
    context.close()
    assert errors == []
    assert [url for url in asked if not url.startswith((server.url, "data:", "blob:"))] == []
    assert Proxy.asked == set()


def upload(page, *paths, photos):
    page.set_input_files("#upload input[type=file]", [str(path) for path in paths])
    expect(page.locator("#photos .photo")).to_have_count(photos, timeout=SECONDS * 1000)


def ask(page, question):
    """Ask by the keyboard, and return the answers of adapter and base when they are complete."""
    turns = page.locator("#conversation .turn")
    before = turns.count()
    page.fill("#question textarea", question)
    page.press("#question textarea", "Enter")
    expect(turns).to_have_count(before + 1, timeout=SECONDS * 1000)
    expect(page.locator("#conversation ol")).to_have_attribute("aria-busy", "false", timeout=SECONDS * 1000)
    return turns.nth(before).locator(".answer .text").all_inner_texts()


@pytest.mark.parametrize("width", WIDTHS)
def test_upload_ask_follow_up_and_map(browser, served, demo_raw, width):
    images = demo_raw / "images"
    with opened(browser, served, width) as page:
        page.click("#draw")  # what is wrong is told where the hand is, on a phone too
        expect(page.locator("#messages-maps li")).to_have_text(["ask a question first whose answer names a label"])
        expect(page.locator("#messages-maps li")).to_be_in_viewport()
        upload(page, images / "0000.jpg", images / "0001.jpg", photos=2)
        expect(page.locator(".told li")).to_have_count(0)
        assert "112 x 112 px" in page.inner_text("#photos") and "16 tokens" in page.inner_text("#photos")
        page.locator("#photos button", has_text="Remove").nth(1).click()
        expect(page.locator("#photos .photo")).to_have_count(1)
        answer, base = ask(page, "What condition is shown?")
        assert answer and base and answer != base
        assert "Abstain: do not take this as an answer" in page.inner_text("#conversation .verdict.abstain")
        shares = [float(text.split()[0]) for text in page.locator("#conversation .bars .value").all_inner_texts()]
        assert len(shares) == 4 and sum(shares) == pytest.approx(100, abs=0.3)
        page.click("#draw")
        expect(page.locator("#maps figure")).to_have_count(2, timeout=SECONDS * 1000)
        ask(page, "Is the skin light or dark?")
        asked = [" ".join(text.split()) for text in page.locator("#conversation .question").all_inner_texts()]
        assert asked == ["Question: What condition is shown? photo 1", "Question: Is the skin light or dark?"]
        page.mouse.wheel(0, 5000)
        expect(page.locator("#notice")).to_be_in_viewport()
        assert "Not a medical device" in page.inner_text("#notice")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        sides = page.evaluate(
            "['#photos', '#conversation'].map(id => document.querySelector(id).getBoundingClientRect().left)"
        )
        assert (sides[1] > 300) == (width > 1000)  # two columns, or one
        assert served.files() == []  # uploads are deleted when they are read
        page.click("#new")
        expect(page.locator("#photos .photo")).to_have_count(0)
        expect(page.locator("#conversation .turn")).to_have_count(0)


def bad_files(folder):
    """Write twenty files that are no usable photo."""
    photo = io.BytesIO()
    Image.effect_noise((90, 90), 60).save(photo, "JPEG")
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
    kinds = {"gif": io.BytesIO(), "tiff": io.BytesIO(), "webp": io.BytesIO()}
    for kind, file in kinds.items():
        frames[0].save(file, kind, save_all=True, append_images=frames[1:])
    png = io.BytesIO()
    frames[0].save(png, "PNG")
    heads = {
        "scan.dcm": b"\0" * 128 + b"DICM" + b"\0" * 50, "a.jxl": b"\xff\x0a" + b"\0" * 50, "sky.fits": b"SIMPLE  = T",
        "a.psd": b"8BPS" + b"\0" * 50, "a.exr": b"\x76\x2f\x31\x01" + b"\0" * 50, "a.jxr": b"II\xbc\x01" + b"\0" * 50,
        "film.mp4": b"\0\0\0\x18ftypmp42" + b"\0" * 50, "page.html": b"<script>alert(1)</script>",
        "drawing.svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>", "paper.pdf": b"%PDF-1.4\n%%EOF",
        "figure.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n", "notes.jpg": b"not an image",
        "packed.jpg": zlib.compress(b"a" * 99),
        "cut.jpg": photo.getvalue()[:700], "cut.png": png.getvalue()[:60],
        **{f"two.{kind}": file.getvalue() for kind, file in kinds.items()},
    }  # fmt: skip
    for name, content in heads.items():
        (folder / name).write_bytes(content)
    Image.new("L", (1, 300)).save(folder / "strip.png")
    Image.new("1", (8000, 8000)).save(folder / "huge.png")
    return sorted(folder.iterdir())


def test_bad_files_are_refused_in_the_words_of_load_image_and_good_ones_kept(browser, served, demo_raw, tmp_path):
    files = bad_files(tmp_path)
    assert len(files) == 20
    expected = []
    for file in files:
        with pytest.raises(ValueError) as error:
            load_image(file)
        expected.append(f"{file.name}: {error.value}")
    with opened(browser, served) as page:
        upload(page, *files, demo_raw / "images" / "0003.jpg", photos=1)
        assert page.locator("#messages-photos li").all_inner_texts() == expected
        page.click("#new")
        page.click("#ask")
        expect(page.locator("#messages-questions li")).to_have_text(["add a photo first"])
        upload(page, demo_raw / "images" / "0003.jpg", photos=1)
        page.fill("#question textarea", "a<|im_end|>")
        page.click("#ask")
        expect(page.locator("#messages-questions li")).to_contain_text(["special token <|im_end|>"])
        assert page.input_value("#question textarea") == "a<|im_end|>"  # to be corrected


def test_two_sessions_at_once_do_not_mix(browser, served, demo_raw):
    cases = [("0000.jpg", "What condition is shown?"), ("0006.jpg", "Is the skin light or dark?")]
    alone = []
    for name, question in cases:
        with opened(browser, served) as page:
            upload(page, demo_raw / "images" / name, photos=1)
            alone.append(ask(page, question))
    with opened(browser, served) as first, opened(browser, served, 390) as second:
        for page, (name, question) in zip((first, second), cases, strict=True):
            upload(page, demo_raw / "images" / name, photos=1)
            page.fill("#question textarea", question)
        for page in (first, second):
            page.press("#question textarea", "Enter")
        for page, (name, question), expected in zip((first, second), cases, alone, strict=True):
            expect(page.locator("#conversation .turn")).to_have_count(1)
            expect(page.locator("#conversation ol")).to_have_attribute("aria-busy", "false", timeout=SECONDS * 1000)
            assert page.locator("#conversation .answer .text").all_inner_texts() == expected
            assert question in page.inner_text("#conversation") and name in page.inner_text("#photos")
            assert page.locator("#photos .photo").count() == 1


def test_an_example_of_the_data_is_asked_by_the_keyboard_alone(browser, served, demo_splits):
    with opened(browser, served) as page:
        examples = page.locator("#examples button")
        assert examples.count() == len(demo_splits["test"])
        examples.nth(0).focus()
        page.keyboard.press("Enter")
        expect(page.locator("#photos .photo")).to_have_count(1)
        question = page.input_value("#question textarea")
        assert question == demo_splits["test"][0]["messages"][0]["content"].removeprefix("<image>\n")
        page.focus("#question textarea")
        page.keyboard.press("Enter")
        expect(page.locator("#conversation .reference")).to_contain_text(
            demo_splits["test"][0]["messages"][1]["content"]
        )


def test_a_closed_page_leaves_nothing_and_a_long_answer_stops(browser, served, demo_raw):
    with opened(browser, served) as page:
        upload(page, demo_raw / "images" / "0000.jpg", photos=1)
        page.click("#ask")
        page.click("#stop")
        expect(page.locator("#conversation ol")).to_have_attribute("aria-busy", "false", timeout=SECONDS * 1000)
    assert served.files() == []


def test_a_closed_page_is_forgotten(browser, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    from webapp.page import App, build_page

    sessions, facts = Sessions(None), {"adapter": "a", "base": "b", "loading": "", "measured": ""}
    page = build_page(App(None, None, facts, ["What?"], [], False, sessions))
    url = page.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, run_history=False)[1]
    try:
        with opened(browser, Namespace(url=url)) as first, opened(browser, Namespace(url=url)) as second:
            for number, tab in enumerate((first, second), 1):
                tab.click("#ask")
                expect(tab.locator("#messages-questions li")).to_have_text(["add a photo first"])
                assert len(sessions) == number
        deadline = time.monotonic() + SECONDS
        while len(sessions) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert len(sessions) == 0
    finally:
        page.close(verbose=False)


def test_a_port_that_is_taken_is_said_in_words(served, monkeypatch, tmp_path):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    from webapp.page import App, build_page
    from webapp.server import serve

    port = int(served.url.rstrip("/").rpartition(":")[2])
    facts = {"adapter": "a", "base": "b", "loading": "", "measured": ""}
    page = build_page(App(None, None, facts, [], [], False, Sessions(None)))
    with pytest.raises(ValueError, match=f"^--port: {port} is not free to listen on"):
        serve(page, port=port, share=False, ready=print)


def test_it_listens_on_this_machine_alone_and_its_page_may_load_nothing_else(served):
    with urlopen(served.url) as answer:
        assert "default-src 'self'" in answer.headers["content-security-policy"]
    with pytest.raises(HTTPError, match="404"):
        urlopen(f"{served.url}docs")
    port = int(served.url.rstrip("/").rpartition(":")[2])
    listening = [line.split()[1] for line in Path(f"/proc/{served.process.pid}/net/tcp").read_text().splitlines()[1:]]
    assert f"0100007F:{port:04X}" in listening and f"00000000:{port:04X}" not in listening


def test_it_ends_at_once_and_leaves_no_file(served):
    assert served.end() == 0
    assert "Traceback" not in served.output.read_text(), served.output.read_text()
    assert [path.name for path in served.temporary.rglob("*") if path.is_file()] == []
    assert {path.name for path in served.temporary.iterdir()} <= {"torchinductor_root"}  # torch's, and empty
    addresses = served.addresses.read_text()
    foreign = [line for line in addresses.splitlines() if "127.0.0.1" not in line and "localhost" not in line]
    assert "127.0.0.1" in addresses and foreign == []
