"""Several processes: what they can share."""

from accelerate import Accelerator, PartialState
from accelerate.utils import DeepSpeedPlugin, parse_flag_from_env

from training.settings import Settings

UNSHARDED = "none"


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


def barrier_and_shutdown() -> None:
    """Wait for all processes before one ends: collective operations of the others would fail without it."""
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()
