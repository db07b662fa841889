"""The schema of mappings: which columns of a table are the attributes, and the wording of question and answer."""

import re
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from common.yaml_files import line_of, read_nodes, read_yaml

from .reading import describe, suggest
from .records import is_blank
from .tables import cell_text

MAPPINGS = Path(__file__).parent / "mappings"
PLACEHOLDER = re.compile(r"\{([^{}]+)\}")
MAX_PROBLEM = 300  # characters of a problem's description
# pydantic's types of errors, as the end of a message that begins with "expected"
EXPECTED = {
    "bool_type": "true or false",
    "dict_type": "names and their values",
    "invalid_key": "a text as key",
    "list_type": "a list of texts",
    "literal_error": "heaviest",
    "model_type": "keys and their values",
    "string_type": "a text",
    "too_short": "something that is not empty",
}


def _number_to_text(value):
    """Return a number as a cell of a table has it: 0 as "0", 2.0 as "2"."""
    return cell_text(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _one_to_list(value):
    return [value] if isinstance(value, str | int | float) else value


def _compile(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
    return pattern


def _check_braces(template: str) -> str:
    if "{" in (rest := PLACEHOLDER.sub("", template)) or "}" in rest:
        raise ValueError(f"{template!r:.200} has a brace without its partner; a column stands as {{column}}")
    return template


def _check_shown(name: str) -> str:
    if is_blank(name):
        raise ValueError(f"expected a name, found {name!r:.80}, which shows nothing")
    return name


Text = Annotated[str, BeforeValidator(_number_to_text), Field(min_length=1)]
Name = Annotated[Text, AfterValidator(_check_shown)]
Texts = Annotated[list[Text], BeforeValidator(_one_to_list)]  # one text stands for a list of one
Templates = Annotated[list[Annotated[Text, AfterValidator(_check_braces)]], BeforeValidator(_one_to_list)]
Pattern = Annotated[Text, AfterValidator(_compile)]


class Section(BaseModel):
    """A part of a mapping; keys that it does not have are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Join(Section):
    """A second table, beside the first, with more columns for the same values of the column `by`."""

    file: Text
    by: Text


class Match(Section):
    """A regular expression that is searched in a column."""

    column: Text
    matching: Pattern


class GroupPattern(Match):
    """The group is what the first filled parenthesis of the expression matches."""

    @model_validator(mode="after")
    def _check(self):
        if not re.compile(self.matching).groups:
            raise ValueError(f"matching: {self.matching!r} has no (parentheses) around the group")
        return self


class Label(Section):
    """Columns with the label, the first that is filled, or one column for each label."""

    columns: Texts = []
    names: dict[Text, Name] = {}  # a cell's code -> the label; the cell itself when empty
    replace: dict[Text, Annotated[str, BeforeValidator(_number_to_text)]] = {}
    one_hot: bool = False  # `names` are columns of 0 and 1
    pick: Literal["heaviest"] | None = None  # the cell is a dictionary of names and weights

    @model_validator(mode="after")
    def _check(self):
        if self.one_hot and (self.columns or not self.names):
            raise ValueError("one_hot: expected `names`, column by column, and no `columns`")
        if not self.one_hot and not self.columns:
            raise ValueError("expected `columns`")
        return self

    def used(self) -> list[str]:
        """Return the columns that the label is read from."""
        return list(self.names) if self.one_hot else self.columns


class SkinType(Section):
    """Columns with the Fitzpatrick type; `scales` are columns of other scales, used where there is none."""

    columns: Texts = []
    names: dict[Text, Name] = {}
    scales: dict[Text, Name] = {}


class Mapping(Section):
    """What the columns of a table mean.

    Attributes:
        source: name of the data set.
        images: file names made from columns; one whose column is in `optional` may be empty.
        group, age, sex, site, split: columns, the first that is filled; see also `rows._link_groups`.
        texts: more placeholders, each the first filled of several columns.
        missing: cells that mean an empty one.
        skip: rows to leave out.
        optional: columns that the table may lack.
        questions: wordings, one of which is chosen for each row.
        answer: wording; a row that has nothing for one of its placeholders is left out.
    """

    source: Text | None = None
    join: Join | None = None
    id: Text | None = None
    images: Annotated[Templates, Field(min_length=1)]
    group: Texts = []
    group_pattern: GroupPattern | None = None
    label: Label | None = None
    skin_type: SkinType = SkinType()
    age: Texts = []
    sex: Texts = []
    site: Texts = []
    split: Texts = []
    texts: dict[Text, Annotated[Texts, Field(min_length=1)]] = {}
    missing: Texts = []
    skip: Match | None = None
    optional: Texts = []
    questions: Annotated[Templates, Field(min_length=1)]
    answer: Annotated[Text, AfterValidator(_check_braces)]

    @model_validator(mode="after")
    def _check(self):
        if not self.image_columns():
            raise ValueError("images: expected the name of a column in braces, as in {file}.jpg")
        if self.group and self.group_pattern:
            raise ValueError("group: has no effect beside `group_pattern`")
        named = {*self.columns(), *self.placeholders()}
        if unused := [column for column in self.optional if column not in named]:
            raise ValueError(f"optional: nothing uses the column {unused[0]!r}{suggest(unused[0], named)}")
        return self

    def columns(self) -> list[str]:
        """Return the columns that must be in a table, or in `optional`."""
        lists = [self.image_columns(), self.group, self.age, self.sex, self.site, self.split]
        lists += [self.skin_type.columns, self.skin_type.scales, self.label.used() if self.label else []]
        single = [self.id, self.skip and self.skip.column, self.group_pattern and self.group_pattern.column]
        return list(dict.fromkeys(chain(*lists, filter(None, single))))

    def image_columns(self) -> list[str]:
        """Return the columns that image names are made from."""
        return [name for template in self.images for name in PLACEHOLDER.findall(template)]

    def placeholders(self) -> list[str]:
        """Return the placeholders of questions and answer that are columns of the table."""
        names = [name for template in (*self.questions, self.answer) for name in PLACEHOLDER.findall(template)]
        ours = {*self.texts, *(["label"] if self.label else [])}
        return [name for name in dict.fromkeys(names) if name not in ours]


SECTIONS = {"join": Join, "group_pattern": GroupPattern, "label": Label, "skin_type": SkinType, "skip": Match}


def shipped() -> list[str]:
    """Return the names of the mappings that come with the project."""
    return sorted(file.stem for file in MAPPINGS.glob("*.yaml"))


def load_mapping(name: str | Path) -> Mapping:
    """Return a mapping by the name of a shipped one ("ham10000") or the path of a YAML file.

    Raises:
        ValueError: no such mapping, not YAML, or it does not fit the schema; every problem with its line.
    """
    path = Path(name) if Path(name).suffix.lower() in (".yaml", ".yml") else MAPPINGS / f"{name}.yaml"
    if not path.is_file():
        if Path(name).is_file():
            raise ValueError(f"mapping: {name}: expected a YAML file, with a name in .yaml or .yml")
        raise ValueError(f"mapping: no file {name}{suggest(str(name), shipped())}; shipped are {', '.join(shipped())}")
    try:
        settings = read_yaml(path, "mapping")
    except ValueError as error:
        raise ValueError(f"mapping {error}") from error
    try:
        return Mapping.model_validate({key: value for key, value in settings.items() if value is not None})
    except ValidationError as error:
        problems = [" ".join(problem.split())[:MAX_PROBLEM] for problem in _describe_errors(path, error)]
        raise ValueError(f"mapping {path}: {'; '.join(problems)}") from error


def _describe_errors(path: Path, error: ValidationError) -> list[str]:
    problems, lacking, nodes = [], {}, read_nodes(path)
    for problem in error.errors():
        *where, key = [part for part in problem["loc"] if part != "[key]"] or [""]
        if problem["type"] == "missing":
            lacking.setdefault(tuple(where), []).append(key)
        else:
            line = f"line {line_of(nodes, [*where, key])}, " if key != "" else ""
            problems.append(line + _describe(problem, where, key))
    for where, keys in lacking.items():
        place = f"line {line_of(nodes, where)}, {'.'.join(map(str, where))}: " if where else ""
        problems.append(f"{place}lacks {', '.join(sorted(keys))}")
    return problems


def _describe(problem: dict, where: list, key) -> str:
    place = ".".join(map(str, [*where, key]))
    if problem["type"] == "extra_forbidden":
        section = SECTIONS[where[-1]] if where else Mapping
        return f"unknown key {key!r}{suggest(str(key), section.model_fields)}"
    if problem["type"] == "value_error":
        return (f"{place}: " if place else "") + str(problem["ctx"]["error"])
    expected = "{columns: [...]}" if place == "label" else EXPECTED.get(problem["type"], problem["msg"])
    return f"{place}: expected {expected}, found {describe(problem['input'])}"
