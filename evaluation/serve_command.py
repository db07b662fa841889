"""`predict.py --print-server`: the command that serves an adapter or a model as it was trained."""

import argparse
import json
from pathlib import Path

from evaluation.engines import load_processors
from evaluation.questions import load_split
from models.serving import Serving, describe_serving, served_name, served_names, shell_lines

SERVERS = ("vllm", "transformers")
PORT = 8000


def serve_command(adapters: list[str], base: str | None, args: argparse.Namespace) -> str:
    """Return the commands, as lines of a shell, and the request that a client sends.

    Args:
        adapters: folders or Hub ids; none for a base or merged model alone.
        base: that model, or in place of the base that the adapters name.
        args: `print_server`, `quantization`, `dtype`, `min_pixels`, `max_pixels`, `max_new_tokens`, and the system
            turn of the requests: `system`, or that of `dataset`.

    Raises:
        ValueError: see `describe_serving`; `transformers serve` has one model, without adapters.
    """
    names = dict(zip(served_names(adapters, base), adapters, strict=True))
    processors = load_processors(names, base, args)
    own = [processors[name] for name in names] or [processors[None]]
    serving = describe_serving(adapters, own, base=base, quantization=args.quantization, dtype=args.dtype)
    if args.print_server == "vllm":
        lines, model = serving.lines(PORT), next(iter(names), serving.name)
    else:
        lines, model = transformers_lines(adapters, serving, args)
    return "\n".join([*lines, "", *request_lines(model, args)])


def transformers_lines(adapters: list[str], serving: Serving, args: argparse.Namespace) -> tuple[list[str], str]:
    """Return the lines, and the model's name; pixel limits, template and greedy answers are in the merged folder."""
    if args.min_pixels or args.max_pixels:
        raise ValueError("--print-server transformers: the pixel limits are those in the model's folder")
    if len(adapters) > 1:
        raise ValueError("--print-server transformers: it serves one model; name one adapter, which is merged")
    lines, model = [], serving.base
    if adapters:
        model = (adapters[0].rstrip("/") if Path(adapters[0]).is_dir() else served_name(adapters[0])) + "-merged"
        dtype = [["--dtype", serving.dtype]] if serving.dtype == "float16" else []  # merging has bfloat16 else
        lines += shell_lines([["python", "merge_adapter.py"], ["--adapter", adapters[0]], *dtype, ["--out", model]])
    place = ["--host", "127.0.0.1", "--port", str(PORT)]
    return [*lines, *shell_lines([["transformers", "serve", model], place])], model


def request_lines(model: str, args: argparse.Namespace) -> list[str]:
    """Return a request as a comment: the system turn is the client's to send, greedy decoding is asked for too."""
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}
    turns = [{"role": "user", "content": [image, {"type": "text", "text": "QUESTION"}]}]
    if system := args.system or (args.dataset and common_system(args)):
        turns.insert(0, {"role": "system", "content": system})
    body = {"model": model, "temperature": 0, "max_tokens": args.max_new_tokens, "messages": turns}
    return [f"# POST http://127.0.0.1:{PORT}/v1/chat/completions", f"# {json.dumps(body, ensure_ascii=False)}"]


def common_system(args: argparse.Namespace) -> str | None:
    """Return the system turn that all samples of the split have, or None.

    Raises:
        ValueError: they have several, so that a client has to send the right one with each question.
    """
    turns = {m["content"] if m["role"] == "system" else None for m, *_ in load_split(args)[1]["messages"]}
    if len(turns) > 1:
        raise ValueError(f"--dataset: {len(turns)} different system turns; name the one of your requests (--system)")
    return turns.pop()
