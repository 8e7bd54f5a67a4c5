"""Runs every GPU kernel on small cases of the tests' tables, for compute-sanitizer to watch.

    compute-sanitizer --tool racecheck python -m benchmarks.sanitize

Inputs are made on the CPU and results compared there with the reference, so that next to nothing but our kernels runs
under the tool.
"""

import sys
from collections.abc import Iterator

import torch
from torch import Tensor

import tokred_kernels as tokred

from . import results

sys.path.insert(0, str(results.ROOT / "tests"))  # the tables of cases

from attention_cases import ATTENTION_CASES
from cases import MATCH_CASES, MERGE_CASES, TWO_WAY_CASES
from cluster_cases import CLUSTER_CASES
from norm_oracle import affine, branch_of
from topk_cases import TOPK_CASES


def steps() -> Iterator[tuple[str, str, tuple, dict]]:
    """(op, case, arguments, keyword arguments), on the CPU."""
    for case in [*MATCH_CASES, *TWO_WAY_CASES]:
        if _usual(case) and not case.weighted:
            yield "match", case.id, (case.metric(), case.r, case.p), case.keywords
            if not case.two_way:
                yield "match_merge", case.id, (case.x(), case.metric(), case.r, case.p, case.size()), {}
    for case in filter(_usual, MERGE_CASES):
        x, assign, size = case.x(), case.assign(), case.per_token("size")
        for reduce in ("mean", "sum", "amax"):
            yield "merge", case.id, (x, assign, case.M, size, case.per_token("weight")), {"reduce": reduce}
        yield "unmerge", case.id, (case.y(), assign), {}
        yield "add_merge_norm", case.id, (x, branch_of(x), assign, case.M, *affine(case.C), size), {}
    for case in filter(_usual, TOPK_CASES):
        x, score = case.x(), case.score()
        yield "topk", case.id, (score, case.k, case.p), {"fuse": True}
        for fuse in ("none", "sum"):
            yield "topk_gather", case.id, (x, score, case.k, case.p), {"fuse": fuse}
            args = (x, branch_of(x), score, case.k, *affine(case.C), case.p)
            yield "add_topk_gather_norm", case.id, args, {"fuse": fuse}
    for case in filter(_usual, ATTENTION_CASES):
        q, k, v = case.qkv()
        size, grads = case.size(), case.grads()
        yield "attention", case.id, (q, k, v, size), case.keywords
        if case.scores != "none":
            yield "attention_scores", case.id, (q, k, size), case.keywords
        out, _ = tokred.reference.attention(q, k, v, size, **case.keywords)
        grad_scores = None if case.scores == "none" else grads[1]
        yield "attention_backward", case.id, (grads[0], grad_scores, q, k, v, out, size), case.keywords
    for case in filter(_usual, CLUSTER_CASES):
        distance, centres = case.distance(), case.centres()
        yield "pairwise_distance", case.id, (case.x(),), {}
        yield "knn", case.id, (distance, case.k), {}
        yield "separation", case.id, (distance, case.density()), {}
        yield "nearest", case.id, (distance, centres), {}
        yield "medoids", case.id, (distance, case.label(), centres, case.weight()), {}


def run(device: str = "cuda", backends: tuple[str, ...] = ("cuda", "triton"), ops: tuple[str, ...] = ()) -> set[str]:
    """The ops that ran and were right; of `ops` if given. A backend that is not there is left out, with the reason."""
    done = set()
    for backend in backends:
        try:
            chosen = tokred.use_backend(backend)
            chosen.__enter__()
        except RuntimeError as error:
            print(error, flush=True)
            continue
        try:
            for op, case, args, kwargs in steps():
                if not ops or op in ops:
                    _check(op, f"{backend} {op} {case}", args, kwargs, device)
                    done.add(op)
        finally:
            chosen.__exit__(None, None, None)
    return done


def _usual(case) -> bool:
    """Small, and of values that leave one answer; race and bounds do not depend on them."""
    return case.small and case.trap in ("random", "normal") and case.layout in ("contiguous", "fused")


def _check(op: str, what: str, args: tuple, kwargs: dict, device: str) -> None:
    """Loose: the tests are strict, this looks for what a wild access leaves behind."""
    there = [a.to(device) if isinstance(a, Tensor) else a for a in args]
    got = getattr(torch.ops.tokred, op)(*there, **kwargs)
    want = getattr(tokred.reference, op)(*args, **kwargs)
    for a, b in zip(*(t if isinstance(t, tuple) else (t,) for t in (got, want)), strict=True):
        torch.testing.assert_close(
            a.cpu(), b, rtol=2e-2, atol=2e-2, equal_nan=True, check_stride=False, msg=lambda m: f"{what}: {m}"
        )


def main() -> int:
    with torch.no_grad():
        done = run()
    torch.cuda.synchronize()
    print(f"{len(done)} ops: {', '.join(sorted(done))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
