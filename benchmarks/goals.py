"""The goals that are measured here, and the verdict on a figure.

A figure is {case: value}, such as {"B=1": 7.3, "B=8": 5.9}; every case has to reach the gate for the work to count as
done, and the target is what we want.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Goal:
    id: str
    what: str
    gate: float
    target: float
    unit: str = "x"
    lower_is_better: bool = False

    def verdict(self, figure: dict[str, float] | None) -> str:
        """ "target", "gate", "FAIL", or "not measured"."""
        if not figure:
            return "not measured"
        if all(self._reaches(value, self.target) for value in figure.values()):
            return "target"
        return "gate" if all(self._reaches(value, self.gate) for value in figure.values()) else "FAIL"

    def _reaches(self, value: float, bound: float) -> bool:
        return value <= bound if self.lower_is_better else value >= bound


# fp32, one thread, DeiT-S, N = 197, ToMe r = 13, EViT keep rate .7.
CPU = (
    Goal("C1", "match_merge against the eager PyTorch step", 4, 8),
    Goal("C2", "match_merge against torch.compile of that step", 1.5, 3),
    Goal("C3", "topk_gather with fuse against the eager PyTorch step", 3, 6),
    Goal("C4 AVX-512", "attention with sizes and scores against SDPA with key mask", 1.8, 2.8),
    # MKL runs AVX-512 code there, on other makers' processors AVX2's.
    Goal("C4 AVX-512 on Intel", "the same where torch's MKL uses AVX-512 too", 1.0, 2.8),
    Goal("C4 AVX2", "the same with AVX2, torch held to it", 1.2, 1.5),
    Goal("C4 bfloat16", "attention of bfloat16 against torch SDPA, with and without mask", 1.0, 1.5),
    Goal("C5", "attention that emits scores against one that does not", 6, 3, "%", lower_is_better=True),
    Goal("C6", "match_merge, share of one dense block", 1, 0.4, "%", lower_is_better=True),
    Goal("C7", "RE_sdpa end to end", 1.0, 1.06, ""),
    Goal("C7 sdpa", "RE_sdpa with torch's attention, log size as a key mask", 0.96, 1.0, ""),
    Goal("C8", "RE_self end to end", 0.95, 1.0, ""),
    Goal("C9", "throughput against the method with explicit attention", 1.1, 1.25),
    Goal("C10 ops", "dispatched ops a reduction step adds to a block", 2, 2, "", lower_is_better=True),
    Goal("C10 bytes", "bytes allocated / (outputs + 64 B N)", 1, 1, "", lower_is_better=True),
    Goal("C10 bitwise", "equal over runs and thread counts (1 = yes)", 1, 1, ""),
    Goal("C11 kmedoids", "K-Medoids' reduction, B=8, keep rate .7, against its published loop", 20, 40),
    Goal("C11 at once", "the same, its clusters at once in a matrix product", 3, 4),
    Goal("C11 dpcknn", "DPC-KNN's reduction, B=8, keep rate .7, against plain PyTorch", 3, 4),
    Goal("C12", "RE of a training step, forward and backward, B=8", 0.90, 0.96, ""),
    Goal("C12 memory", "its peak memory over the oracle's", 1.05, 1.02, "", lower_is_better=True),
    Goal("C12 saved", "N x N tensors that it keeps for the backward", 0, 0, "", lower_is_better=True),
)
# bf16, inference, CUDA graph, DeiT-S r = 13 unless the case says otherwise.
GPU = (
    Goal("G4", "match against the eager chain, B=256", 5, 8),
    Goal("G5", "merge, share of measured copy bandwidth", 65, 80, "%"),
    Goal("G7 eager", "match_merge against the eager step", 3.5, 6),
    Goal("G7 compiled", "match_merge against torch.compile of that step", 1.8, 3),
    Goal("G8 DeiT-S B=256", "RE_sdpa end to end", 0.92, 0.98, ""),
    Goal("G8 DeiT-S B=64", "RE_sdpa end to end", 0.90, 0.96, ""),
    Goal("G9", "speed-up over the best compiled dense model, B=256", 1.56, 1.66),
    Goal("G10 explicit", "throughput against ToMe with explicit attention", 1.35, 1.6),
    Goal("G10 sdpa", "throughput against ToMe with SDPA + mask, eager step", 1.12, 1.2),
    Goal("G10 compiled", "throughput against both of these, compiled", 1.05, 1.1),
    Goal("G11", "latency over the oracle, B = 1 and 8", 1.30, 1.15, "x", lower_is_better=True),
    Goal("G13 kernels", "kernels a reduction step adds to a block", 2, 1, "", lower_is_better=True),
    Goal("G13 replay", "no sync, no copy from the host, replay bit-equal (1 = yes)", 1, 1, ""),
)


def lines(goals: tuple[Goal, ...], figures: dict[str, dict[str, float]]) -> list[str]:
    """The report: one line a goal, with its figure, gate, target and verdict."""
    rows = [("goal", "what", "measured", "gate", "target", "verdict")]
    for goal in goals:
        figure = figures.get(goal.id)
        measured = ", ".join(f"{case} {value:.3g}{goal.unit}" for case, value in (figure or {}).items())
        bounds = [
            f"{'<=' if goal.lower_is_better else '>='} {bound:g}{goal.unit}" for bound in (goal.gate, goal.target)
        ]
        rows.append((goal.id, goal.what, measured or "not measured", *bounds, goal.verdict(figure)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
