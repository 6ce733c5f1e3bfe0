"""What models compute on the way to their loss, seen from outside: outputs of blocks, and logits."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ..storage import is_sharded


def without_adapters(model: nn.Module) -> nn.Module:
    """The model below PEFT's wrapper, if it has one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder_blocks(model: nn.Module) -> nn.ModuleList:
    """
    The stack of a language model's decoder blocks.

    Raises:
        ValueError: if there is none.
    """
    depth = model.config.get_text_config().num_hidden_layers
    for module in model.get_decoder().modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise ValueError(
        f"{type(model).__name__} has no nn.ModuleList of {depth} blocks (num_hidden_layers), whose outputs could be "
        "compared. Set hidden_weight=0."
    )


@contextmanager
def block_outputs(model: nn.Module, see: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Calls `see` with number and output of each decoder block, while `model` runs."""
    with ExitStack() as hooks:
        for index, block in enumerate(decoder_blocks(model)):

            def hook(module, arguments, output, index=index):
                see(index, output if isinstance(output, Tensor) else output[0])

            hooks.callback(block.register_forward_hook(hook).remove)
        yield


class StudentPass:
    """
    What a student computes while `with` holds, in the pass that gradients are taken of.

    Args:
        model (`torch.nn.Module`): the student, without wrappers.
        hidden (`bool`): whether to keep the outputs of its blocks.

    Attributes:
        logits (`torch.Tensor`, *optional*): (batch, tokens, vocabulary), if it has made some.
        blocks (`dict[int, torch.Tensor]`): the outputs of its decoder blocks, each (batch, tokens, width).
    """

    def __init__(self, model: nn.Module, hidden: bool):
        self.model = without_adapters(model)
        self.logits: Tensor | None = None
        self.blocks: dict[int, Tensor] = {}
        self._hidden, self._hooks = hidden, ExitStack()
        self._backbone_output = None

    def __enter__(self):
        def see_block(index, output):
            if torch.is_grad_enabled():  # some trainers have a second pass for their metrics
                self.blocks[index] = output

        def see_backbone(module, arguments, output):
            if torch.is_grad_enabled():
                self._backbone_output = output

        def see_logits(module, arguments, output):
            if torch.is_grad_enabled():
                self.logits = getattr(output, "logits", None)

        if self._hidden:
            self._hooks.enter_context(block_outputs(self.model, see_block))
        for module, hook in ((self.model.base_model, see_backbone), (self.model, see_logits)):
            self._hooks.callback(module.register_forward_hook(hook).remove)
        return self

    def __exit__(self, *raised):
        self._hooks.close()

    def check_blocks(self, tokens: torch.Size):
        """
        Args:
            tokens (`torch.Size`): of the batch, (batch, tokens).

        Raises:
            ValueError: if the pass did not show the outputs of all blocks, or of other tokens.
        """
        expected = len(decoder_blocks(self.model))
        if len(self.blocks) != expected:
            raise ValueError(
                f"Only {len(self.blocks)} of {expected} decoder blocks of {type(self.model).__name__} had an output "
                "that gradients can flow into. Checkpointing with use_reentrant=True hides them, and so may a "
                "compiled model: set gradient_checkpointing_kwargs={'use_reentrant': False}, torch_compile=False, or "
                "hidden_weight=0."
            )
        other = next((block for block in self.blocks.values() if block.shape[:2] != tokens), None)
        if other is not None:
            raise ValueError(
                f"A decoder block of {type(self.model).__name__} has an output of {tuple(other.shape)}, and the batch "
                f"has (batch, tokens) = {tuple(tokens)}: which number is of which token is not known (a trained "
                "prompt adds tokens). Set hidden_weight=0."
            )

    def make_logits(self, arguments: dict) -> Tensor:
        """
        The logits, if need be made of what the backbone has computed: TRL's loss goes without.

        Args:
            arguments (`dict`): those of the model's forward, without labels.

        Raises:
            ValueError: if they cannot be made.
        """
        logits = self.logits
        if logits is None and not any(map(is_sharded, self.model.parameters())):
            logits = self._run_head(arguments)
        if logits is None:
            raise ValueError(
                f"{type(self.model).__name__} computed a loss and no logits, which the teacher's are compared with: a "
                "fused loss takes their place. Switch it off (use_liger_kernel=False, or for TRL under FSDP2 train "
                "with TopKastDistillationTrainer), or set logit_weight=0."
            )
        return logits

    def _run_head(self, arguments: dict) -> Tensor | None:
        """The forward of the model's class, below whatever a fused loss has put in its place, without the backbone."""
        backbone, output = self.model.base_model, self._backbone_output
        if output is None or backbone is self.model:
            return None
        former = backbone.__dict__.get("forward")
        backbone.forward = lambda *arguments, **options: output
        try:
            return type(self.model).forward(self.model, **arguments).logits
        finally:
            del backbone.forward
            if former is not None:
                backbone.forward = former
