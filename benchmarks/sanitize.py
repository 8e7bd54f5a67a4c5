"""Runs every CUDA kernel on the small cases of the tests' table, for compute-sanitizer to watch.

    compute-sanitizer --tool racecheck python -m benchmarks.sanitize

Inputs are made on the CPU and results compared there, so that next to nothing but our kernels runs under the tool.
"""

import torch

import tokred_kernels as tokred
from tests.cases import MATCH_CASES, MERGE_CASES
from tokred_kernels import reference


def main() -> int:
    with tokred.use_backend("cuda"), torch.no_grad():
        for case in MATCH_CASES:
            if case.small and not case.weighted:
                _match_merge(case)
        for case in MERGE_CASES:
            if case.small:
                _merge(case)
    torch.cuda.synchronize()
    return 0


def _match_merge(case) -> None:
    x, metric, size = case.x(), case.metric(), case.size()
    out, size_out, assign = tokred.match_merge(x.cuda(), metric.cuda(), case.r, case.p, size.cuda())
    _same(case.id, (out, size_out), reference.merge(x, assign.cpu(), out.shape[1], size))


def _merge(case) -> None:
    x, assign = case.x(), case.assign()
    size, weight = case.per_token("size"), case.per_token("weight")
    on_gpu = [None if t is None else t.cuda() for t in (size, weight)]
    for reduce in ("mean", "sum", "amax"):
        got = tokred.merge(x.cuda(), assign.cuda(), case.M, *on_gpu, reduce=reduce)
        _same(case.id, got, reference.merge(x, assign, case.M, size, weight, reduce=reduce))
    y = case.y()
    _same(case.id, (tokred.unmerge(y.cuda(), assign.cuda()),), (reference.unmerge(y, assign),))


def _same(case: str, got: tuple, want: tuple) -> None:
    """Loose: the tests are strict, this one looks for what a wild access leaves behind."""
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=2e-2, atol=2e-2, equal_nan=True, msg=lambda m: f"{case}: {m}")


if __name__ == "__main__":
    raise SystemExit(main())
