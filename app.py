"""Ask a trained adapter about photos, on a page in the browser.

python app.py --adapter outputs/skin
python app.py --adapter outputs/skin --base-too --dataset data/skin

The page shows each photo as the model sees it, streams the answer, and ranks the labels, calibrated by the adapter's
evaluation. It is for this machine alone, and keeps no photo. Not a medical device.
"""

import argparse
import sys

from common.cli import OneLineParser, announce, announce_loading, port_number, positive_int, run

if __name__ == "__main__":
    announce_loading()

from models.without_compiler import bitsandbytes  # noqa: F401

from datasets import disable_progress_bars

from models.adapters import load_answering_model, read_adapter_config
from models.loading import load_processor
from webapp.engine import Engine
from webapp.sessions import Sessions
from webapp.start import describe_adapter, load_data, read_reader, suggest_questions
from webapp.uploads import private_uploads


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser("app.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", required=True, help="folder or Hub id of an adapter")
    parser.add_argument("--base-too", action="store_true", help="show the base model's own answer beside it")
    parser.add_argument("--dataset", help="prepared data set: examples from it to ask about")
    parser.add_argument("--split", default="test", help="split of --dataset (default: test)")
    parser.add_argument("--image-dir", help="image folder, when --dataset is an annotation file")
    parser.add_argument("--system", help="system turn, if the training had one")
    parser.add_argument("--base", help="base model in place of the one in the adapter's configuration")
    parser.add_argument(
        "--quantization", choices=("auto", "nf4", "none"), default="auto",
        help="quantization of the base model (default: as in training)",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"),
        help="compute dtype (default: as in training; on a CPU use float32)",
    )  # fmt: skip
    parser.add_argument("--max-pixels", type=int, help="largest image area, px^2 (default: the processor's)")
    parser.add_argument("--max-new-tokens", type=positive_int, default=128)
    parser.add_argument("--batch-size", type=positive_int, default=8, help="of the occlusion maps")
    parser.add_argument("--port", type=port_number, help="default: the first free one from 7860 on")
    parser.add_argument(
        "--share", action="store_true",
        help="a public address for a week; photos then pass through Gradio's servers",
    )  # fmt: skip
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def show_address(url: str) -> None:
    print(f"open {url}   (Ctrl-C ends it)", flush=True)


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    disable_progress_bars()  # those of datasets
    read_adapter_config(args.adapter)
    splits, examples = load_data(args)
    reader = read_reader(args, splits)
    options = {"base": args.base, "quantization": args.quantization, "dtype": args.dtype}
    model = load_answering_model(args.adapter, **options)
    processor = load_processor(args.adapter, max_pixels=args.max_pixels)
    engine = Engine(model, processor, max_new_tokens=args.max_new_tokens, batch_size=args.batch_size)
    announce("building the page", "5 to 20 s")
    with private_uploads():
        from webapp.page import App, build_page
        from webapp.server import serve

        page = build_page(
            App(
                engine, reader, describe_adapter(args), suggest_questions(reader, examples),
                examples, args.base_too, Sessions(args.system),
            )
        )  # fmt: skip
        serve(page, port=args.port, share=args.share, ready=show_address)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
