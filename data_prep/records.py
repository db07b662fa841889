"""One schema for all annotation formats: a raw record becomes a chat sample or an error that names the record."""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import regex

from common.files import suggest_file

from .reading import Flaw, describe, iter_json
from .unread import find_image_key, named_in

IMAGE_MARKER = "<image>"
FORMATS = ("llava", "messages", "flat")
# The key that identifies a format. ShareGPT files use either of the first two.
FORMAT_KEYS = {"llava": "conversations", "messages": "messages", "flat": "question"}
# Attributes of a sample besides its messages and images; each is a text or None.
ATTRIBUTES = ("label", "group", "skin_type", "age", "sex", "site", "split")
READ_KEYS = {"id", "image", "images", *FORMAT_KEYS.values(), "answer", "system", *ATTRIBUTES}
TURN_KEYS = {"role", "from", "content", "value"}
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}

# Tokens that Qwen's tokenizer recognises anywhere: inside a text they would end a turn or add an image. `<|...|>`
# covers all control tokens of the family but tool_call and its reply.
SPECIAL_TOKEN = re.compile(r"<\|\w+\|>|</?tool_(?:call|response)>")
BOX_TOKEN = re.compile(r"<\|(?:box|quad|object_ref)_(?:start|end)\|>")
BOX_REMEDY = '; write coordinates as "bbox_2d": [x1, y1, x2, y2], or as <box>(x1,y1),(x2,y2)</box> in thousandths'
# Other ways to name an image, or its place, in a text: <img>x.jpg</img>, <image_1>, <Image>, ![](x.jpg), those of
# Gemma and Pixtral, full-width or escaped brackets, a template's name that was not replaced
OTHER_MARKER = re.compile(
    r"<(?!(?-i:image>))/?(?:image|img)[^<>\n]{0,300}>|!\[[^\]\n]{0,300}\]\([^)\n]{1,300}\)"
    r"|<(?:start|end)_of_image>|\[(?:img|image)\]|(?:＜|&lt;)image(?:＞|&gt;)|\{+image\}+",
    re.IGNORECASE,
)
MARKER_SIGN = re.compile(r"[<!\[＜&{]")  # one of them starts each of the above; most texts have none, which saves time
MEDIA_MARKER = re.compile(r"<(?:video|audio)>", re.IGNORECASE)
# Keys of a turn by which other trainers leave it out of the loss: OpenAI's `weight: 0`, ms-swift's `loss: false`
LOSS_KEYS = ("weight", "loss", "train", "trainable", "loss_weight")
# White space, format characters such as zero-width spaces, fillers of Hangul, marks such as variation selectors, and
# the empty Braille cell
INVISIBLE = regex.compile(r"[\s\p{Cf}\p{Default_Ignorable_Code_Point}\p{M}\u2800]*")
TO_JSON = json.JSONEncoder(ensure_ascii=False, default=str)  # rows of the Hub also contain dates and bytes
MAX_TEXT = 1_000_000  # characters; several times the model's context
MAX_ID = 500  # characters
MAX_KEYS = 8  # that a message names


class DataError(ValueError):
    """One record that cannot be used.

    Attributes:
        record: 0-based position in the annotation file.
        sample_id: the record's id, None when it has none.
        reason: the field and the problem.
        source: name of its file, None when there is only one.
    """

    def __init__(self, reason: str, *, record: int, sample_id: str | None = None, source: str | None = None):
        self.record, self.sample_id, self.reason, self.source = record, sample_id, reason, source
        name = f" (id {sample_id!r})" if sample_id is not None else ""
        super().__init__(f"record {record}{name}, {reason}")


class FieldError(ValueError):
    """A problem of one field; `parse_record` adds the record."""

    def __init__(self, field: str, reason: str):
        super().__init__(f"field '{field}': {reason}")


