"""data_prep runs on Windows and macOS: what only Unix has is used under a condition, or not at all."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted([*(ROOT / "data_prep").rglob("*.py"), *(ROOT / "common").rglob("*.py")])
# "Availability: Unix" or "not Windows" in Python's documentation
UNIX_MODULES = {"fcntl", "grp", "pty", "pwd", "resource", "syslog", "termios", "tty"}
UNIX_NAMES = {
    "os": {
        "O_CLOEXEC", "O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "chown", "chroot", "copy_file_range",
        "fchmod", "fork", "forkpty", "getegid", "geteuid", "getgid", "getloadavg", "getpgid", "getuid",
        "killpg", "lchown", "mkfifo", "mknod", "nice", "posix_fadvise", "posix_fallocate", "pread",
        "pwrite", "register_at_fork", "sched_getaffinity", "sched_setaffinity", "sendfile", "setsid",
        "statvfs", "sync", "sysconf", "uname", "wait",
    },
    "signal": {
        "SIGALRM", "SIGCHLD", "SIGHUP", "SIGKILL", "SIGPIPE", "SIGUSR1", "SIGUSR2", "alarm", "pthread_kill",
    },
}  # fmt: skip


def unix_only(tree: ast.AST) -> list[str]:
    """Return the names that only Unix has outside of every `if`."""
    if isinstance(tree, ast.If | ast.IfExp):
        return []
    found = []
    if isinstance(tree, ast.Attribute) and isinstance(tree.value, ast.Name):
        found += [f"{tree.value.id}.{tree.attr}"] * (tree.attr in UNIX_NAMES.get(tree.value.id, ()))
    if isinstance(tree, ast.Import):
        found += [alias.name for alias in tree.names if alias.name in UNIX_MODULES]
    if isinstance(tree, ast.ImportFrom):
        found += [tree.module] * (tree.module in UNIX_MODULES)
        found += [
            f"{tree.module}.{alias.name}" for alias in tree.names if alias.name in UNIX_NAMES.get(tree.module, ())
        ]
    return found + [name for child in ast.iter_child_nodes(tree) for name in unix_only(child)]


def test_names_of_unix_are_found_unless_under_a_condition():
    text = "import os, fcntl\nfrom os import fork\nos.sched_getaffinity(0)\nif os.name != 'nt':\n    os.getuid()\n"
    assert unix_only(ast.parse(text)) == ["fcntl", "os.fork", "os.sched_getaffinity"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_a_file_of_the_data_preparation_needs_no_unix(file):
    assert unix_only(ast.parse(file.read_text())) == []
