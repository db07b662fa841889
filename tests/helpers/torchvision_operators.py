"""Run by the Python of `make vllm` beside a CPU build of torch: makes torchvision importable there.

vLLM for the CPU brings a torch of its own, and PyPI's torchvision cannot load its compiled operators beside that one.
vLLM uses none of them, but transformers imports torchvision, which wants them declared. This writes a module into the
environment that declares them when torchvision is imported. Nothing is done where torchvision imports as it is.
"""

import subprocess
import sys
import sysconfig
from pathlib import Path

MODULE = '''"""Declares torchvision's compiled operators, which do not load here, when it is imported."""

import sys


class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                self.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            sys.modules[__name__].finder = self  # the operators live as long as the library


sys.meta_path.insert(0, Finder())
'''
NAME = "declare_torchvision_operators"


def imports() -> bool:
    return subprocess.run([sys.executable, "-c", "import torchvision"], stderr=subprocess.DEVNULL).returncode == 0


def main() -> int:
    if imports():
        return 0
    folder = Path(sysconfig.get_paths()["purelib"])
    (folder / f"{NAME}.py").write_text(MODULE)
    (folder / f"{NAME}.pth").write_text(f"import {NAME}\n")
    return 0 if imports() else 1


if __name__ == "__main__":
    sys.exit(main())
