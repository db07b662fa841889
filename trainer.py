"""TRL's trainer, fed with packs: several samples in one row, as many as a budget of tokens takes."""

import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch.utils.data import DataLoader
from trl import SFTTrainer

from attention import REGISTERED
from packing import PackSampler


class PackedSFTTrainer(SFTTrainer):
    """`SFTTrainer` whose batches are packs.

    Args:
        pack_tokens: most tokens in a pack.
        train_lengths: of the training samples, tokens.
        validation_lengths: of the validation samples; None without evaluation.
        kwargs: as `SFTTrainer` takes them; the collator packs, and the model attends within samples.
    """

    def __init__(
        self,
        *,
        pack_tokens: int,
        train_lengths: Sequence[int],
        validation_lengths: Sequence[int] | None = None,
        **kwargs,
    ):
        self.pack_tokens, self.train_lengths, self.validation_lengths = pack_tokens, train_lengths, validation_lengths
        # Packs hold other numbers of samples, so accelerate cannot even them out; the sampler does.
        kwargs["args"].accelerator_config.even_batches = False
        super().__init__(**kwargs)

    @cached_property
    def train_packs(self) -> PackSampler:
        multiple = self.args.gradient_accumulation_steps * self.args.world_size
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        options = {"seed": seed, "multiple": multiple}
        first = PackSampler(self.train_lengths, self.pack_tokens, **options)
        epochs = math.ceil(self.args.num_train_epochs)
        if self.args.max_steps > 0:
            epochs = math.ceil(self.args.max_steps * multiple / len(first)) + 1
        return PackSampler(self.train_lengths, self.pack_tokens, **options, epochs=epochs)

    def get_train_dataloader(self) -> DataLoader:
        return self._loader(self.train_dataset, self.train_packs)

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        processes = self.args.world_size
        sampler = PackSampler(self.validation_lengths, self.pack_tokens, multiple=processes, shuffle=False)
        return self._loader(self.eval_dataset if eval_dataset is None else eval_dataset, sampler)

    def _loader(self, dataset, sampler: PackSampler) -> DataLoader:
        args = self.args
        loader = DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        return self.accelerator.prepare(loader)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """As TRL computes it. A mask of ones lets TRL count the tokens, which it else takes to be one a pack; `varlen`
        goes by `pack_offsets` and does not look at it. SDPA gets none: it reads the borders off the positions."""
        if self.model.config._attn_implementation == REGISTERED:
            inputs = {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
