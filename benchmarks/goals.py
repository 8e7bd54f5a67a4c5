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
    Goal("C6 in place", "match within a ToMe model, share of the forward", 1, 0.4, "%", lower_is_better=True),
    Goal("C7", "RE_sdpa end to end", 1.0, 1.06, ""),
    Goal("C7 sdpa", "RE_sdpa with torch's attention, log size as a key mask", 0.96, 1.0, ""),
    Goal("C8", "RE_self end to end", 0.95, 1.0, ""),
    Goal("C9", "throughput against the model on reference.py, explicit attention", 1.1, 1.25),
    Goal("C9 plain", "throughput against the method in plain PyTorch, explicit attention", 1.1, 1.25),
    Goal("C10 ops", "dispatched ops a reduction step adds to a block", 2, 2, "", lower_is_better=True),
    Goal("C10 bytes", "bytes allocated / (outputs + 64 B N)", 1, 1, "", lower_is_better=True),
    Goal("C10 bitwise", "equal over runs and thread counts (1 = yes)", 1, 1, ""),
    Goal("C11 kmedoids", "K-Medoids' reduction, B=8, keep rate .7, against its published loop", 20, 40),
    Goal("C11 at once", "the same, its clusters at once in a matrix product", 3, 4),
    Goal("C11 dpcknn", "DPC-KNN's reduction, B=8, keep rate .7, against plain PyTorch", 3, 4),
    Goal("C12", "RE of a training step, forward and backward, B=8", 0.90, 0.96, ""),
    Goal("C12 plain", "that step against PyTorch, explicit attention; MCTF's against the reference", 1.0, 1.1),
    Goal("C12 memory", "its peak memory over the oracle's", 1.05, 1.02, "", lower_is_better=True),
    Goal("C12 saved", "N x N tensors that it keeps for the backward", 0, 0, "", lower_is_better=True),
)
# bf16, inference, CUDA graph, the best of torch's attention kernels in every baseline; H = 6, D = 64.
GPU = (
    Goal("G1", "attention with sizes and scores against SDPA without, N to 197", 0.85, 1.0),
    Goal("G1 N=577", "the same, longer", 0.75, 1.0),
    Goal("G2", "the same against SDPA with key mask", 1.1, 1.5),
    Goal("G3 cls", "what emitting the class token's row costs, N to 256", 3, 1, "%", lower_is_better=True),
    Goal("G3 mean", "what emitting the column mean costs, N to 256", 10, 5, "%", lower_is_better=True),
    Goal("G4", "match against the eager chain, B=256", 5, 8),
    Goal("G5", "merge, share of measured copy bandwidth", 65, 80, "%"),
    Goal("G6", "add + merge + LayerNorm, time of compiled add + LayerNorm on all tokens", 1.15, 1.0, "x", True),
    Goal("G7 eager", "a step against the eager step", 3.5, 6),
    Goal("G7 compiled", "a step against torch.compile of that step", 1.8, 3),
    Goal("G8 DeiT-S B=256", "RE_sdpa end to end, ToMe r=13", 0.92, 0.98, ""),
    Goal("G8 DeiT-S B=64", "RE_sdpa end to end, ToMe r=13", 0.90, 0.96, ""),
    Goal("G8 DeiT-B B=256", "RE_sdpa end to end, ToMe r=13", 0.95, 0.99, ""),
    Goal("G8 ViT-L B=64", "RE_sdpa end to end, ToMe r=8", 0.96, 0.99, ""),
    Goal("G9 DeiT-S r=13", "speed-up over the best dense model, compiled or not", 1.56, 1.66),
    Goal("G9 DeiT-S r=16", "the same", 1.82, 1.96),
    Goal("G9 ViT-L r=8", "the same", 1.88, 1.96),
    Goal("G9 DeiT-S EViT .7", "the same", 1.42, 1.48),
    Goal("G10 explicit", "throughput against ToMe with explicit attention", 1.35, 1.6),
    Goal("G10 sdpa", "throughput against ToMe with SDPA + mask, eager step", 1.12, 1.2),
    Goal("G10 compiled", "throughput against both of these, compiled", 1.05, 1.1),
    Goal("G11", "latency over the oracle, B = 1 and 8", 1.30, 1.15, "x", lower_is_better=True),
    Goal("G12", "RE of a training step, forward and backward, B=256", 0.88, 0.94, ""),
    Goal("G12 memory", "its peak memory over the oracle's", 1.05, 1.02, "", lower_is_better=True),
    Goal("G13 kernels", "kernels that a reducing block adds", 2, 1, "", lower_is_better=True),
    Goal("G13 host", "copies from the host; waiting for the device is an error", 0, 0, "", lower_is_better=True),
    Goal("G13 replay", "a captured model replays bit-equal (1 = yes)", 1, 1, ""),
    Goal("G13 graphs", "graphs of the whole model, mode reduce-overhead", 1, 1, "", lower_is_better=True),
    Goal("G13 matrices", "tensors of tokens times tokens", 0, 0, "", lower_is_better=True),
    Goal("G14", "MCTF one step ahead, time over that by the attention at hand", 5, 5, "%", lower_is_better=True),
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
