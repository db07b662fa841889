"""Names of images become paths inside the image folder."""

import os
import unicodedata
from collections import Counter
from functools import lru_cache
from itertools import islice
from pathlib import Path, PurePosixPath

from common.files import suggest_file

from .reading import shorten

LONGEST = 100  # characters of a name in a message
MAX_SEARCHED = 200_000  # files below a folder
FOLLOW = "`python -m data_prep convert --follow-links` reads such files, in folders that you trust"


def is_link(name: str) -> bool:
    return "://" in name


def resolve_image(name: str, image_dir: Path, *, follow_links: bool = False) -> Path:
    """Return the absolute path of an image inside `image_dir`; a name in NFC finds a file in NFD, and the reverse.

    Args:
        name: path from there, as a record has it.
        image_dir: the folder, a resolved path.
        follow_links: accept links in the folder that lead out of it, as those of Hugging Face's cache and of DVC do.

    Raises:
        ValueError: the name is an address, or the path is outside the folder.
    """
    quoted = repr(shorten(name, LONGEST))
    if is_link(name) or name.startswith("data:"):
        raise ValueError(f"{quoted} is an address, expected a path inside the image folder")
    if "\0" in name:
        raise ValueError(f"{quoted} contains a NUL character")
    written = Path(os.path.normpath(image_dir / name))
    inside = written.is_relative_to(image_dir)
    try:
        # `link/../x` could otherwise lead to what is beside the link's target
        path = (written if follow_links else image_dir / name).resolve()
        if inside and _is_missing(path) and (same := _same_in_unicode(written, image_dir)):
            path = same.resolve()
    except (RuntimeError, OSError) as error:  # links that lead to each other
        raise ValueError(f"{quoted} cannot be followed: {error.__class__.__name__}") from error
    if path.is_relative_to(image_dir) or (inside and follow_links):
        return path
    if inside:
        raise ValueError(f"{quoted} is a link that leads out of the image folder; {FOLLOW}")
    raise ValueError(f"{quoted} is outside the image folder")


def _same_in_unicode(written: Path, image_dir: Path) -> Path | None:
    """Return the path in the folder whose name is the same text, composed (NFC) or decomposed (NFD); None without."""
    path = image_dir
    for part in written.relative_to(image_dir).parts:
        if not path.is_dir() or (name := _names(path, path.stat().st_mtime_ns).get(composed(part))) is None:
            return None
        path /= name
    return path


@lru_cache(maxsize=1000)
def _names(folder: Path, modified: int) -> dict[str, str]:
    """Return the names in a folder by their composed form; `modified` keeps an old answer from being used."""
    return {composed(path.name): path.name for path in folder.iterdir()}


def composed(name: str) -> str:
    """Return a name in NFC: macOS stores names decomposed."""
    return unicodedata.normalize("NFC", name)


def check_exists(name: str, path: Path, image_dir: Path, *, suggest: bool = True) -> None:
    """Raise ValueError for a path that `resolve_image` returned when there is nothing.

    The message has the path and, if `suggest`, the nearest name in the folder.
    """
    if _is_missing(path):
        raise ValueError(
            f"{shorten(name, LONGEST)!r}: no such file {path}{_nearest(name, image_dir) if suggest else ''}"
        )


def _is_missing(path: Path) -> bool:
    """Whether there is nothing at a path; False for one that cannot be read, as its name is too long for example."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


def _nearest(name: str, image_dir: Path) -> str:
    """Return a suggestion: the name without its first folders or with others, or in another spelling."""
    parts = [part for part in PurePosixPath(name.replace("\\", "/")).parts if part not in ("/", "..")]
    for start in range(len(parts)):
        tail = "/".join(parts[start:])
        if tail != name and (image_dir / tail).is_file():
            return f"; did you mean {tail!r}?"
    below = folders_below([name], image_dir)
    if below:
        return f"; did you mean {(below.most_common(1)[0][0] / Path(*parts)).as_posix()!r}?"
    return suggest_file(image_dir.joinpath(*parts))


def folders_below(names: list[str], image_dir: Path) -> Counter[Path]:
    """Return how many of the names lie in each folder below `image_dir`, by the folder's path from there."""
    wanted = {}
    for name in names:
        parts = tuple(map(composed, PurePosixPath(name.replace("\\", "/")).parts))
        wanted.setdefault(parts[-1] if parts else "", set()).add(parts)
    counts = Counter()
    files = (Path(folder, name) for folder, _, found in os.walk(image_dir) for name in found)
    for path in islice(files, MAX_SEARCHED):
        found = path.relative_to(image_dir).parts
        for parts in wanted.get(composed(path.name), ()):
            if len(found) > len(parts) and tuple(map(composed, found[-len(parts) :])) == parts:
                counts[Path(*found[: -len(parts)])] += 1
    return counts
