"""Resizing embeddings makes a new dense head, in which the weights of a sparse one outside A would be lost."""

import functools

from transformers import PreTrainedModel

from ..layers import TopKastLayer


_stock_resize = PreTrainedModel.resize_token_embeddings


@functools.wraps(_stock_resize)
def _resize_token_embeddings(self, *args, **kwargs):
    """As ever, unless the head is sparse."""
    if isinstance(self.get_output_embeddings(), TopKastLayer):
        raise ValueError(
            "The head of the model is sparse, and resize_token_embeddings would put a dense one in its place, without "
            "its weights outside A. Resize the embeddings before sparsify, or leave the head dense (exclude_modules)."
        )
    return _stock_resize(self, *args, **kwargs)


PreTrainedModel.resize_token_embeddings = _resize_token_embeddings
