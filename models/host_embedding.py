"""The input embedding in the host's memory: a batch's rows are looked up there and sent to the GPU."""

import torch
from transformers import PreTrainedModel


class HostEmbedding(torch.nn.Module):
    """A frozen embedding outside of the GPU's memory.

    Its weights are no parameter, so that nothing moves, shares, trains or saves them.
    """

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.rows = weight.detach().cpu()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the rows of ids of any shape (...), shape (..., D), on the device of the ids; waits for the ids."""
        flat = ids.flatten().cpu()
        rows = torch.empty(len(flat), self.rows.size(1), dtype=self.rows.dtype, pin_memory=ids.is_cuda)
        torch.index_select(self.rows, 0, flat, out=rows)
        return rows.to(ids.device, non_blocking=True).unflatten(0, ids.shape)


def move_embedding_to_host(model: PreTrainedModel) -> None:
    """Replace the input embedding of a base model, whose LM head has weights of its own, with a `HostEmbedding`."""
    model.set_input_embeddings(HostEmbedding(model.get_input_embeddings().weight))


def host_weights(model: torch.nn.Module) -> int:
    """Return how many weights of a model are in a `HostEmbedding`."""
    return sum(module.rows.numel() for module in model.modules() if isinstance(module, HostEmbedding))
