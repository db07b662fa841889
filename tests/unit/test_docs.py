"""README and docs: each link leads somewhere, what they name exists, and the README stays short."""

import re
from dataclasses import field, fields, make_dataclass
from pathlib import Path

import pytest

from docs import reference
from helpers.markdown import RUNNABLE, find_broken_links, is_external, read_anchors, read_links
from training.config import parse_config

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md"), ROOT / "benchmarks" / "README.md"])
COMMANDS = re.compile(
    r"python -m ((?:data_prep|benchmarks|demo|docs|notebooks)[\w.]*)|python (\w+\.py)|(configs/[\w/.]+\.\w+)"
)
IMAGE_BYTES = 400_000


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def test_links_and_anchors_are_found_and_code_is_not(tmp_path):
    text = "# One, *two* `three`\n[a](x.md#b) ![c](d.png) `[e](f)`\n```\n# no heading\n[g](h)\n```\n[i](https://j.org)"
    assert read_links(text) == ["x.md#b", "d.png", "https://j.org"]
    assert read_anchors(text) == {"one-two-three"}
    page = tmp_path / "page.md"
    page.write_text("# Here\n[a](#here) [b](#there) [c](other.md) [d](page.md#here) [e](https://j.org)")
    assert find_broken_links(page) == ["#there", "other.md"]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_each_link_leads_to_a_file_and_a_heading(page):
    assert find_broken_links(page) == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_commands_and_recipes_of_a_page_exist(page):
    found = COMMANDS.findall(page.read_text())
    files = [module.replace(".", "/") or script or recipe for module, script, recipe in found]
    missing = [file for file in files if not (ROOT / file).exists() and not (ROOT / f"{file}.py").exists()]
    assert missing == []


def test_every_page_can_be_reached_from_the_readme():
    reached, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        if page in reached or page.suffix != ".md":
            continue
        reached.add(page)
        links = [link.partition("#")[0] for link in read_links(page.read_text()) if not is_external(link)]
        todo += [(page.parent / link).resolve() for link in links if link]
    assert set(DOCS.glob("*.md")) - reached == set()


def test_every_page_is_in_the_menu_of_the_site():
    menu = re.findall(r"^ +- ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert set(menu) == {name_of(page) for page in PAGES}


def test_the_readme_is_short_and_its_pictures_are_small():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 250
    images = sorted((DOCS / "images").iterdir())
    assert len(images) >= 2 and sum(path.stat().st_size for path in images) < IMAGE_BYTES


def test_blocks_marked_as_runnable_are_in_the_shell():
    for page in PAGES:
        text = page.read_text()
        assert len(RUNNABLE.findall(text)) == text.splitlines().count("<!-- run -->")


def test_every_recipe_is_in_the_table_of_recipes():
    table = (DOCS / "training.md").read_text()
    named = set(re.findall(r"`(\w+\.yaml)`", table))
    assert {path.name for path in (ROOT / "configs").glob("*.yaml")} - named == set()


def test_the_recipe_for_a_first_try_trains_the_demos_model_on_a_cpu(monkeypatch):
    monkeypatch.chdir(ROOT)
    data, training, model = parse_config(["--config", "configs/first_try.yaml"])
    assert (data.dataset_path, model.model_name_or_path) == ("data/first_try", "outputs/demo/base")
    assert training.use_cpu and training.max_steps * training.per_device_train_batch_size == 400


def test_the_list_of_settings_is_that_of_the_dataclasses():
    assert reference.PAGE.read_text() == reference.write_page(), "run `python -m docs.reference`"


def test_every_setting_is_in_the_list_once():
    keys = re.findall(r"^\| `(\w+)` \|", reference.PAGE.read_text().partition("## Of other scripts")[0], re.MULTILINE)
    assert sorted(keys) == sorted({found.name for found in reference.all_fields()})


def test_a_description_is_the_first_sentence_and_stays_in_its_cell():
    kind = make_dataclass("Kind", [("x", str, field(metadata={"help": "Use `a<b>` | c, *d* [e]. Then more."}))])
    assert reference.describe(fields(kind)[0]) == r"Use `a<b>` \| c, \*d\* \[e]"
