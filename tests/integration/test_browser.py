"""Pages in a real browser, at the width of a laptop and of a phone: every image loads, nothing sticks out."""

import random
import re
import shutil
from contextlib import contextmanager

import pytest
from playwright.sync_api import expect, sync_playwright

from data_prep.__main__ import main as data_prep
from data_prep.labels import build_label_map
from demo.draw import draw_image
from evaluation.report import write_report
from evaluation.summary import summarise
from helpers.planted import PlantedSet

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (apt-get install chromium)")


@pytest.fixture(scope="module")
def data_page(tmp_path_factory):
    planted = PlantedSet(tmp_path_factory.mktemp("planted") / "set", count=120, each=2)
    out = planted.folder / "prepared"
    source = ["--annotations", str(planted.folder / "a.json"), "--images", str(planted.images)]
    data_prep(["convert", *source, "--on-error", "drop", "--out", str(out)])
    data_prep(["inspect", str(out)])
    return out / "report.html"


LABELS = ["melanoma", "vitiligo", "psoriasis", "urticaria", "dermatofibroma", "actinic keratosis or Bowen's disease"]


def evaluated_rows(rng):
    """Rows of three runs: an adapter that is often right, a base that talks nonsense, and one file with markup."""
    runs = {"adapter": [], "base": [], "shuffled": [], "validation": []}
    for index in range(90):
        label = LABELS[index % 6]
        facts = {"id": f"sample-{index}-" + "x" * 60, "label": label, "group": f"p{index // 2}", "index": index}
        facts |= {
            "skin_type": ["I", "III", "VI"][index % 3],
            "sex": ["f", "m"][index % 2],
            "age": str(index),
            "site": None,
        }
        facts |= {"source": "a", "question": "Which <b>diagnosis</b>? " * 6, "reference": f"This is {label}."}
        for run, chance in (("adapter", 0.8), ("base", 0.1), ("shuffled", 0.2), ("validation", 0.8)):
            said = label if rng.random() < chance else rng.choice(LABELS)
            scores = {name: rng.gauss(3 * (name == said), 1) for name in LABELS}
            text = "<script>x()</script>" * 9 if run == "base" else f"This is {said}."
            row = {"run": run, **facts, "prediction": text, "scores": scores}
            runs[run].append(row | ({"image_of": f"sample-{index ^ 1}-" + "x" * 60} if run == "shuffled" else {}))
    return runs


@pytest.fixture(scope="module")
def evaluation_page(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("evaluation"), random.Random(0)
    runs, label_map = evaluated_rows(rng), build_label_map(LABELS)
    columns = ["skin_type", "sex", "age", "site", "source"]
    found = summarise(runs, label_map, columns=columns, sensitivity_of=[], min_group=11)
    samples = [{"images": [draw_image("melanoma", "III", rng)]} for _ in range(90)]
    counts = {"evaluated": {"samples": 90, "of": 90, "questions": 90}, "max_new_tokens": 8}
    write_report(folder, {"split": "test", **counts, **found}, runs, label_map, samples)
    return folder / "report.html"


# The lowest contrast of all texts that are seen, with the text, as WCAG 2 computes it.
LOWEST_CONTRAST = """() => {
  const channels = colour => colour.match(/[\\d.]+/g).map(Number);
  const luminance = colour => channels(colour).slice(0, 3)
    .map(c => c / 255).map(c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, place) => sum + c * [0.2126, 0.7152, 0.0722][place], 0);
  const paper = element => {
    for (; element; element = element.parentElement) {
      const colour = getComputedStyle(element).backgroundColor;
      if ((channels(colour)[3] ?? 1) === 1) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let lowest = [22, ""];
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement, text = texts.currentNode.data.trim();
    if (!text || !element.getClientRects().length) continue;
    const [low, high] = [getComputedStyle(element).color, paper(element)].map(luminance).sort((a, b) => a - b);
    const ratio = (high + 0.05) / (low + 0.05);
    if (ratio < lowest[0]) lowest = [ratio, text];
  }
  return lowest;
}"""
WIDTHS = [1280, 390]
PRINTED_WIDTH = 688  # A4 without the margins of page.css, px


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as play:
        yield play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])


