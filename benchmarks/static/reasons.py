"""Why a launch, a step or a method misses a goal of rows.py, for those that do."""

import re

from .rows import LaunchRow, StepRow

# By kernel: why less than half of the warps.
OCCUPANCY = {
    "match_kernel|edge_kernel|edges_kernel|back_kernel": "bound by products: their sums fill the registers",
    "attention|column": "logits and sums fill the registers; over 64 KB of keys and values an SM are in flight",
    "cls_kernel": "four keys a thread in flight, 32 KB an SM: what the bandwidth needs",
    "merge_kernel|gather_kernel": "a warp a block: 32 are the most, 50 %; each has four rows in flight",
    "add_": "the sums of two tokens fill the registers; 36 KB of them an SM are in flight, the bandwidth needs 24",
    "gather_norm_kernel": "16 loads of the fused row fill the registers; 15 KB an SM in flight, the bandwidth needs 24",
    "rows_kernel|queries_kernel|keys_kernel": "bound by products: logits and sums of gradients fill the registers",
    "pairwise_distance_kernel": "bound by arithmetic: 32 x 32 sums fill the registers",
    "rank_kernel|follow_kernel|assign_kernel|order_kernel": "bound by comparisons of what is in the caches",
    "topk_kernel": "a block an image, bound by its barriers",
    "separation_kernel|knn_kernel|nearest_kernel|cost_kernel|medoids_kernel": "a tile of distances is in registers",
}
# By backend, op and form: why more than two launches, or more than 1.3 times the floor.
STEPS = {
    "cuda match": "several blocks an image: the selection waits for all of their edges, and what follows waits for it",
    "triton match": "unit rows, edges and selection wait for each other; the rows, three bfloat16, pass through L2",
    "triton attention cls": "streamed: the row of the class token by itself, then the heads; keys once more",
    "triton attention mean": "streamed: p is known when its row is done, so q and k once more, then the heads",
    "triton attention_scores": "sums of the rows, columns, heads: keys are read for the first two",
    "triton attention_backward": "dq by queries, dk and dv by keys, neither by atomics: q, k, v and grad_out twice",
    "triton pairwise_distance": "x is copied to [B, C, N] in float32",
}
# By method: why more than two kernels.
_SCORED = "attention adds its heads, topk ranks, gather moves: one wait each"
_TORCH = "torch's own ops, in blocks that reduce alone"
METHODS = {
    "tome": "match by Triton: see its step",
    **dict.fromkeys(("topk", "evit", "metr"), _SCORED),
    "mctf": "a score of three criteria and its own attention, one step ahead",
    "dynamicvit": "its predictor is three layers",
    "kmedoids": "three rounds of assignment and update",
    **dict.fromkeys(("dpcknn", "sit", "patchmerger", "sinkhorn", "ats", "radial"), _TORCH),
}


def of_launch(row: LaunchRow) -> str:
    return _first(OCCUPANCY, row.kernel) if row.misses() else ""


def of_step(backend: str, row: StepRow) -> str:
    return _first(STEPS, f"{backend} {row.op} {row.form}") if row.misses() else ""


def of_method(row) -> str:
    return METHODS.get(row.method, "") if row.misses() else ""


def _first(reasons: dict[str, str], name: str) -> str:
    return next((text for pattern, text in reasons.items() if re.match(pattern, name)), "")
