"""The last language layer in training: its MLP for those tokens alone whose outputs the loss looks at."""

import torch
from transformers import PreTrainedModel

from models.compilation import has_plain_layers, language_layers


def spare_last_layer(model: PreTrainedModel) -> None:
    """Let the last language layer compute its MLP for the `answer_rows` of a pack alone, see the collator, in place.

    What follows is the final norm and the LM head, token by token, so that loss and gradients are the same; the hidden
    states of all other tokens are not. Four of five tokens of a photograph's question are image, and a layer's MLP is
    nine tenths of its work. Batches without the key `answer_rows` are computed as before. Linear attention and experts
    have other layers, and nothing happens to them.

    Args:
        model: also with LoRA; before its layers are compiled.
    """
    if has_plain_layers(model):
        last = language_layers(model)[-1]
        kind = type(last)
        last.__class__ = type(kind.__name__, (kind,), {"forward": _forward, "__module__": kind.__module__})


def _forward(
    self, hidden_states: torch.Tensor, *args, answer_rows: torch.Tensor | None = None, **kwargs
) -> torch.Tensor:
    """As the layers of Qwen2-VL to Qwen3-VL: attention, then MLP, each with its norm before and added to its input."""
    attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
    hidden_states = hidden_states + attended
    rows = hidden_states if answer_rows is None else hidden_states.index_select(1, answer_rows)
    rows = rows + self.mlp(self.post_attention_layernorm(rows))
    return rows if answer_rows is None else hidden_states.index_copy(1, answer_rows, rows)
