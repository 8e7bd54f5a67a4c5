"""The clustering methods, their reduction alone, on our ops and in plain PyTorch (C11).

python -m benchmarks.clusters        one thread, DeiT-S, B = 8, P = 196, keep rate .7
"""

from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from tokred_kernels.cli.timing import interleave, keep_freed_memory
from tokred_kernels.methods._clusters import to_assign
from tokred_kernels.methods.dpcknn import DPCKNN
from tokred_kernels.methods.kmedoids import UPDATES, KMedoids
from tokred_kernels.models.baseline_clusters import eager_dpcknn, eager_kmedoids

PREFIX = 1


@dataclass(frozen=True)
class Inputs:
    """What enters a stage: tokens x [B, N, C], what each is worth [B, N], the patches to keep, the learned score."""

    x: Tensor
    weight: Tensor
    k: int
    score: nn.Module


def inputs(B: int = 8, P: int = 196, C: int = 384, k: int = 137, device: str = "cpu") -> Inputs:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(B, PREFIX + P, C, generator=g).to(device)
    weight = torch.randn(B, PREFIX + P, generator=g).softmax(1).to(device)
    torch.manual_seed(0)
    return Inputs(x, weight, k, nn.Linear(C, 1).to(device))


def kmedoids(i: Inputs, method: KMedoids) -> tuple[Tensor, Tensor]:
    """What `KMedoids.step` does behind its block."""
    centres, label = method.cluster(i.x[:, PREFIX:], i.weight[:, PREFIX:], i.k)
    return torch.ops.tokred.unmerge(i.x, to_assign(centres, PREFIX)), label


def dpcknn(i: Inputs, method: DPCKNN) -> tuple[Tensor, Tensor]:
    """What `DPCKNN` does before its block."""
    block = SimpleNamespace(tokred_prefix=PREFIX, tokred_part={"score": i.score})
    out, _, assign = method.reduce(block, i.x, None, i.k)
    return out, assign[:, PREFIX:] - PREFIX


def plain_kmedoids(i: Inputs, update: str, at_once: bool) -> tuple[Tensor, Tensor]:
    return eager_kmedoids(i.x, i.weight, i.k, PREFIX, update=update, at_once=at_once)


# (goal, case): (ours, in plain PyTorch)
METHODS = {
    (goal, update): (
        partial(kmedoids, method=KMedoids(keep_rate=0.7, update=update)),
        partial(plain_kmedoids, update=update, at_once=at_once),
    )
    for goal, at_once in (("C11 kmedoids", False), ("C11 at once", True))
    for update in UPDATES
}
METHODS["C11 dpcknn", "learned"] = (
    partial(dpcknn, method=DPCKNN(keep_rate=0.7)),
    lambda i: eager_dpcknn(i.x, i.k, PREFIX, score=i.score),
)


def check(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    """Raises AssertionError unless both put at least 99 % of the patches into the same clusters and give those whose
    members agree the same rows: torch.cdist is not exact, and a near-tie may fall either way."""
    (rows, label), (want_rows, want_label) = got, want
    assert rows.shape == want_rows.shape and label.shape == want_label.shape, "not the same number of clusters"
    same = label == want_label
    assert same.float().mean() >= 0.99, f"only {same.float().mean():.1%} of the patches in the same cluster"
    front = torch.ones(len(label), PREFIX, dtype=torch.bool, device=label.device)
    moved = torch.zeros(rows.shape[:2], dtype=torch.int32, device=label.device)
    for side in (label, want_label):
        moved[:, PREFIX:].scatter_add_(1, side.long(), (~same).int())
    settled = torch.cat([front, moved[:, PREFIX:] == 0], 1)
    torch.testing.assert_close(rows[settled], want_rows[settled], rtol=1e-4, atol=1e-5)


def cluster_figures(rounds: int) -> dict[str, dict[str, float]]:
    """C11: how many times faster the reduction is."""
    given = inputs()
    figures = {goal: {} for goal, _ in METHODS}
    for (goal, case), (ours, plain) in METHODS.items():
        check(ours(given), plain(given))
        seconds = interleave({"ours": lambda: ours(given), "plain": lambda: plain(given)}, rounds=rounds)  # noqa: B023
        figures[goal][case] = seconds["plain"].over(seconds["ours"])
    return figures


if __name__ == "__main__":
    torch.set_num_threads(1)
    keep_freed_memory()
    with torch.inference_mode():
        for goal, figure in cluster_figures(15).items():
            print(goal, ", ".join(f"{case} {value:.3g}x" for case, value in figure.items()))
