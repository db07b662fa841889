"""What a loaded model's weights take."""

from bitsandbytes.nn import Params4bit


def bytes_of(model):
    """Return the bytes of a loaded model's tensors, those of bitsandbytes' quantisation among them."""
    tensors = [*model.parameters(), *model.buffers()]
    for weight in [x for x in tensors if isinstance(x, Params4bit)]:
        state = weight.quant_state
        tensors += [state.absmax, state.code]
        tensors += [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())
