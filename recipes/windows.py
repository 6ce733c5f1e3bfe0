"""
Windows of tokens: what a model is trained on, and what it is evaluated on.

Both kinds cut the same stream, a start token followed by the N tokens of a split, into windows of one fixed length, so
that there is never any padding. Labels are aligned with the inputs, as causal language models of Transformers expect:
the model shifts them itself, so a window of `window` tokens predicts `window - 1` of them, and the N + 1 tokens of the
stream give N predictions.
"""

import numpy as np
import torch
from torch.utils.data import Dataset


IGNORED = -100  # the label which Transformers leaves out of the loss


def evaluation_span(index: int, num_tokens: int, window: int) -> tuple[int, int]:
    """
    Where an evaluation window begins in the stream, and the first position which it predicts.

    A window moves on by half its length and predicts only what no window before it did, so every token is predicted
    once, with at least half a window of context, or with all that exists near the start of the split. The last window
    is moved back to keep its full length.

    Args:
        index (`int`): Number of the window, from 0.
        num_tokens (`int`): Tokens of the split, without the start token.
        window (`int`): Length of a window in tokens.

    Returns:
        `tuple[int, int]`: Both positions count from the start token, which is position 0.
    """
    stride = window // 2
    begin = min(index * stride, num_tokens + 1 - window)
    first_predicted = 1 if index == 0 else (index - 1) * stride + window
    return begin, first_predicted


def count_evaluation_windows(num_tokens: int, window: int) -> int:
    """Number of windows that [`evaluation_span`] needs to predict `num_tokens` tokens."""
    left_after_first = num_tokens + 1 - window
    return 1 + -(-left_after_first // (window // 2))


class TokenWindows(Dataset):
    """
    A split as a sequence of equally long windows.

    Args:
        tokens (`np.ndarray`): Token ids of the split, one dimension; may be memory-mapped.
        window (`int`): Length of a window in tokens, at least 2.
        start_token (`int`): The token from which the first one of the split is predicted.
        split_name (`str`): Named in the error message.

    Raises:
        `ValueError`: If the split is shorter than one window.
    """

    def __init__(self, tokens: np.ndarray, window: int, start_token: int, split_name: str):
        if window < 2:
            raise ValueError(f"`window` is {window}, but a token and its prediction need a window of at least 2.")
        if len(tokens) + 1 < window:
            raise ValueError(
                f"The {split_name} split has {len(tokens):,} tokens, fewer than the {window - 1:,} which one window "
                f"predicts (`window` is {window:,}). Use more data (see `max_train_bytes` and `max_eval_bytes`) or a "
                "smaller `window`."
            )
        self.tokens = tokens
        self.window = window
        self.start_token = start_token

    def _stream(self, begin: int) -> torch.Tensor:
        """The window of the stream that begins at this position, int64 of shape (window,)."""
        if begin > 0:
            return torch.from_numpy(self.tokens[begin - 1 : begin - 1 + self.window].astype(np.int64))
        tokens = self.tokens[: self.window - 1].astype(np.int64)
        return torch.from_numpy(np.concatenate(([self.start_token], tokens)))


class TrainingWindows(TokenWindows):
    """
    Consecutive windows. Neighbours share one token, the last of one being the first of the next, because the first
    token of a window is not predicted in it: so an epoch predicts every token once, but for a tail shorter than a
    window.
    """

    def __len__(self) -> int:
        return len(self.tokens) // (self.window - 1)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"Window {index} of {len(self)}.")
        input_ids = self._stream(index * (self.window - 1))
        return {"input_ids": input_ids, "labels": input_ids.clone()}


class EvaluationWindows(TokenWindows):
    """Half-overlapping windows which predict every token of the split exactly once, see [`evaluation_span`]."""

    def __len__(self) -> int:
        return count_evaluation_windows(len(self.tokens), self.window)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"Window {index} of {len(self)}.")
        begin, first_predicted = evaluation_span(index, len(self.tokens), self.window)
        input_ids = self._stream(begin)
        labels = input_ids.clone()
        labels[: first_predicted - begin] = IGNORED
        return {"input_ids": input_ids, "labels": labels}
