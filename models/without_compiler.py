"""Imports bitsandbytes without PyTorch's compiler, which answering never needs: a second less until the first answer.

bitsandbytes hands a few functions for training on CPUs to `torch.compile`, which then loads all of the compiler.
Commands that only answer import this module before peft, which imports bitsandbytes too.
"""

import os

SWITCH = "TORCHDYNAMO_DISABLE"

_before = os.environ.get(SWITCH)
os.environ[SWITCH] = "1"
try:
    import bitsandbytes  # noqa: F401
finally:
    if _before is None:
        del os.environ[SWITCH]
    else:
        os.environ[SWITCH] = _before
