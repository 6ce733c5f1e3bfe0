"""What a model must be before it is trained to predict the next token."""

import torch
from transformers import PreTrainedModel


def check_length(model: PreTrainedModel, name: str, tokens: int | None) -> None:
    """Raises a `ValueError` if a field, where it is given, asks for more tokens at once than a model can read."""
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and tokens is not None and longest < tokens:
        raise ValueError(f"`{name}` is {tokens:,}, but the model reads {longest:,} tokens at most. Use a smaller one.")


def check_causal(model: PreTrainedModel, name: str, window: int | None) -> None:
    """
    Runs a model on a few tokens, and asks whether it sees those that come later.

    Args:
        model ([`~transformers.PreTrainedModel`]): On any device.
        name (`str`): What the user calls it, for the error.
        window (`int`, *optional*): The longest input it is to have.

    Raises:
        `ValueError`: If it does.
    """
    if not is_causal(model, min(window or 8, 8)):
        raise ValueError(
            f"`{name}` predicts tokens from those that come after them, so its loss would mean nothing. Give its "
            "configuration `is_decoder: true`, if it has that, or use another model."
        )


@torch.no_grad()
def is_causal(model: PreTrainedModel, count: int) -> bool:
    """
    Whether what a model makes of the first of so many tokens is the same whatever the last one is.

    Raises:
        `ValueError`: If its logits are no numbers.
    """
    training = model.training
    tokens = torch.arange(count, device=model.device).repeat(2, 1)
    tokens[1, -1] += 1
    logits = model.eval()(tokens % len(model.get_input_embeddings().weight), use_cache=False).logits.float()
    model.train(training)
    if not bool(logits.isfinite().all()):
        raise ValueError(
            f"Logits of {type(model).__name__} are NaN or infinite before any training: look at its weights."
        )
    return count == 1 or bool((logits[0] - logits[1])[:-1].abs().max() <= 1e-4 * logits.abs().max())
