"""Random cases of every op against the float64 oracle: `make fuzz`, or `python -m tests.fuzz --cases 100000 --seed 1`.

Each case is a MatchCase, a MergeCase, a TopkCase, an AttentionCase or a ClusterCase with random fields, run by one of
the CPU's instruction sets; a failure prints its recipe.
"""

import argparse
import random
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

import attention_oracle
import cluster_oracle
import topk_oracle
from attention_cases import ATTENTION_CASES, DIFFERENTIABLE, SIZES, AttentionCase
from cases import ISAS, MATCH_CASES, MERGE_CASES, MatchCase, MergeCase
from cluster_cases import TRAPS as CLUSTER_TRAPS
from cluster_cases import UPDATES, ClusterCase
from norm_oracle import EPS, affine, branch_of, check_norm, check_steps
from oracle import check_assign, check_merge
from topk_cases import FUSE, TRAPS, TopkCase

import tokred_kernels as tokred

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MATCH_TRAPS = sorted({c.trap for c in MATCH_CASES})
MERGE_FIELDS = {name: sorted({getattr(c, name) for c in MERGE_CASES}) for name in ("kind", "size", "weight", "trap")}
ATTENTION_TRAPS = sorted({c.trap for c in ATTENTION_CASES})


def random_match(rng: random.Random, seed: int) -> MatchCase:
    p = rng.choice((0, 0, 1, 1, 1, 2, 5))
    N = p + rng.choice((0, 1, 2, 3, rng.randint(4, 40), rng.randint(4, 40), rng.randint(40, 90)))
    weighted = rng.random() < 0.25
    return MatchCase(
        B=rng.randint(1, 3),
        N=N,
        C=rng.choice((1, 3, 8, 17, 40)),
        H=rng.randint(0, 4),
        D=rng.choice((1, 2, 5, 8, 16, 17, 31, 64)),
        r=rng.choice((0, 1, N // 4, N // 2, N, rng.randint(-2, N + 2))),
        p=p,
        dtype=rng.choice(DTYPES),
        trap=rng.choice(["random", "alike", *MATCH_TRAPS]),
        layout=rng.choice(("contiguous", "contiguous", "sliced", "inner")),
        weighted=weighted,
        power=rng.choice((1.0, 2.0)) if weighted else 1.0,
        two_way=rng.random() < 0.4,
        seed=seed,
    )


def random_merge(rng: random.Random, seed: int) -> MergeCase:
    N = rng.choice((0, 1, 2, rng.randint(3, 40), rng.randint(3, 90)))
    kind = rng.choice(MERGE_FIELDS["kind"])
    return MergeCase(
        B=rng.randint(1, 3),
        N=N,
        M=N if kind == "identity" else rng.choice((1, 2, N // 2 + 1, N + 3)),
        C=rng.choice((1, 3, 8, 17, 64, 100)),
        dtype=rng.choice(DTYPES),
        kind=kind,
        seed=seed,
        layout=rng.choice(("contiguous", "contiguous", "sliced", "inner", "expanded")),
        **{name: rng.choice(MERGE_FIELDS[name]) for name in ("size", "weight", "trap")},
    )


def random_topk(rng: random.Random, seed: int) -> TopkCase:
    p = rng.choice((0, 0, 1, 1, 2, 5))
    P = rng.choice((0, 1, 2, 3, rng.randint(4, 40), rng.randint(4, 140)))
    return TopkCase(
        B=rng.randint(1, 3),
        N=p + P,
        C=rng.choice((1, 3, 8, 17, 40, 100)),
        k=rng.choice((0, 1, P // 3, P // 2, max(P - 1, 0), P, P + 3, rng.randint(0, P + 1))),
        p=p,
        dtype=rng.choice(DTYPES),
        score_dtype=rng.choice((torch.float32, *DTYPES)),
        trap=rng.choice(("random", *TRAPS)),
        layout=rng.choice(("contiguous", "contiguous", "sliced", "inner", "expanded")),
        seed=seed,
    )


def random_attention(rng: random.Random, seed: int) -> AttentionCase:
    N = rng.choice((1, 2, rng.randint(3, 40), rng.randint(3, 140)))
    size_kind = rng.choice(("none", *SIZES))
    traps = [t for t in ATTENTION_TRAPS if t != "garbage" or size_kind != "none"]
    return AttentionCase(
        B=rng.randint(1, 3),
        H=rng.randint(1, 3),
        N=N,
        Nq=rng.choice((None, None, 1, rng.randint(0, 80))),
        D=8 * rng.randint(1, 16),
        dtype=rng.choice(DTYPES),
        size_kind=size_kind,
        scores=rng.choice(("none", "cls", "mean")),
        scale=rng.choice((None, None, 1.0, -0.1)),
        layout=rng.choice(("fused", "fused", "contiguous", "sliced", "inner", "expanded", "one-head")),
        trap=rng.choice(("normal", *traps)),
        seed=seed,
    )


def random_cluster(rng: random.Random, seed: int) -> ClusterCase:
    N = rng.choice((0, 1, 2, rng.randint(3, 40), rng.randint(3, 90)))
    return ClusterCase(
        B=rng.randint(1, 3),
        N=N,
        C=rng.choice((1, 3, 8, 17, 64, 100)),
        K=rng.choice((0, 1, N // 3, N, N + 2, rng.randint(0, 40))),
        k=rng.choice((0, 1, 5, N, N + 2, rng.randint(0, 20))),
        dtype=rng.choice(DTYPES),
        other=rng.choice((torch.float32, *DTYPES)),
        trap=rng.choice(("random", *CLUSTER_TRAPS)),
        layout=rng.choice(("contiguous", "contiguous", "sliced", "inner", "expanded", "transposed")),
        scale=rng.choice((1.0, 0.05)),
        seed=seed,
    )


def run_match(case: MatchCase) -> None:
    x, metric, size, weight = case.x(), case.metric(), case.size(), case.weight()
    assign = tokred.match(metric, case.r, case.p, weight, **case.keywords)
    check_assign(assign, metric, case.r, case.p, weight, **case.keywords)
    if case.two_way:
        return
    out, size_out, assign = tokred.match_merge(x, metric, case.r, case.p, size)
    check_assign(assign, metric, case.r, case.p)
    check_merge((out, size_out), x, assign, out.shape[1], size)


def run_merge(case: MergeCase, reduce: str) -> None:
    x, assign, size, weight = case.x(), case.assign(), case.per_token("size"), case.per_token("weight")
    check_merge(tokred.merge(x, assign, case.M, size, weight, reduce=reduce), x, assign, case.M, size, weight, reduce)
    branch, norm = branch_of(x), affine(case.C)
    *got, normed = tokred.add_merge_norm(x, branch, assign, case.M, *norm, size, eps=EPS)
    check_steps(got, tokred.merge(x + branch, assign, case.M, size))
    check_norm(normed, got[0], *norm)


def run_topk(case: TopkCase) -> None:
    x, score = case.x(), case.score()
    topk_oracle.check_assign(tokred.topk(score, case.k, case.p, True), score, case.k, case.p, True)
    for fuse in FUSE:
        got = tokred.topk_gather(x, score, case.k, case.p, fuse=fuse)
        topk_oracle.check_gather(got, x, score, case.k, case.p, fuse)
    branch, norm = branch_of(x), affine(case.C)
    *got, normed = tokred.add_topk_gather_norm(x, branch, score, case.k, *norm, case.p, fuse=fuse, eps=EPS)
    check_steps(got, tokred.topk_gather(x + branch, score, case.k, case.p, fuse=fuse))
    check_norm(normed, got[0], *norm)


def run_attention(case: AttentionCase) -> None:
    q, k, v, size = *case.qkv(), case.size()
    out, scores = tokred.attention(q, k, v, size, **case.keywords)
    attention_oracle.check(case, out, scores)
    if case.scores != "none":
        attention_oracle.check_scores(tokred.attention_scores(q, k, size, **case.keywords), case)
    if case.trap in DIFFERENTIABLE:
        grads = torch.ops.tokred.attention_backward(*case.grads(), q, k, v, out, size, **case.keywords)
        attention_oracle.check_gradients(case, grads)


def run_cluster(case: ClusterCase) -> None:
    x, d, centres, label, weight = case.x(), case.distance(), case.centres(), case.label(), case.weight()
    cluster_oracle.check_pairwise(tokred.pairwise_distance(x, scale=case.scale), x, case.scale)
    cluster_oracle.check_knn(tokred.knn(d, case.k), d, case.k)
    cluster_oracle.check_separation(tokred.separation(d, case.density()), d, case.density())
    for pin in (False, True):
        cluster_oracle.check_nearest(tokred.nearest(d, centres, pin=pin), d, centres, pin)
    for update in UPDATES:
        got = tokred.medoids(d, label, centres, weight, update=update)
        cluster_oracle.check_medoids(got, d, label, centres, weight, update)


RUN = {random_match: run_match, random_topk: run_topk, random_attention: run_attention, random_cluster: run_cluster}


def available_isas() -> list[str]:
    found = []
    for isa in ISAS:
        try:
            with tokred.use_backend("cpu", isa=isa):
                found.append(isa)
        except RuntimeError:
            continue
    return found


def fuzz(cases: int, seed: int, report_every: int = 10_000) -> None:
    rng, isas = random.Random(seed), available_isas()
    for n in range(cases):
        isa = isas[n % len(isas)]
        reduce = rng.choice(("mean", "sum", "amax"))
        (make,) = rng.choices(
            (random_match, random_merge, random_topk, random_attention, random_cluster), (4, 4, 2, 2, 1)
        )
        case = make(rng, seed * 1_000_003 + n)
        try:
            with tokred.use_backend("cpu", isa=isa):
                if make is random_merge:
                    run_merge(case, reduce)
                else:
                    RUN[make](case)
        except BaseException:
            print(f"case {n} of seed {seed} fails on {isa}, reduce={reduce}: {case!r}", file=sys.stderr)
            raise
        if report_every and (n + 1) % report_every == 0:
            print(f"{n + 1} cases, no difference", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    fuzz(arguments.cases, arguments.seed)
