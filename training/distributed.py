"""Several processes: how accelerate spreads the model over them, and whether all see the same data and folder."""

import time
import uuid
from pathlib import Path

from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DeepSpeedPlugin,
    FullyShardedDataParallelPlugin,
    broadcast_object_list,
    gather_object,
    parse_flag_from_env,
)
from trl import ModelConfig

from training.config import TrainingSettings

WHOLE = "none"
FSDP2_FILE = "configs/accelerate/fsdp2.yaml"
SEEN_WITHIN = 10.0  # s; network file systems may take a moment to show a new file elsewhere


def asked_sharding(deepspeed: DeepSpeedPlugin | None) -> str:
    """Return what accelerate's configuration spreads over the processes: "none", "FSDP1", "FSDP2" or "ZeRO-n"."""
    if deepspeed is not None:
        return f"ZeRO-{deepspeed.zero_stage}"
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return f"FSDP{FullyShardedDataParallelPlugin().fsdp_version}"
    return WHOLE


def check_sharding(asked: str, *, storage: str | None, mixed: str | None) -> None:
    """Raise ValueError for a configuration of accelerate under which a run would go wrong, or save no adapter.

    Args:
        asked: as `asked_sharding` returns it.
        storage: dtype that the 4-bit weights are kept in; None without such weights.
        mixed: dtype of mixed precision; None without it.
    """
    if asked == "ZeRO-3":
        raise ValueError(f"zero_stage: expected 1 or 2, found 3; {FSDP2_FILE} spreads the weights too")
    if asked == "FSDP1":
        raise ValueError("fsdp_version: expected 2, found 1")
    if asked != "FSDP2":
        return
    plugin = FullyShardedDataParallelPlugin()
    if plugin.cpu_ram_efficient_loading:
        raise ValueError("fsdp_cpu_ram_efficient_loading: expected false; all but one would begin with empty weights")
    if plugin.state_dict_type.name != "FULL_STATE_DICT":
        found = plugin.state_dict_type.name
        raise ValueError(f"fsdp_state_dict_type: expected FULL_STATE_DICT, found {found}; no adapter would be saved")
    if storage == "uint8" or (storage and mixed and storage != mixed):
        expected = mixed or "the recipe's dtype"
        raise ValueError(f"bnb_4bit_quant_storage: FSDP2 needs {expected} to spread 4-bit weights, found {storage}")


def check_sharded(accelerator: Accelerator, asked: str) -> None:
    """Raise ValueError unless the trainer's accelerator does what was asked for; on a CPU or alone it does not."""
    zero = accelerator.state.deepspeed_plugin
    found = "FSDP2" if accelerator.is_fsdp2 else WHOLE if zero is None else f"ZeRO-{zero.zero_stage}"
    if found != asked:
        raise ValueError(f"accelerate's configuration: {asked} needs several GPUs, and {found} is on")


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
    deadline = time.monotonic() + SEEN_WITHIN
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def leave_together() -> None:
    """Wait for all processes before one ends: what others still exchange with it would fail."""
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()


def check_processes(training_args: TrainingSettings, model_args: ModelConfig) -> None:
    """Refuse what accelerate's configuration asks for and would go wrong, before anything slow starts."""
    storage = (model_args.bnb_4bit_quant_storage or "uint8") if model_args.load_in_4bit else None
    mixed = "bfloat16" if training_args.bf16 else "float16" if training_args.fp16 else None
    check_sharding(asked_sharding(training_args.deepspeed_plugin), storage=storage, mixed=mixed)
