"""Push a trained adapter to the Hugging Face Hub.

python push_adapter.py outputs/skin you/skin            # a finished run, private
python push_adapter.py outputs/skin you/skin --public
"""

import argparse
import sys
from pathlib import Path

from common.cli import OneLineParser, announce, announce_loading, run

if __name__ == "__main__":
    announce_loading()

from common.hub_client import open_repository
from models.adapters import check_fits_base
from publishing.hub import check_adapter, push_adapter


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        "push_adapter.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output_dir", type=Path, help="folder of a run, or of one of its checkpoints")
    parser.add_argument("repo_id", help='"owner/name" on the Hub, or "name"')
    parser.add_argument("--public", action="store_true", help="for all to see (default: private)")
    parser.add_argument("--revision", help="branch (default: main)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    check_adapter(args.output_dir)
    check_fits_base(str(args.output_dir))
    repo_id = open_repository(args.repo_id, private=not args.public, revision=args.revision)
    announce(f"uploading to {repo_id}", "80 MB for 7B: seconds to minutes by the connection")
    url = push_adapter(args.output_dir, repo_id, revision=args.revision, private=not args.public)
    print(f"pushed to {url}")


if __name__ == "__main__":
    sys.exit(run(main))
