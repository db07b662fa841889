"""Several processes: what they can share, and whether all see the same output folder."""

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DeepSpeedPlugin,
    broadcast_object_list,
    gather_object,
    parse_flag_from_env,
)

from common.files import locked
from training.settings import Settings

UNSHARDED = "none"
LOCK = "training.lock"
FILE_TIMEOUT = 10.0  # s; network file systems may take a moment to show a new file elsewhere


def requested_sharding(deepspeed: DeepSpeedPlugin | None) -> str:
    """Return how accelerate's configuration shards what trains: "none" or "ZeRO-n"."""
    return UNSHARDED if deepspeed is None else f"ZeRO-{deepspeed.zero_stage}"


def check_distributed(settings: Settings) -> None:
    """Refuse what would go wrong with several processes, before anything slow starts.

    Raises:
        ValueError: accelerate's configuration shards the base model, or `shard_base` cannot.
    """
    args, requested = settings.training, requested_sharding(settings.training.deepspeed_plugin)
    if requested == "ZeRO-3":
        raise ValueError("zero_stage: expected 1 or 2, found 3; shard_base: true shards the weights too")
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        rule = "launch with accelerate_config.yaml and set shard_base: true"
        raise ValueError(f"accelerate's configuration: its FSDP loads the whole base model in each process; {rule}")
    if not args.shard_base:
        return
    if requested != UNSHARDED:
        raise ValueError(f"shard_base: not with {requested}; launch with accelerate_config.yaml")
    if args.world_size == 1:
        raise ValueError("shard_base: needs several processes, found 1; see --num_processes of accelerate launch")


def check_sharded(accelerator: Accelerator, requested: str) -> None:
    """Raise ValueError unless the trainer's accelerator shards as requested; on a CPU or alone it does not."""
    zero = accelerator.state.deepspeed_plugin
    actual = UNSHARDED if zero is None else f"ZeRO-{zero.zero_stage}"
    if actual != requested:
        raise ValueError(f"accelerate's configuration: {requested} needs several GPUs, and {actual} is on")


@contextmanager
def own_output(output_dir: Path) -> Iterator[None]:
    """Make the output folder and keep other runs out of it while the block runs; the main process holds the lock.

    A folder that it made and that is empty at the end, as after a refused setting, is removed.

    Raises:
        ValueError: in every process, another run is using the folder, or a process cannot write there.
    """
    made = [folder for folder in (output_dir, *output_dir.parents) if not folder.exists()]
    with ExitStack() as stack:
        stack.callback(_remove_empty, made)
        prepare_output(output_dir)
        refused = problem = None
        if PartialState().is_main_process:
            try:
                problem = stack.enter_context(locked(output_dir / LOCK, f"output_dir: {output_dir}"))
            except ValueError as error:
                refused = f"{error}; wait for it or stop it, or choose another output_dir"
        [refused] = broadcast_object_list([refused])
        if refused:
            raise ValueError(refused)
        if problem:
            print(f"warning: output_dir: the storage of {output_dir} has no file locks ({problem}), so that a second "
                  "run in it would not be noticed", flush=True)  # fmt: skip
        yield


def _remove_empty(folders: list[Path]) -> None:
    with suppress(OSError):  # not empty, or removed by another process
        for folder in folders:
            folder.rmdir()


def prepare_output(output_dir: Path) -> None:
    """Make the output folder and check that all processes can write to it, before anything slow starts."""
    try:
        Path(os.path.realpath(output_dir)).mkdir(parents=True, exist_ok=True)  # what a link leads to
        probe = output_dir / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"output_dir: cannot write to {output_dir}: {error.strerror}") from error
    check_shared_folder(output_dir)


def check_shared_folder(folder: Path) -> None:
    """Raise ValueError, in every process, unless each of them sees what the main process writes into `folder`."""
    state = PartialState()
    [name] = broadcast_object_list([f".seen-by-all-{uuid.uuid4().hex}"])
    if state.is_main_process:
        (folder / name).touch()
    state.wait_for_everyone()
    seen = gather_object([_appears(folder / name)])
    if state.is_main_process:
        (folder / name).unlink()
    if not all(seen):
        raise ValueError(
            f"output_dir: process {seen.index(False)} does not see what process 0 writes there (here: {folder}); "
            "put it on storage that all machines share"
        )


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + FILE_TIMEOUT
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def barrier_and_shutdown() -> None:
    """Wait for all processes before one ends: collective operations of the others would fail without it."""
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()
