"""A teacher beside the model in training: where it comes from, and whether it can teach it."""

import os

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from ..storage import local
from ..surgery import sparse_layers
from .borrowed import borrowers
from .passes import decoder_blocks, without_adapters


logger = logging.get_logger(__name__)


def load_teacher(teacher: PreTrainedModel | str | os.PathLike, tokenizer=None) -> PreTrainedModel:
    """
    The teacher; by name or directory it is loaded in bfloat16.

    Args:
        teacher (`PreTrainedModel` or `str`): the model itself, which stays in its dtype, or where it is.
        tokenizer (*optional*): the student's, to compare with the one that lies beside a teacher.

    Raises:
        TypeError: if it is neither.
        ValueError: if its tokenizer has another vocabulary.
    """
    if isinstance(teacher, str | os.PathLike):
        if hasattr(tokenizer, "get_vocab"):
            _check_tokenizer(teacher, tokenizer)
        teacher = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.bfloat16)
    if not isinstance(teacher, PreTrainedModel):
        raise TypeError(
            f"teacher is a {type(teacher).__name__}: give a transformers model (the dense model itself, as "
            "copy.deepcopy(model) makes it before sparsify), or the name or directory of one."
        )
    return teacher


def _check_tokenizer(teacher: str | os.PathLike, tokenizer):
    try:
        other = AutoTokenizer.from_pretrained(teacher)
    except (OSError, ValueError) as error:
        logger.warning(
            f"There is no tokenizer with the teacher '{teacher}' ({error}), so that only sizes of vocabularies are "
            "compared."
        )
        return
    ours, theirs = tokenizer.get_vocab(), other.get_vocab()
    if ours != theirs:
        moved = next((token for token in ours if theirs.get(token) != ours[token]), None)
        example = "" if moved is None else f"; '{moved}' is {ours[moved]} and {theirs.get(moved)}"
        raise ValueError(
            f"The tokenizer of the teacher '{teacher}' has another vocabulary than the student's: {len(theirs)} and "
            f"{len(ours)} tokens{example}. Logits of other tokens cannot be compared: take a teacher with the "
            "student's tokenizer; or give the trainer the student's as processing_class, if it is this one."
        )


def check_teacher(teacher: PreTrainedModel, student: nn.Module, hidden: bool):
    """
    Whether a teacher can teach a student.

    Args:
        teacher (`PreTrainedModel`): a model.
        student (`torch.nn.Module`): the model to be trained.
        hidden (`bool`): whether outputs of their blocks are compared, too.

    Raises:
        ValueError: if one is no causal language model of transformers, if they are one model or share weights, if the
            teacher runs the student or is sparse, if they have other vocabularies, or, for `hidden`, other numbers of
            blocks or widths. The message names both sides and the way out.
    """
    student = without_adapters(student)
    for role, model in (("student", student), ("teacher", teacher)):
        known = isinstance(model, PreTrainedModel) and model.can_generate()
        if not known or model.config.is_encoder_decoder:
            raise ValueError(
                f"The {role} is a {type(model).__name__}, which is no causal language model of transformers (they end "
                "in ForCausalLM or LMHeadModel): only these predict the same next tokens. Train with TopKastTrainer."
            )
    shared = {local(parameter.detach()).data_ptr() for parameter in teacher.parameters()} - {0}
    own = {name: local(parameter.detach()).data_ptr() for name, parameter in student.named_parameters()}
    common = [name for name, address in own.items() if address in shared]
    if teacher is student or common:
        what = "the student itself" if teacher is student else f"a model that shares '{common[0]}' with the student"
        raise ValueError(
            f"The teacher is {what}, and would change with it. Take its weights of before: teacher = "
            "copy.deepcopy(model), and then sparsify(model, ...)."
        )
    borrowing = borrowers(teacher, student)
    if borrowing:
        part = f"teacher.{borrowing[0]}".rstrip(".")
        raise ValueError(
            "The teacher's forward runs the student: it is a copy of it, made after a trainer (of TRL, say) had given "
            f"the student one of its own, and copies hold the former. Call `del {part}.forward`, or load the teacher "
            "from where it was saved."
        )
    sparse = [name for name, _ in sparse_layers(teacher)]
    if sparse:
        raise ValueError(
            f"The teacher has {len(sparse)} sparse layers (the first is '{sparse[0]}'), so it is no better than what "
            "was cut. Copy the model before sparsify; if a sparse model is to be the teacher, give densify(teacher)."
        )
    sizes = {"vocabulary": [model.config.get_text_config().vocab_size for model in (teacher, student)]}
    way = (
        "Take a teacher with the student's tokenizer; where only padding of the embeddings differs, resize the "
        "teacher's: teacher.resize_token_embeddings(n)."
    )
    if hidden:
        sizes["number of blocks"] = [len(decoder_blocks(model)) for model in (teacher, student)]
        sizes["width"] = [model.config.get_text_config().hidden_size for model in (teacher, student)]
    for name, (theirs, ours) in sizes.items():
        if theirs != ours:
            raise ValueError(
                f"The teacher ({type(teacher).__name__}) has a {name} of {theirs}, the student "
                f"({type(student).__name__}) one of {ours}. "
                + (way if name == "vocabulary" else "Their blocks cannot be compared: set hidden_weight=0.")
            )
