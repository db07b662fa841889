"""The Hugging Face Hub: opening a repository, retrying while it is busy, its errors in one line."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from tqdm import tqdm

# Status codes of temporary errors, and the waits before each retry, s; the client itself only retries large files.
TRANSIENT_STATUS = (408, 429, 500, 502, 503, 504)
WAITS = (1, 2, 4, 8)
# What no wait repairs: a mistake of the user, of this machine or of the code. All other types are of the client's
# libraries for HTTP and for large files.
PERMANENT = (
    *(OSError, ValueError, TypeError, AttributeError, LookupError, NameError, ImportError, AssertionError),
    *(ArithmeticError, MemoryError, NotImplementedError, RecursionError, OfflineModeIsEnabled),
)
ADVICE = {401: "; log in with `hf auth login`, or set HF_TOKEN", 403: "; the token may not write there"}


def open_repository(
    repo_id: str, *, private: bool = True, revision: str | None = None, repo_type: str = "model"
) -> str:
    """Create the repository if it does not exist, check write access, and return its full id.

    Called before training, so that a missing token is reported at once.

    Args:
        repo_id: "name" or "owner/name".
        private: whether a new repository is private.
        revision: branch to create if it does not exist; the main one when None.
        repo_type: "model" or "dataset".

    Raises:
        ValueError: no token, no network, no right to write, or a repository whose visibility differs from `private`.

    Source of the token: HF_TOKEN in the environment, or `hf auth login`.
    """
    if get_token() is None:
        raise ValueError(f"no token to push to {repo_id} with: log in with `hf auth login`, or set HF_TOKEN")
    with readable_errors(f"cannot push to {repo_id}"):
        repo_id, is_private = with_retries(lambda: _create_repository(repo_id, private, repo_type))
    if is_private != private:
        words = {True: "private", False: "public"}
        rule = "change the option (hub_private_repo, --public) or the repository"
        raise ValueError(f"{repo_id} is {words[is_private]} on the Hub and should be {words[private]}; {rule}")
    if revision is not None:
        with readable_errors(f"cannot push to {repo_id}, branch {revision}"):
            with_retries(lambda: HfApi().create_branch(repo_id, branch=revision, repo_type=repo_type, exist_ok=True))
    return repo_id


def is_reachable() -> bool:
    """Return whether the Hub answers, by one request; loading a file makes six attempts in half a minute."""
    try:
        with readable_errors("the Hub cannot be reached"):
            HfApi().repo_exists("Qwen/Qwen2.5-VL-7B-Instruct")
    except ValueError:
        return False
    return True


def _create_repository(repo_id: str, private: bool, repo_type: str) -> tuple[str, bool]:
    """Create the repository if needed; return its full id and whether it is private."""
    api = HfApi()
    repo_id = api.create_repo(repo_id, private=private, repo_type=repo_type, exist_ok=True).repo_id
    api.auth_check(repo_id, repo_type=repo_type, write=True)
    return repo_id, api.repo_info(repo_id, repo_type=repo_type).private


def with_retries(call: Callable):
    """Return the result of a call of the Hub's client; retry, with a message, while the Hub is busy or unreachable."""
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
    """Return whether an error is temporary: the Hub is busy or unreachable."""
    error = _cause(error)
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in TRANSIENT_STATUS
    lost = isinstance(error, ConnectionError | TimeoutError) and not isinstance(error, OfflineModeIsEnabled)
    return lost or not isinstance(error, PERMANENT)


@contextmanager
def readable_errors(before: str, after: str = "") -> Iterator[None]:
    """Turn all errors of the Hub's client into a ValueError of one line."""
    try:
        yield
    except Exception as error:  # its libraries for HTTP and for large files have their own types
        raise ValueError(f"{before}: {describe_error(error)}{after}") from error


def describe_error(error: Exception) -> str:
    """Return in one line why the Hub could not be reached or refused a request."""
    error = _cause(error)
    if isinstance(error, HfHubHTTPError):
        status, message = error.response.status_code, error.server_message
        text = f"the Hub says {status}{f' ({message})' if message else ''}{ADVICE.get(status, '')}"
    elif isinstance(error, OSError | ValueError):
        text = str(error) or type(error).__name__
    else:
        text = f"{type(error).__name__} at {HfApi().endpoint}: {error}"
    return " ".join(text.split())


def _cause(error: Exception) -> Exception:
    """Return the original error; the client wraps the error of one file."""
    wrapped = isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception)
    return error.__cause__ if wrapped else error
