"""Which sets the layers of one model get under one configuration: their sizes, and then their members."""

import hashlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import TopKastConfig
from ..layers import layer_named
from ..method import Gradients, LayerView, get_method
from ..storage import set_sizes, spread_blocks
from .distribution import DISTRIBUTIONS
from .fused import Rows, find_parts
from .methods import topkast
from .plan_checks import block_rows, check_sets, match_overrides
from .schedule import backward_density_of, scheduled_density
from .selection import block_norms, set_size


Sizes = list[tuple[int, int]]
Read = Callable[[str, int], Tensor]


@dataclass(frozen=True)
class Present:
    """
    A matrix of a layer at a refresh.

    Attributes:
        step (`int`): the optimizer step that it follows.
        active, backward (`Callable`): give its sets, bool, (out, in), to a method that asks for them.
        drop (`float`): share of A to exchange.
        gradients (`Callable`, *optional*): the gradients of a part, by its rows of blocks.
    """

    step: int
    active: Callable[[], Tensor]
    backward: Callable[[], Tensor]
    drop: float = 0.0
    gradients: Callable[[Rows], Gradients] | None = None


class SetPlan:
    """
    Chooses A and B for the layers of a model, at first and at every refresh.

    Args:
        model (`torch.nn.Module`): the model, before or after its layers became sparse.
        shapes (`dict[str, tuple[int, int]]`): (out, in) of each layer, by its name in `model`.
        config ([`TopKastConfig`]): the settings.

    Raises:
        ValueError: if there is no such method, if an entry of `density_overrides` matches no layer, or if
            `split_fused` finds no fused layer or one that it cannot split.
    """

    def __init__(self, model: nn.Module, shapes: dict[str, tuple[int, int]], config: TopKastConfig):
        self.config, self.method = config, get_method(config.method)
        height, width = config.block_size
        # From here on, shapes, rows and sizes count blocks.
        self.shapes = {name: (rows // height, columns // width) for name, (rows, columns) in shapes.items()}
        found = find_parts(model, shapes, config.split_fused)
        stacks = {name: layer_named(model, name) for name in shapes}
        self.experts = {name: getattr(stacks[name], "experts", 1) for name in shapes}
        self.parts: dict[str, list[Rows]] = {
            name: [block_rows(name, rows, shapes[name][0], height) for rows in found[name]] for name in shapes
        }
        self.overrides = match_overrides(config.density_overrides or {}, shapes)

    def sizes(
        self, left: float, exploring: bool, read: Read, layers: Collection[str] | None = None
    ) -> dict[str, Sizes]:
        """
        |A| and |B| of every part of every layer, expert by expert, in blocks.

        Args:
            left (`float`): share of the density schedule's way that is left, see [`way_left`].
            exploring (`bool`): whether B is larger than A.
            read (`Callable`): a weight, (out, in), by the name of the layer and the number of the expert, 0 for an
                only one. With `density="nonzero"` only which entries are not zero counts, and may be given as a bool
                mask.
            layers (`Collection[str]`, *optional*): those whose sizes are asked for, among which `"global"` shares out
                the density. `None`: all.

        Raises:
            ValueError: if `density="nonzero"` finds no weight that is not zero in some layer, or no zero in any.
        """
        chosen = list(self.shapes) if layers is None else [name for name in self.shapes if name in layers]
        if self.config.density == "nonzero":
            return self._nonzero_sizes(exploring, read, chosen)
        sizes: dict[str, Sizes] = {}
        for name, final in self.overrides.items():
            if name not in chosen:
                continue
            pair = self._densities(final, left, exploring)
            numbers = [rows * columns for rows, columns in self._part_shapes(name)]
            sizes[name] = [tuple(set_size(numel, density) for density in pair) for numel in numbers]

        # By weights among those layers; by shapes among all, so that the others' being frozen changes no size.
        among = chosen if self.config.distribution == "global" else self.shapes
        names = [name for name in among if name not in self.overrides]
        shapes = [shape for name in names for shape in self._part_shapes(name)]

        def magnitudes():
            for name in names:
                yield from (scores.abs() for scores in self._part_scores(name, read))

        pair = self._densities(self.config.density, left, exploring)
        distribute = DISTRIBUTIONS[self.config.distribution]
        pairs = zip(*distribute(shapes, pair, magnitudes, self.config.block_size))
        sizes.update({name: [next(pairs) for _ in self._part_shapes(name)] for name in names})
        return {name: [(size, max(size, backward)) for size, backward in sizes[name]] for name in chosen}

    def present_sizes(self, name: str, row_offsets: Tensor) -> Sizes:
        """|A| and |B| of every part of a layer, in blocks, as the [`Pattern`] of all its matrices has them."""
        counts = row_offsets.diff().cpu().view(2, self.experts[name], -1)
        sizes = [(int(a[rows].sum()), int(rest[rows].sum())) for a, rest in zip(*counts) for rows in self.parts[name]]
        return [(active, active + exploring) for active, exploring in sizes]

    def reachable_sizes(self, name: str, sizes: Sizes, row_offsets: Tensor) -> Sizes:
        """What a layer of this [`Pattern`] can get of such sizes: a method may never grow A."""
        if self.method.grows:
            return sizes
        return [tuple(map(min, *pairs)) for pairs in zip(sizes, self.present_sizes(name, row_offsets))]

    def matrix_sizes(self, name: str, sizes: Sizes) -> Sizes:
        """|A| and |B| of every matrix of a layer, in blocks, of those of its parts."""
        count = len(self.parts[name])
        return [tuple(map(sum, zip(*sizes[first : first + count]))) for first in range(0, len(sizes), count)]

    def choose(
        self, name: str, theta: Tensor, sizes: Sizes, present: Present | None = None, place: int = 0
    ) -> tuple[Tensor, Tensor]:
        """
        A and B of one matrix of a layer, as the method chooses them.

        Args:
            name (`str`): the layer.
            theta (`torch.Tensor`): its weights, (out, in), by the norms of their inputs where these count.
            sizes (`list[tuple[int, int]]`): of A and B of every part of the layer.
            present ([`Present`], *optional*): the matrix at a refresh. `None`: its first sets.
            place (`int`, *optional*, defaults to 0): which matrix of the layer.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: A and B, bool, (out, in).

        Raises:
            ValueError: if a method gives sets of other sizes, or an A outside B; the message names the layer.
        """
        first_of_pruned = present is None and self.config.density == "nonzero"  # its zeros say what A is
        rule = topkast.choose if first_of_pruned else self.method.choose
        return self._choose(rule, name, theta, sizes, present, place)

    def largest(self, name: str, theta: Tensor, sizes: Sizes, place: int = 0) -> tuple[Tensor, Tensor]:
        """A and B of one matrix by magnitude, whatever the method; arguments and result as of [`SetPlan.choose`]."""
        return self._choose(topkast.choose, name, theta, sizes, None, place)

    def _choose(
        self, rule: Callable, name: str, theta: Tensor, sizes: Sizes, present: Present | None, place: int
    ) -> tuple[Tensor, Tensor]:
        scores, parts = self._scores(theta), self.parts[name]
        alone = len(parts) == 1
        masks = None if alone else [torch.zeros_like(scores, dtype=torch.bool) for _ in range(2)]
        first = place * len(parts)
        for part, (rows, (size, backward_size)) in enumerate(zip(parts, sizes[first:]), start=first):
            view = self._view(name, part, scores[rows], size, backward_size, present)
            chosen = (view.active, view.backward) if _is_to_stay(view) else rule(view)
            pair = chosen if isinstance(chosen, tuple) else (chosen, chosen)
            check_sets(self.config.method, name, view, *pair)
            if alone:
                masks = pair
            else:
                masks[0][rows], masks[1][rows] = pair
        if self.config.block_size != [1, 1]:
            masks = [spread_blocks(mask, self.config.block_size) for mask in masks]
        return tuple(masks)

    def _view(
        self, name: str, part: int, scores: Tensor, size: int, backward_size: int, present: Present | None
    ) -> LayerView:
        common = {"by_row": self.config.compare == "row", "pruned": self.config.density == "nonzero"}
        step = -1 if present is None else present.step
        # Of its own for each choice, so that neither resuming nor the number of ranks or layers changes a draw.
        seed = hashlib.blake2b(f"{self.config.seed}/{step}/{name}/{part}".encode(), digest_size=7).digest()
        common["generator"] = torch.Generator().manual_seed(int.from_bytes(seed, "big"))
        if present is None:
            return LayerView(scores, size, backward_size, **common)
        height, width = self.config.block_size
        place, own = divmod(part, len(self.parts[name]))
        rows = self.parts[name][own]
        gradients = None if present.gradients is None else present.gradients(self._rows_below(name, rows, place))
        now = {"drop": present.drop, "gradients": gradients}
        now["active"], now["backward"] = (
            lambda mask=mask: mask()[::height, ::width][rows] for mask in (present.active, present.backward)
        )
        return LayerView(scores, size, backward_size, **now, **common)

    def _rows_below(self, name: str, rows: Rows, place: int) -> Rows:
        """The rows of one matrix among those of all."""
        above = self.shapes[name][0] // self.experts[name] * place
        return slice(rows.start + above, rows.stop + above) if isinstance(rows, slice) else rows + above

    def _scores(self, theta: Tensor) -> Tensor:
        """What is ranked by magnitude: the weights, or the norms of their blocks."""
        return theta if self.config.block_size == [1, 1] else block_norms(theta, self.config.block_size)

    def _densities(self, final: float, left: float, exploring: bool) -> tuple[float, float]:
        density = scheduled_density(final, left, self.config)
        return density, backward_density_of(density, self.config, exploring)

    def _part_scores(self, name: str, read: Read) -> Iterator[Tensor]:
        """The scores of every part of a layer, one matrix after another."""
        for place in range(self.experts[name]):
            scores = self._scores(read(name, place))
            yield from (scores[rows] for rows in self.parts[name])

    def _part_shapes(self, name: str) -> list[tuple[int, int]]:
        out_features, in_features = self.shapes[name]
        shapes = [
            (len(range(out_features)[rows]) if isinstance(rows, slice) else len(rows), in_features)
            for rows in self.parts[name]
        ]
        return shapes * self.experts[name]

    def _nonzero_sizes(self, exploring: bool, read: Read, names: list[str]) -> dict[str, Sizes]:
        sizes: dict[str, Sizes] = {}
        zeros = 0
        for name in names:
            counts = [int(kept.count_nonzero()) for kept in self._part_scores(name, read)]
            if 0 in counts:
                raise ValueError(
                    f"density='nonzero': {self._part_name(name, counts.index(0))} holds only zeros, so its active set "
                    "would be empty. Name the layer in exclude_modules, or give a number as density."
                )
            numbers = [rows * columns for rows, columns in self._part_shapes(name)]
            zeros += sum(numbers) - sum(counts)
            sizes[name] = [(count, self._nonzero_backward(count, n, exploring)) for count, n in zip(counts, numbers)]
        if not zeros:
            raise ValueError(
                f"density='nonzero' takes the zeros of a pruned model, but the {len(sizes)} layers to be made sparse "
                "hold none. Load the pruned weights first, or give a number as density."
            )
        return sizes

    def _part_name(self, name: str, part: int) -> str:
        count = len(self.parts[name])
        if self.experts[name] > 1:
            return f"expert {part // count} of '{name}'"
        return f"layer '{name}'" + (" has a part that" if count > 1 else "")

    def _nonzero_backward(self, count: int, numel: int, exploring: bool) -> int:
        if not exploring:
            return count
        if self.config.backward_density is None:
            return int(min(numel, self.method.backward_ratio * count))
        return max(count, set_size(numel, self.config.backward_density))


def _is_to_stay(view: LayerView) -> bool:
    """Whether a part keeps its sets: an expert that no token came to, where gradients say what grows."""
    if view.gradients is None or view.gradients.seen():
        return False
    return set_sizes(view.active, view.backward)[:2] == (view.size, view.backward_size)
