"""Commands that answer import nothing that takes long and that they do not use."""

import subprocess
import sys
from pathlib import Path

UNUSED = ("torch._inductor.compile_fx", "sklearn", "nltk", "trl", "gradio")


def test_commands_that_answer_import_neither_the_compiler_nor_libraries_of_the_tests():
    code = f"""
import eval_sft, predict, os, sys
print([name for name in {UNUSED} if name in sys.modules], os.environ.get("TORCHDYNAMO_DISABLE"))
import torch
print(torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)).item())  # the compiler is still there
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[] None", "2.0"]
