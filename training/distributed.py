"""Several processes: how accelerate shards the model over them, and whether all see the same output folder."""

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DeepSpeedPlugin,
    FullyShardedDataParallelPlugin,
    broadcast_object_list,
    gather_object,
    parse_flag_from_env,
)

from common.files import locked
from training.settings import Settings

UNSHARDED = "none"
FSDP2_FILE = "configs/accelerate/fsdp2.yaml"
LOCK = "training.lock"
FILE_TIMEOUT = 10.0  # s; network file systems may take a moment to show a new file elsewhere


def requested_sharding(deepspeed: DeepSpeedPlugin | None) -> str:
    """Return how accelerate's configuration shards the model: "none", "FSDP1", "FSDP2" or "ZeRO-n"."""
    if deepspeed is not None:
        return f"ZeRO-{deepspeed.zero_stage}"
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return f"FSDP{FullyShardedDataParallelPlugin().fsdp_version}"
    return UNSHARDED


def check_distributed(settings: Settings) -> None:
    """Refuse what accelerate's configuration requests and would go wrong, before anything slow starts."""
    args, model = settings.training, settings.model
    storage = (model.bnb_4bit_quant_storage or "uint8") if model.load_in_4bit else None
    mixed = "bfloat16" if args.bf16 else "float16" if args.fp16 else None
    check_sharding(requested_sharding(args.deepspeed_plugin), storage=storage, mixed=mixed)


def check_sharding(requested: str, *, storage: str | None, mixed: str | None) -> None:
    """Raise ValueError for a configuration of accelerate under which a run would go wrong, or save no adapter.

    Args:
        requested: as `requested_sharding` returns it.
        storage: dtype that the 4-bit weights are kept in; None without such weights.
        mixed: dtype of mixed precision; None without it.
    """
    if requested == "ZeRO-3":
        raise ValueError(f"zero_stage: expected 1 or 2, found 3; {FSDP2_FILE} shards the weights too")
    if requested == "FSDP1":
        raise ValueError("fsdp_version: expected 2, found 1")
    if requested != "FSDP2":
        return
    plugin = FullyShardedDataParallelPlugin()
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading: expected false; true leaves all weights but process 0's empty"
        )
    if plugin.state_dict_type.name != "FULL_STATE_DICT":
        name = plugin.state_dict_type.name
        raise ValueError(f"fsdp_state_dict_type: expected FULL_STATE_DICT, found {name}; no adapter would be saved")
    if storage == "uint8" or (storage and mixed and storage != mixed):
        expected = mixed or "the recipe's dtype"
        raise ValueError(f"bnb_4bit_quant_storage: FSDP2 needs {expected} to shard 4-bit weights, found {storage}")


def shard_layers(decoder_layer: str) -> None:
    """Tell accelerate to fetch the weights of one language layer at a time; before the trainer sets it up.

    The vision tower is not divided: a process without an image in its batch does not call it, and the others would
    wait for that process in each of its layers.
    """
    os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = decoder_layer


def check_sharded(accelerator: Accelerator, requested: str) -> None:
    """Raise ValueError unless the trainer's accelerator shards as requested; on a CPU or alone it does not."""
    zero = accelerator.state.deepspeed_plugin
    actual = "FSDP2" if accelerator.is_fsdp2 else UNSHARDED if zero is None else f"ZeRO-{zero.zero_stage}"
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
