"""How long app.py takes on this machine: until its page can be opened, to the first word, to the labels, to two maps.

python -m benchmarks.app --adapter outputs/demo/adapter --image photo.jpg
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

from common.cli import positive_int, run

import psutil

from models.adapters import load_answering_model
from models.loading import load_processor
from webapp.actions import ask, draw_maps
from webapp.conversation import ADAPTER, Conversation
from webapp.engine import Engine
from webapp.labels import read_labels
from webapp.occlusion import GRID
from webapp.photos import load_photo
from webapp.sessions import Session


def measure(engine: Engine, reader, image: str, question: str) -> dict[str, float]:
    """Return the seconds to the first word, to the likeliest labels, and of two maps, in a new session."""
    session, start, found = (
        Session(Conversation(pending=[load_photo(image, image, engine.processor)])),
        time.time(),
        {},
    )
    for _ in ask(session, question, engine, reader, base=False):
        if session.conversation.turns[0].answers[ADAPTER].text:
            found.setdefault("first word", time.time() - start)
    found["answer and labels"] = time.time() - start
    labels = [label for label, _ in session.conversation.turns[0].labels.rows[:2]]
    start = time.time()
    for _ in draw_maps(session, 0, labels, engine):
        pass
    return {**found, f"two maps of {GRID} x {GRID}": time.time() - start}


def measure_start(adapter: str) -> tuple[float, float]:
    """Return the seconds until app.py prints the page's address, and the seconds of the CPU in them."""
    command, start = [sys.executable, "app.py", "--adapter", Path(adapter).resolve()], time.time()
    options = {"cwd": Path(__file__).parents[1], "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **options) as process:
        if not process.stdout.readline().startswith("open "):
            raise ValueError(f"--adapter: app.py does not start with {adapter}")
        seconds, cpu = time.time() - start, sum(psutil.Process(process.pid).cpu_times()[:2])
        process.terminate()
    return seconds, cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", required=True, help="with an evaluation in its folder")
    parser.add_argument("--image", required=True)
    parser.add_argument("--repeats", type=positive_int, default=5)
    args = parser.parse_args()
    reader = read_labels(args.adapter, None, "test")
    if reader is None:
        raise ValueError(f"--adapter: no evaluation in {args.adapter}")
    question = next(question for question, asks in reader.asks.items() if asks)
    print("page can be opened after {:.1f} s, of which {:.1f} of the CPU".format(*measure_start(args.adapter)))
    options = {"max_new_tokens": 128, "batch_size": 8}
    engine = Engine(load_answering_model(args.adapter), load_processor(args.adapter), **options)
    runs = [measure(engine, reader, args.image, question) for _ in range(args.repeats)]
    for name in runs[0]:
        times = [row[name] for row in runs]
        print(f"{name:<24}{statistics.median(times):6.2f} s   (first time {times[0]:.2f} s, {args.repeats} repeats)")


if __name__ == "__main__":
    run(main)
