"""Evaluations that are killed at random instants: do they go on, and end with the same metrics?

    python -m benchmarks.evaluation_kills             # 20 kills for each engine; vLLM's only after `make vllm`
    python -m benchmarks.evaluation_kills --kills 3

vLLM batches by arrival, so that its likelihoods differ in the last digits from one run to the next: its metrics are
compared to 1e-4, those of the transformers engine byte by byte.
"""

import argparse
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from common.cli import positive_int, run

import eval_sft
from benchmarks.reliability import Workspace, child, wait
from evaluation.vllm_server import PYTHON, start_server
from models.loading import load_processor
from models.serving import describe_serving


def evaluate(workspace: Workspace, adapter: Path, out: Path, options: list[str]) -> int:
    """Start an evaluation in a process of its own and return the process's number."""
    words = ["--adapter", adapter, "--dataset", workspace.folder / "data", "--split", "train", "--baseline"]
    words += ["--max-new-tokens", 12, "--batch-size", 4, "--out", out, *options]
    return child(lambda: eval_sft.main([str(word) for word in words]), out.with_suffix(".log"))


def killed(workspace: Workspace, adapter: Path, kills: int, options: list[str], same) -> int:
    """Kill evaluations at random instants until `kills` have been; return after how many the metrics were the same."""
    rng, reference, passed, done, number = random.Random(0), workspace.folder / "undisturbed", 0, 0, 0
    shutil.rmtree(reference, ignore_errors=True)
    start = time.monotonic()
    if wait(evaluate(workspace, adapter, reference, options)):
        raise RuntimeError(reference.with_suffix(".log").read_text())
    seconds = time.monotonic() - start
    while done < kills:
        out, hits, number = workspace.folder / f"killed-{number}", 0, number + 1
        shutil.rmtree(out, ignore_errors=True)
        for _ in range(min(4, kills - done)):
            process = evaluate(workspace, adapter, out, options)
            time.sleep(rng.uniform(0.3, 1) * seconds)
            os.kill(process, signal.SIGKILL)
            if wait(process) == 0:
                break
            hits += 1
        finished = wait(evaluate(workspace, adapter, out, options)) == 0
        passed += hits if finished and same(*((f / "metrics.json").read_text() for f in (out, reference))) else 0
        done += hits
    return passed


def close(a, b) -> bool:
    """Return whether two values of JSON are equal, numbers to 1e-4."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(close(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(close, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, abs_tol=1e-4)
    return a == b


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=positive_int, default=20)
    args = parser.parse_args()
    passed = {}
    with tempfile.TemporaryDirectory() as name:
        workspace = Workspace(Path(name))
        wait(child(workspace.prepare, workspace.folder / "prepare.log"))
        adapter = workspace.folder / workspace.reference(load_in_4bit="false")
        passed["transformers"] = killed(workspace, adapter, args.kills, [], str.__eq__)
        print(f"transformers: {passed['transformers']} of {args.kills}", flush=True)
        if PYTHON.is_file():
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
            options = {"base": None, "quantization": "none", "dtype": "float32"}
            serving = describe_serving([str(adapter)], [load_processor(str(adapter))], **options)
            with start_server(serving, workspace.folder / "vllm.log") as client:
                server = ["--engine", "vllm", "--server", client.url]
                same = lambda a, b: close(json.loads(a), json.loads(b))  # noqa: E731
                passed["vllm"] = killed(workspace, adapter, args.kills, server, same)
            print(f"vllm: {passed['vllm']} of {args.kills}", flush=True)
    return int(any(count != args.kills for count in passed.values()))


if __name__ == "__main__":
    sys.exit(run(main))
