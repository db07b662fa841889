"""How long the page of app.py takes on this machine: to the first word, to the labels, to a pair of occlusion maps.

python -m benchmarks.app --adapter outputs/demo/adapter --image photo.jpg
"""

import argparse
import statistics
import time

from common.cli import positive_int, run

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
    options = {"max_new_tokens": 128, "batch_size": 8}
    engine = Engine(load_answering_model(args.adapter), load_processor(args.adapter), **options)
    runs = [measure(engine, reader, args.image, question) for _ in range(args.repeats)]
    for name in runs[0]:
        times = [row[name] for row in runs]
        print(f"{name:<24}{statistics.median(times):6.2f} s   (first time {times[0]:.2f} s, {args.repeats} repeats)")


if __name__ == "__main__":
    run(main)
