"""What stands under keys that are not read, or in a text, and looks like an image, a group or a label."""

import re
from collections.abc import Iterable, Iterator

# Keys under which other programs keep an image, in lower case without `_`, `-` and white space
IMAGE_KEY = re.compile(r"(?:image|img|picture|photo)(?:id|name|path|file|filename|url)?s?(?P<number>\d*)")
IMAGE_ENDING = re.compile(r"\w\.(?:jpe?g|jfif|png|tiff?|bmp|gif|webp|jp2|avif|hei[cf]|jxl|dcm)\b", re.IGNORECASE)
# Keys for where an image comes from, as its name before it was renamed
ORIGIN_KEY = re.compile(r"(?:original|orig|source|raw|old|url|filename|filepath).*")
GROUP_KEY = re.compile(
    r"(?:group|patient|lesion|case|subject|person|individual|participant)(?:u?id|name|number|no|nr|key|code|hash)?s?|pid|mrn"
)
# Other keys of what is read, folded like those above
MEANT = {
    **dict.fromkeys(("dx", "diagnosis", "disease", "condition", "class", "classname", "category", "target"), "label"),
    **dict.fromkeys(("fitzpatrick", "fitzpatricktype", "fitzpatrickskintype", "skintone", "fst"), "skin_type"),
    **dict.fromkeys(("localization", "localisation", "location", "bodypart", "anatomsite", "anatomicsite"), "site"),
    **dict.fromkeys(("subset", "partition", "fold"), "split"),
    "gender": "sex",
    "systemprompt": "system",
}
MAX_NAME = 1000  # characters; a longer text is no path
MAX_LEVELS = 5  # of lists and objects that are searched


def fold_key(key: str) -> str:
    return re.sub(r"[\s_-]", "", key[:80]).lower()


def meant_key(key: str) -> str | None:
    """Return the key that is read in place of another; None if unknown.

    "group" for `patient_id` and `metadata.patient_id`, "label" for `dx`.
    """
    folded = fold_key(key.rpartition(".")[2])
    return "group" if GROUP_KEY.fullmatch(folded) else MEANT.get(folded)


def find_group_key(values: dict, read: Iterable[str]) -> str | None:
    """Return the first key that has a value, looks like a patient's or a lesion's, and is not among those `read`.

    Keys of objects inside the record count too, as `metadata.patient_id`.
    """
    unread = {key: value for key, value in values.items() if key not in read}
    objects = {key: value for key, value in unread.items() if isinstance(value, dict)}
    unread |= {f"{key}.{name}": inner for key, value in objects.items() for name, inner in value.items()}
    return next((key for key, value in unread.items() if value not in (None, "") and meant_key(key) == "group"), None)


def inner_keys(values: dict) -> list[str]:
    """Return the keys of objects inside a record that mean something that is read, as `metadata.patient_id`."""
    inner = (f"{key}.{name}" for key, value in values.items() if isinstance(value, dict) for name in value)
    return [key for key in inner if meant_key(key)]


def find_image_key(values: dict, read: Iterable[str], images: list[str]) -> str | None:
    """Return the first key that has an image's name, is not among those `read`, and is not about one of `images`.

    A key that is called like an image counts too: with a number, or when there are no images. Other names of the same
    images, addresses, and keys such as `original_name` say where images come from.
    """
    names = {_last_part(path) for path in images}
    for key, value in values.items():
        if key in read or not value:
            continue
        folded = fold_key(str(key))
        match = IMAGE_KEY.fullmatch(folded)
        if match and (match["number"] or not images):
            return str(key)
        is_origin = bool(images) and ORIGIN_KEY.fullmatch(folded)
        if not is_origin and any(_is_image_name(text, names) for text in iter_texts(value)):
            return str(key)
    return None


def _is_image_name(text: str, known: set[str]) -> bool:
    """Whether a text is an image's name or address; beside `known` images no address is, and no name of these."""
    if known and ("://" in text or _last_part(text) in known):
        return False
    ending = IMAGE_ENDING.search(text)
    return bool(ending) and (
        ending.end() == len(text) or " " not in text
    )  # "photo 1.jpg", "https://x.org/1.jpg?raw=1"


def _last_part(path: str) -> str:
    return path.replace("\\", "/").rpartition("/")[2].casefold()


def named_in(text: str) -> list[str]:
    """Return the words of a text that end like an image's name, without quotation marks and brackets around them."""
    return [text[: end.end()].split()[-1].strip("\"'()<>") for end in IMAGE_ENDING.finditer(text)]


def iter_texts(value, level: int = 0) -> Iterator[str]:
    """Yield the texts in a value of JSON that are short enough to name a file."""
    if isinstance(value, str) and 0 < len(value.strip()) < MAX_NAME:
        yield value.strip()
    elif isinstance(value, dict | list) and level < MAX_LEVELS:
        for inner in value.values() if isinstance(value, dict) else value:
            yield from iter_texts(inner, level + 1)
