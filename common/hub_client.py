"""The Hugging Face Hub: opening a repository, retrying while it is busy, its errors in one line."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError
from tqdm import tqdm

# The Hub's passing troubles, and how long to wait before each new try, s; the client retries large files alone.
BUSY = (408, 429, 500, 502, 503, 504)
WAITS = (1, 2, 4, 8)
ADVICE = {401: "; log in with `hf auth login`, or set HF_TOKEN", 403: "; the token may not write there"}


def open_repository(
    repo_id: str, *, private: bool = True, revision: str | None = None, repo_type: str = "model"
) -> str:
    """Make the repository if it does not exist, see that it can be written to, and return its full id.

    Done before training, so that a missing token costs a second and not a night.

    Args:
        repo_id: "name" or "owner/name".
        private: whether a repository that is made now is private.
        revision: branch to make if it does not exist; the main one when None.
        repo_type: "model" or "dataset".

    Raises:
        ValueError: no token, no network, no right to write, or a repository that is public and should not be.

    Source of the token: HF_TOKEN in the environment, or `hf auth login`.
    """
    if get_token() is None:
        raise ValueError(f"no token to push to {repo_id} with: log in with `hf auth login`, or set HF_TOKEN")
    with readable_errors(f"cannot push to {repo_id}"):
        repo_id, found = with_retries(lambda: _claim(repo_id, private, repo_type))
    if found != private:
        words = {True: "private", False: "public"}
        rule = "ask for what it is (hub_private_repo, --public), or change it there"
        raise ValueError(f"{repo_id} is {words[found]} on the Hub and should be {words[private]}; {rule}")
    if revision is not None:
        with readable_errors(f"cannot push to {repo_id}, branch {revision}"):
            with_retries(lambda: HfApi().create_branch(repo_id, branch=revision, repo_type=repo_type, exist_ok=True))
    return repo_id


def is_reachable() -> bool:
    """Tell whether the Hub answers: by one try, where loading from it makes six in half a minute, for each file."""
    try:
        with readable_errors("the Hub cannot be reached"):
            HfApi().repo_exists("Qwen/Qwen2.5-VL-7B-Instruct")
    except ValueError:
        return False
    return True


def _claim(repo_id: str, private: bool, repo_type: str) -> tuple[str, bool]:
    """Return the full id of a repository that is there now, and whether it is private."""
    api = HfApi()
    repo_id = api.create_repo(repo_id, private=private, repo_type=repo_type, exist_ok=True).repo_id
    api.auth_check(repo_id, repo_type=repo_type, write=True)
    return repo_id, api.repo_info(repo_id, repo_type=repo_type).private


def with_retries(call: Callable):
    """Return what a call of the Hub's client returns; try again, and say so, while the Hub is busy or out of reach."""
    for wait in WAITS:
        try:
            return call()
        except Exception as error:  # see `readable_errors`
            if not is_transient(error):
                raise
            tqdm.write(f"{describe_error(error)}; trying again in {wait} s", file=sys.stderr)
        time.sleep(wait)
    return call()


def is_transient(error: Exception) -> bool:
    """Tell whether an error may be gone in a few seconds: the Hub is busy or out of reach, and has not said no."""
    error = _cause(error)
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in BUSY
    return not isinstance(error, OSError | ValueError)


@contextmanager
def readable_errors(before: str, after: str = "") -> Iterator[None]:
    """Turn whatever the Hub's client raises into a ValueError of one line."""
    try:
        yield
    except Exception as error:  # its libraries for HTTP and for large files raise types of their own
        raise ValueError(f"{before}: {describe_error(error)}{after}") from error


def describe_error(error: Exception) -> str:
    """Return in one line why the Hub could not be reached, or did not take what it was sent."""
    error = _cause(error)
    if isinstance(error, HfHubHTTPError):
        status, said = error.response.status_code, error.server_message
        text = f"the Hub says {status}{f' ({said})' if said else ''}{ADVICE.get(status, '')}"
    elif isinstance(error, OSError | ValueError):
        text = str(error) or type(error).__name__
    else:
        text = f"{type(error).__name__} at {HfApi().endpoint}: {error}"
    return " ".join(text.split())


def _cause(error: Exception) -> Exception:
    """Return what went wrong; the client wraps the error of one file."""
    wrapped = isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception)
    return error.__cause__ if wrapped else error