@contextmanager
def opened(browser, file, width=1280):
    """Yield the page, and check at the end that it was quiet and loaded nothing but itself."""
    page, asked, errors = browser.new_page(viewport={"width": width, "height": 900}), [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text))
    page.goto(file.as_uri())
    yield page
    assert errors == []
    assert [url for url in asked if not url.startswith("data:")] == [file.as_uri()]
    page.close()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    ("name", "title", "headings"),
    [
        ("data_page", "Data report: prepared", ["Labels", "Tokens per image", "Findings"]),
        ("evaluation_page", "Evaluation on test", ["By label", "By subgroup", "Confidence", "Text"]),
    ],
)
def test_a_page_fits_and_loads_whole(request, browser, name, title, headings, width):
    with opened(browser, request.getfixturevalue(name), width) as page:
        widths = page.eval_on_selector_all("img", "all => all.map(image => image.complete && image.naturalWidth)")
        assert len(widths) > 15 and all(widths)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.title() == title
        assert page.locator("h2").all_inner_texts()[: len(headings)] == headings


def test_the_plots_are_also_files_and_an_answer_is_no_markup(evaluation_page):
    assert "<script>x" not in evaluation_page.read_text()
    plots = {path.name for path in evaluation_page.parent.glob("*.png")}
    assert plots == {"confusion.png", "subgroups.png", "reliability.png", "abstention.png"}


def head_of(table, title):
    return table.locator("th").filter(has_text=re.compile(f"^{title}"))


def column(table, title):
    """The texts of a column, without the ranges under them; those of a row that says "too few samples" are that."""
    place = table.locator("th").all_inner_texts().index(title)
    rows = [row.locator("td").all_inner_texts() for row in table.locator("tbody tr").all()]
    return [row[min(place, len(row) - 1)].split("\n")[0] for row in rows]


@pytest.mark.parametrize("width", WIDTHS)
def test_a_table_is_sorted_by_click_and_by_keyboard(browser, evaluation_page, width):
    with opened(browser, evaluation_page, width) as page:
        table = page.locator("h2:has-text('By label') ~ .scroll table").first
        labels, values = column(table, "label"), [float(text) for text in column(table, "recall")]
        recall, label = head_of(table, "recall"), head_of(table, "label")
        assert sorted(values) != values and len(labels) == 6
        recall.locator("button").click()
        assert [float(text) for text in column(table, "recall")] == sorted(values)
        assert recall.get_attribute("aria-sort") == "ascending"
        recall.locator("button").press("Enter")
        assert [float(text) for text in column(table, "recall")] == sorted(values, reverse=True)
        label.locator("button").focus()
        page.keyboard.press("Space")
        assert column(table, "label") == sorted(labels, key=str.casefold)
        assert (label.get_attribute("aria-sort"), recall.get_attribute("aria-sort")) == ("ascending", None)


def test_cells_without_a_value_stay_at_the_end(browser, evaluation_page):
    with opened(browser, evaluation_page) as page:
        table = page.locator("h3:text-is('By age') + .scroll table")
        for reverse in (False, True):
            head_of(table, "accuracy").locator("button").click()
            cells = column(table, "accuracy")
            known = [float(text) for text in cells if text != "too few samples"]
            assert known == sorted(known, reverse=reverse) and len(set(known)) > 1
            assert cells[len(known) :] == ["too few samples"] * (len(cells) - len(known)) != []


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["data_page", "evaluation_page"])
def test_an_image_is_enlarged_by_click_and_keyboard_and_escape_closes_it(request, browser, name, width):
    with opened(browser, request.getfixturevalue(name), width) as page:
        dialog, buttons = page.locator("dialog"), page.locator("main button.zoom")
        assert buttons.count() == page.locator("main img").count() > 15
        buttons.last.click()
        expect(dialog).to_be_visible()
        shown = dialog.locator("img")
        assert shown.get_attribute("src") == buttons.last.locator("img").get_attribute("src")
        small, large = (place.bounding_box()["width"] for place in (buttons.last.locator("img"), shown))
        assert large > small or large > 0.85 * width
        assert large <= width
        page.keyboard.press("Escape")
        expect(dialog).not_to_be_visible()
        buttons.first.focus()
        page.keyboard.press("Enter")
        expect(dialog).to_be_visible()
        dialog.get_by_role("button", name="Close").press("Enter")
        expect(dialog).not_to_be_visible()
        assert page.evaluate("document.activeElement === document.querySelector('main button.zoom')")