def iter_annotations(path: str | Path) -> Iterator:
    """Yield the raw records of a JSON array or a JSON Lines file, one by one; see `reading.iter_json`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a folder, not UTF-8, not JSON (with line and column), not a list of records, or empty.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"annotations: {path} is a folder, expected a JSON or JSON Lines file")
    if not path.is_file():
        raise FileNotFoundError(f"annotations: no file {path}{suggest_file(path)}")
    return iter_json(path)


def read_annotations(path: str | Path) -> list:
    """Return all raw records at once. Raises what `iter_annotations` does, and ValueError for a flawed record."""
    records = list(iter_annotations(path))
    for number, record in enumerate(records):
        if isinstance(record, Flaw):
            raise ValueError(f"{path}, record {number}, {record.reason}")
    return records


def parse_record(raw, record: int, *, format: str | None = None) -> dict:
    """Turn one raw record into a sample.

    Args:
        raw: the decoded JSON value.
        record: its 0-based position in the file.
        format: one of `FORMATS`; recognised by its keys when None.

    Returns:
        `{record, id, images: [path as written], messages: [{role, content}], **ATTRIBUTES}`. Content is plain text
        with one `<image>` for each image; attributes are text or None.

    Raises:
        DataError: names the record, the field and the rule that was broken.
    """
    if not isinstance(raw, dict):
        reason = raw.reason if isinstance(raw, Flaw) else f"expected an object, found {describe(raw)}"
        raise DataError(reason, record=record)
    sample_id = _given_id(raw)
    try:
        _check_record(raw)
        return {"record": record, "id": sample_id or _content_id(raw), **_parse_fields(raw, format)}
    except FieldError as error:
        raise DataError(str(error), record=record, sample_id=sample_id) from error
    except RecursionError as error:
        raise DataError("nested too deeply", record=record, sample_id=sample_id) from error


def _given_id(raw: dict) -> str | None:
    """Return a record's id, shortened and encodable, for messages; `_check_record` checks it."""
    if not isinstance(raw.get("id"), str | int) or is_blank(str(raw["id"])):
        return None
    return str(raw["id"])[:MAX_ID].encode("utf-8", "backslashreplace").decode()


def _check_record(raw: dict) -> None:
    for key in ("video", "videos"):
        if raw.get(key):
            raise FieldError(key, "videos are not supported")
    if not isinstance(raw.get("id"), str | int | None) or isinstance(raw.get("id"), bool):
        raise FieldError("id", f"expected a text or a whole number, found {describe(raw['id'])}")
    if len(sample_id := str(raw.get("id"))) > MAX_ID:
        raise FieldError("id", f"{len(sample_id):,} characters, at most {MAX_ID}")
    _check_text("id", sample_id)
    try:
        TO_JSON.encode(raw).encode()
    except UnicodeEncodeError as error:
        raise FieldError(_unencodable_key(raw), f"half of a character pair, {error.object[error.start]!r}") from error


def _unencodable_key(raw: dict) -> str:
    """Return the first key that cannot be written in UTF-8, or whose value cannot, as a line that can."""
    texts = {key: TO_JSON.encode({key: value}) for key, value in raw.items()}
    key = next(key for key, text in texts.items() if text.encode("utf-8", "replace").decode() != text)
    return repr(key[:80])[1:-1]


