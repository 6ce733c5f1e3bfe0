"""What is sparse, and what it saves, as a table: `sparsity_report`."""

from torch import nn

from .method import Method
from .surgery import SparsityCounts, count_sparsity


class SparsityReport(SparsityCounts):
    """
    Densities and bytes of a model, per sparse layer and in total, as [`SparsityCounts`] says; `print` shows a table.
    """

    def __str__(self) -> str:
        header = f"{'layer':<44} {'shape':>19} {'weights':>12} {'density':>8} {'backward':>8} {'MiB':>9} {'dense':>9}"
        lines = [header, "-" * len(header)]
        for row in self.rows:
            lines.append(
                f"{row.name:<44} {row.shape_text:>19} {row.weights:>12,} {row.density:>8.4f} "
                f"{row.backward_density:>8.4f} {_mib(row.trainable_state_bytes)} {_mib(row.dense_state_bytes)}"
            )
        weights = sum(row.weights for row in self.rows)
        lines += [
            "-" * len(header),
            f"{'sparse layers':<44} {'':>19} {weights:>12,} {self.density:>8.4f} {self.backward_density:>8.4f} "
            f"{_mib(sum(row.trainable_state_bytes for row in self.rows))} "
            f"{_mib(sum(row.dense_state_bytes for row in self.rows))}",
            f"{'whole model':<44} {'':>19} {self.total_parameters:>12,} {'':>8} {'':>8} "
            f"{_mib(self.trainable_state_bytes)} {_mib(self.dense_state_bytes)}",
            "MiB: parameters, gradients and two Adam moments, and for sparse layers indices and reservoir.",
            *(f"method {name} also needs {needs}" for name, needs in self.needs.items() if needs != Method.needs),
        ]
        return "\n".join(lines)


def sparsity_report(model: nn.Module) -> SparsityReport:
    """
    Counts what is sparse in a model and how many bytes its training state takes.

    A dense model gives a report without rows, with densities of 1.

    Args:
        model (`torch.nn.Module`): any model.

    Returns:
        [`SparsityReport`]: prints as a table; `.to_dict()` for JSON.
    """
    return SparsityReport(**vars(count_sparsity(model)))


def _mib(count: int) -> str:
    return f"{count / 2**20:>9.2f}"