@pytest.mark.parametrize("width", WIDTHS)
def test_wrong_answers_are_filtered_by_label_and_skin_type(browser, evaluation_page, width):
    with opened(browser, evaluation_page, width) as page:
        wrong = page.locator("section.kind").filter(has=page.locator("h2", has_text=re.compile(r"^Wrong \d")))
        samples = wrong.locator(".sample")
        assert samples.count() == int(wrong.locator(".tag").inner_text()) > 8
        found = samples.evaluate_all("all => all.map(sample => [sample.dataset.label, sample.dataset.skin])")
        label, skin = found[0]
        page.locator("#filters select[name=label]").select_option(label)
        expect(wrong.locator(".sample:visible")).to_have_count(sum(pair[0] == label for pair in found))
        page.locator("#filters select[name=skin]").select_option(skin)
        expect(wrong.locator(".sample:visible")).to_have_count(sum(pair == [label, skin] for pair in found))
        total, visible = page.locator(".kind .sample"), page.locator(".kind .sample:visible")
        assert page.inner_text("#filters output") == f"{visible.count()} of {total.count()} examples"
        for kind in page.locator("section.kind").all():
            assert kind.locator(".none").is_visible() == (kind.locator(".sample:visible").count() == 0)
        page.locator("#filters select[name=label]").select_option("")
        page.locator("#filters select[name=skin]").select_option("")
        expect(visible).to_have_count(total.count())


@pytest.mark.parametrize("name", ["data_page", "evaluation_page"])
def test_a_printed_page_has_no_cut_tables_no_dark_paper_and_no_filters(request, browser, name):
    with opened(browser, request.getfixturevalue(name), PRINTED_WIDTH) as page:
        page.emulate_media(media="print")
        tables = page.eval_on_selector_all(
            "table", "all => all.map(t => [t.scrollWidth, t.parentElement.clientWidth])"
        )
        assert len(tables) > 1 and all(width <= room for width, room in tables)
        assert page.evaluate("document.documentElement.scrollWidth") <= PRINTED_WIDTH
        assert page.locator("#filters:visible, dialog:visible").count() == 0
        papers = page.evaluate(
            "[...new Set([...document.body.querySelectorAll('*')].map(e => getComputedStyle(e).backgroundColor))]"
        )
        assert set(papers) <= {"rgb(255, 255, 255)", "rgba(0, 0, 0, 0)"}
        assert page.evaluate("getComputedStyle(document.querySelector('thead')).display") == "table-header-group"
        assert page.evaluate("getComputedStyle(document.querySelector('th button'), '::after').display") == "none"
        assert page.evaluate(LOWEST_CONTRAST)[0] >= 4.5
        assert page.pdf(format="A4")[:5] == b"%PDF-"


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["data_page", "evaluation_page"])
def test_every_text_has_the_contrast_of_level_aa_and_nothing_sticks_out(request, browser, name, width):
    with opened(browser, request.getfixturevalue(name), width) as page:
        ratio, text = page.evaluate(LOWEST_CONTRAST)
        assert 4.5 <= ratio < 22, text
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert (
            page.locator("figure figcaption").count() + page.locator("figure > p").count()
            == page.locator("figure").count()
        )


def test_a_script_that_is_not_the_pages_own_does_not_run(browser, evaluation_page, tmp_path):
    planted = tmp_path / "planted.html"
    added = "<script>document.title = 'planted'</script><img src=x onerror=\"document.title = 'planted'\">"
    planted.write_text(evaluation_page.read_text().replace("<footer>", f"{added}<footer>"))
    page = browser.new_page()
    page.goto(planted.as_uri())
    assert page.title() == "Evaluation on test"
    expect(page.locator("main button.zoom").first).to_be_visible()
    page.close()