def _content_id(raw: dict) -> str:
    """Return an id from the record's content, so that its split does not depend on its position in the file."""
    return "record-" + hashlib.sha256(json.dumps(raw, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _parse_fields(raw: dict, format: str | None) -> dict:
    format = format or _recognise(raw)
    images = _image_paths(raw)
    if format == "flat":
        names = ["question", "answer"]
        turns = [{"role": "user", "content": raw.get("question")}, {"role": "assistant", "content": raw.get("answer")}]
    else:
        names, turns = None, raw.get(FORMAT_KEYS[format])
    messages = normalise_messages(turns, images, system=raw.get("system"), field=FORMAT_KEYS[format], names=names)
    _check_no_image_is_lost(raw, images, messages, FORMAT_KEYS[format])
    return {"images": images, "messages": messages, **attributes_of(raw)}


def _recognise(raw: dict) -> str:
    formats = [name for name, key in FORMAT_KEYS.items() if key in raw]
    if len(formats) == 1:
        return formats[0]
    expected = ", ".join(f"'{key}' ({name})" for name, key in FORMAT_KEYS.items())
    if formats:
        raise FieldError(FORMAT_KEYS[formats[0]], f"the record has more than one of {expected}")
    keys = ", ".join(repr(key) for key in list(raw)[:MAX_KEYS]) + (", ..." if len(raw) > MAX_KEYS else "")
    raise FieldError("conversations", f"the record has none of {expected}; its keys are {keys or 'none':.300}")


def _image_paths(raw: dict) -> list[str]:
    if raw.get("image") is not None and raw.get("images") is not None:
        raise FieldError("images", "the record has both 'image' and 'images'")
    field = "image" if raw.get("image") is not None else "images"
    value = raw.get(field)
    paths = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(paths, list):
        raise FieldError(field, f"expected a path or a list of paths, found {describe(value)}")
    for path in paths:
        if not isinstance(path, str) or not path.strip():
            raise FieldError(field, f"expected a path, found {describe(path)}")
    return list(paths)


def _check_no_image_is_lost(raw: dict, images: list[str], messages: list[dict], field: str) -> None:
    """Raise FieldError for an image under a key that is not read, or, in a record without images, in a question."""
    if key := find_image_key(raw, READ_KEYS, images):
        raise FieldError(key[:80], "names an image and is not read; name it under the key 'image' or 'images'")
    for message in messages:
        if not images and message["role"] == "user" and (files := named_in(message["content"])):
            rule = "and the record has no image; name it under the key 'image'"
            raise FieldError(field, f"the user's text names {files[0][-80:]!r}, {rule}")


def attributes_of(raw: dict) -> dict[str, str | None]:
    """Return the `ATTRIBUTES` of a record; FieldError for one that is no text, or holds what no text may."""
    return {name: _text(raw, name) for name in ATTRIBUTES}


def _text(raw: dict, field: str) -> str | None:
    value = raw.get(field)
    if value is None or value != value:  # NaN: where pandas wrote a table, a number is missing
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise FieldError(field, f"expected a text, found {describe(value)}")
    _check_text(field, str(value))
    return None if is_blank(str(value)) else str(value).strip()


def is_blank(text: str) -> bool:
    """Whether a text shows nothing: white space, marks without a letter, and characters that fonts leave blank."""
    return bool(INVISIBLE.fullmatch(text))


def _check_text(field: str, text: str, whose: str = "the text") -> None:
    """Raise FieldError for a text that is too long, or has special tokens or NUL characters."""
    if len(text) > MAX_TEXT:
        raise FieldError(field, f"{whose} has {len(text):,} characters, at most {MAX_TEXT:,}")
    if "<" in text and (token := SPECIAL_TOKEN.search(text)):
        remedy = BOX_REMEDY if BOX_TOKEN.fullmatch(token.group()) else ""
        raise FieldError(field, f"{whose} contains the special token {token.group():.60}{remedy}")
    if "\0" in text:
        raise FieldError(field, f"{whose} contains a NUL character")


def normalise_messages(
    turns, images: list, *, system=None, field: str = "messages", names: list[str] | None = None
) -> list[dict]:
    """Return `[{role, content}]` with checked roles, order, texts and `<image>` markers.

    Args:
        turns: a list of `{role, content}` or `{from, value}`; content is a text or a list of typed blocks.
        images: the sample's images; a path inside a typed block is appended to it.
        system: optional text of a system turn, put first.
        field: name of the field, for the error.
        names: name of each turn, for the error; the field's with the turn's number when None.

    Raises:
        FieldError: names the field and the rule that was broken.
    """
    if not isinstance(turns, list) or not turns:
        found = "an empty list" if turns == [] else describe(turns)
        raise FieldError(field, f"expected a list of turns, found {found}")
    names = names or [f"{field}[{position}]" for position in range(len(turns))]
    messages = [_turn(turn, images, name) for turn, name in zip(turns, names, strict=True)]
    if system is not None:
        if not isinstance(system, str):
            raise FieldError("system", f"expected a text, found {describe(system)}")
        if system.strip():  # an empty one would replace the chat template's default
            messages.insert(0, {"role": "system", "content": system.strip()})
            names = ["system", *names]
    _check_order(messages, field)
    _check_texts(messages, names)
    _place_markers(messages, len(images), field)
    return messages


def _turn(turn, images: list, name: str) -> dict:
    if not isinstance(turn, dict):
        raise FieldError(name, f"expected an object, found {describe(turn)}")
    role = turn.get("role", turn.get("from"))
    if not isinstance(role, str) or role not in ROLES:
        raise FieldError(name, f"role {role!r:.60} is not one of {', '.join(ROLES)}")
    if key := find_image_key(turn, TURN_KEYS, []):
        raise FieldError(name, f"an image under {key!r:.80} is not read; name it under the record's key 'images'")
    _check_trained(turn, name)
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list):
        content = "".join(_block(block, images, name) for block in content)
    if not isinstance(content, str) or is_blank(content):
        raise FieldError(name, f"expected some text, found {describe(content)}")
    # An answer that starts with a newline would merge with the newline before it into another token.
    return {"role": ROLES[role], "content": content if ROLES[role] == "user" else content.strip()}


def turn_keys(raw: dict) -> set[str]:
    """Return the keys of a record's turns that are not read and hold something, as `messages[].reasoning_content`."""
    return {
        f"{key}[].{name}"
        for key in FORMAT_KEYS.values()
        for turn in (raw[key] if isinstance(raw.get(key), list) else ())
        for name in (turn if isinstance(turn, dict) else ())
        if name not in TURN_KEYS and name not in LOSS_KEYS and turn[name]
    }


def _check_trained(turn: dict, name: str) -> None:
    """Raise FieldError for an answer that the file says not to train on; all answers are trained on alike."""
    if ROLES[turn.get("role", turn.get("from"))] != "assistant":
        return
    for key in LOSS_KEYS:
        if isinstance(value := turn.get(key), bool | int | float) and value != 1:
            rule = "every answer is trained on alike; remove the key, or this part of the conversation"
            raise FieldError(name, f"{key} is {value}, and {rule}")


def _block(block, images: list, field: str) -> str:
    """Return the text of one typed block; append an image's path, if the block has one, to `images`."""
    kind = block.get("type") if isinstance(block, dict) else None
    if kind == "text" and isinstance(block.get("text"), str):
        return block["text"]
    if kind not in ("image", "image_url"):
        raise FieldError(field, f"expected a block of type text, image or image_url, found {describe(block)}")
    path = next((block[key] for key in (kind, "path", "url") if block.get(key) is not None), None)
    path = path.get("url") if isinstance(path, dict) else path
    if path is not None:
        if not isinstance(path, str):
            raise FieldError(field, f"expected an image's path, found {describe(path)}")
        images.append(path)
    return IMAGE_MARKER


def _check_order(messages: list[dict], field: str) -> None:
    roles = [m["role"] for m in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    expected = ["user", "assistant"] * (len(turns) // 2)
    if not turns or turns != expected:
        rule = "expected an optional system turn, then user and assistant in turn, ending with the assistant"
        raise FieldError(field, f"the roles are {', '.join(roles)}; {rule}")


def _check_texts(messages: list[dict], names: list[str]) -> None:
    for message, field in zip(messages, names, strict=True):
        _check_text(field, message["content"], f"the {message['role']}'s text")
        if message["role"] != "user" and IMAGE_MARKER in message["content"]:
            raise FieldError(field, f"an {IMAGE_MARKER} marker in the {message['role']}'s text")
        if not MARKER_SIGN.search(message["content"]):
            continue
        if other := OTHER_MARKER.search(message["content"]):
            rule = f"name the image under the key 'image', and write {IMAGE_MARKER} for its place"
            raise FieldError(field, f"the {message['role']}'s text contains {other.group()!r:.80}; {rule}")
        if other := MEDIA_MARKER.search(message["content"]):
            raise FieldError(
                field, f"the {message['role']}'s text contains {other.group()!r}; only images are supported"
            )


def _place_markers(messages: list[dict], num_images: int, field: str) -> None:
    markers = sum(m["content"].count(IMAGE_MARKER) for m in messages)
    if markers == 0 and num_images:
        first = next(m for m in messages if m["role"] == "user")
        first["content"] = IMAGE_MARKER * num_images + first["content"]
    elif markers != num_images:
        raise FieldError(field, f"{markers} {IMAGE_MARKER} marker(s) for {num_images} image(s)")


def to_chat(messages: list[dict]) -> list[dict]:
    """Split each text at its `<image>` markers into the typed blocks that the chat template expects.

    White space around a marker is dropped, so that "<image>\\nWhat?", "<image> What?" and an image without a marker
    before "What?" are one prompt: in training, in evaluation, and for a server that gets image and text as blocks.
    """
    return [{"role": m["role"], "content": _to_blocks(m["content"])} for m in messages]


def _to_blocks(content: str) -> list[dict]:
    first, *rest = content.split(IMAGE_MARKER)
    if not rest:
        return [{"type": "text", "text": first}]
    *middle, last = rest
    blocks = [{"type": "text", "text": first.rstrip()}]
    for text in (*map(str.strip, middle), last.lstrip()):
        blocks += [{"type": "image"}, {"type": "text", "text": text}]
    return [block for block in blocks if block["type"] == "image" or block["text"]]
