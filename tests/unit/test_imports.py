"""Commands that answer import nothing that takes long and that they do not use."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPINS = "GOMP_SPINCOUNT"
UNUSED = ("torch._inductor.compile_fx", "sklearn", "nltk", "trl", "gradio")


def run_python(code, **asked):
    """Run Python with these variables, and none else that is about OpenMP's threads."""
    environment = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", SPINS)}
    environment |= {"OMP_DISPLAY_ENV": "VERBOSE", **asked}  # OpenMP prints what it has read when it is loaded
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )


def test_commands_that_answer_import_neither_the_compiler_nor_libraries_of_the_tests():
    code = f"""
import eval_sft, predict, os, sys
print([name for name in {UNUSED} if name in sys.modules], os.environ.get("TORCHDYNAMO_DISABLE"))
import torch
print(torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)).item())  # the compiler is still there
"""
    done = run_python(code)
    assert done.stdout.splitlines() == ["[] None", "2.0"]
    assert f"{SPINS} = '20000'" in done.stderr  # threads that wait spin for a moment only


@pytest.mark.parametrize("asked", [{"OMP_WAIT_POLICY": "ACTIVE"}, {SPINS: "7"}], ids=str)
def test_threads_spin_as_long_as_they_are_asked_to(asked):
    done = run_python("import common.cli, torch", **asked)
    assert f"{SPINS} = " in done.stderr and f"{SPINS} = '20000'" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("command", ["eval_sft", "predict", "app"])
def test_threads_of_each_command_spin_for_a_moment_only(command):
    assert f"{SPINS} = '20000'" in run_python(f"import {command}").stderr


@pytest.mark.parametrize(
    ("asked", "release", "expected"),
    [
        ({}, "6.8.0-generic", "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "6.8.0-generic", "max_split_size_mb:64"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "6.8.0-generic", None),
        ({}, "5.15.153.1-microsoft-standard-WSL2", None),
    ],
)
def test_gpu_memory_is_reserved_in_segments_that_grow_unless_asked_otherwise(asked, release, expected):
    code = f"""
import os, platform
platform.release = lambda: {release!r}
import common.cli
print(os.environ.get("PYTORCH_ALLOC_CONF"))
"""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_ALLOC_CONF")} | asked
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(expected)
