"""Commands that answer import nothing that takes long and that they do not use."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
UNUSED = ("torch._inductor.compile_fx", "sklearn", "nltk", "trl", "gradio")


def test_commands_that_answer_import_neither_the_compiler_nor_libraries_of_the_tests():
    code = f"""
import eval_sft, predict, os, sys
print([name for name in {UNUSED} if name in sys.modules], os.environ.get("TORCHDYNAMO_DISABLE"))
import torch
print(torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)).item())  # the compiler is still there
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[] None", "2.0"]


@pytest.mark.parametrize(
    ("command", "asked", "expected"),
    [
        ("eval_sft", {}, True),
        ("predict", {"OMP_WAIT_POLICY": "ACTIVE"}, False),
        pytest.param("app", {"GOMP_SPINCOUNT": "7"}, False, marks=pytest.mark.slow),
    ],
)
def test_threads_of_a_command_spin_for_a_moment_only_unless_asked_to(command, asked, expected):
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment |= {"OMP_DISPLAY_ENV": "VERBOSE", **asked}  # OpenMP prints what it has read when it is loaded
    done = subprocess.run(
        [sys.executable, "-c", f"import {command}"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert "GOMP_SPINCOUNT = " in done.stderr
    assert ("GOMP_SPINCOUNT = '20000'" in done.stderr) is expected


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
