"""Bad input: one error, before any work, that names op, argument, expected and got; the same from every backend."""

import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import tokred_kernels as tokred

X, K = torch.randn(2, 7, 4), torch.randn(2, 3, 7, 8)
A = torch.zeros(2, 7, dtype=torch.int32)
S = torch.ones(2, 7)
Q = K[:, :, :5]
BACK = torch.ops.tokred.attention_backward

# call, what the message must contain
BAD = {
    "match-rank": (lambda: tokred.match(X[0], 1), r"match: metric must be \[B, N, D\] or \[B, H, N, D\], got \[7, 4\]"),
    "match-dtype": (lambda: tokred.match(X.long(), 1), r"match: metric must be float32, .*, got int64"),
    "match-heads": (
        lambda: tokred.match(K[:, :0], 1),
        r"match: metric must be \[B, H, N, D\] with H > 0, got \[2, 0, 7, 8\]",
    ),
    "match-prefix": (lambda: tokred.match(X, 1, 8), r"match: prefix must be in \[0, N\] = \[0, 7\], got 8"),
    "match-prefix-negative": (lambda: tokred.match(X, 1, -1), r"match: prefix must be in \[0, N\] = \[0, 7\], got -1"),
    "match-weight-shape": (
        lambda: tokred.match(X, 1, 1, S[:, :6]),
        r"match: weight must be \[B, N\] = \[2, 7\], got \[2, 6\]",
    ),
    "match-weight-dtype": (lambda: tokred.match(X, 1, 1, S.int()), r"match: weight must be float32, .*, got int32"),
    "merge-rank": (lambda: tokred.merge(X[0], A, 3), r"merge: x must be \[B, N, C\], got \[7, 4\]"),
    "merge-dtype": (lambda: tokred.merge(X.int(), A, 3), r"merge: x must be float32, .*, got int32"),
    "merge-assign-dtype": (
        lambda: tokred.merge(X, A[:, :6].long(), 3),
        r"merge: assign must be int32 \[B, N\] = \[2, 7\], got int64 \[2, 6\]",
    ),
    "merge-assign-shape": (
        lambda: tokred.merge(X, A[:, :6], 3),
        r"merge: assign must be int32 \[B, N\] = \[2, 7\], got \[2, 6\]",
    ),
    "add_merge_norm-branch-dtype": (
        lambda: tokred.add_merge_norm(X, X.double(), A, 3, None, None),
        r"add_merge_norm: branch must be float32 as x, got float64",
    ),
    "add_merge_norm-branch-shape": (
        lambda: tokred.add_merge_norm(X, X[:, 1:], A, 3, None, None),
        r"add_merge_norm: branch must be \[B, N, C\] = \[2, 7, 4\], got \[2, 6, 4\]",
    ),
    "add_merge_norm-weight": (
        lambda: tokred.add_merge_norm(X, X, A, 3, X[0, 0, :3], None),
        r"add_merge_norm: norm_weight must be \[C\] = \[4\], got \[3\]",
    ),
    "add_merge_norm-bias": (
        lambda: tokred.add_merge_norm(X, X, A, 3, None, A[0, :4]),
        r"add_merge_norm: norm_bias must be float32, .*, got int32",
    ),
    "add_merge_norm-scale": (
        lambda: tokred.add_merge_norm(X, X, A, 3, None, None, None, X[0, 0, :3]),
        r"add_merge_norm: branch_scale must be \[C\] = \[4\], got \[3\]",
    ),
    "add_topk_gather_norm-branch-bias": (
        lambda: tokred.add_topk_gather_norm(X, X, S, 3, None, None, 1, None, A[0, :4]),
        r"add_topk_gather_norm: branch_bias must be float32, .*, got int32",
    ),
    "add_merge_norm-m": (
        lambda: tokred.add_merge_norm(X, X, A, -1, None, None),
        r"add_merge_norm: m must be at least 0, got -1",
    ),
    "add_topk_gather_norm-k": (
        lambda: tokred.add_topk_gather_norm(X, X, S, -1, None, None),
        r"add_topk_gather_norm: k must be at least 0, got -1",
    ),
    "add_topk_gather_norm-fuse": (
        lambda: tokred.add_topk_gather_norm(X, X, S, 3, None, None, fuse="all"),
        r'add_topk_gather_norm: fuse must be "none", "sum" or "mean", got "all"',
    ),
    "add_topk_gather_norm-prefix": (
        lambda: tokred.add_topk_gather_norm(X, X, S, 3, None, None, 8),
        r"add_topk_gather_norm: prefix must be in \[0, N\] = \[0, 7\], got 8",
    ),
    "add_topk_gather_norm-branch": (
        lambda: tokred.add_topk_gather_norm(X, X[:1], S, 3, None, None),
        r"add_topk_gather_norm: branch must be \[B, N, C\] = \[2, 7, 4\], got \[1, 7, 4\]",
    ),
    "merge-m": (lambda: tokred.merge(X, A, -1), r"merge: m must be at least 0, got -1"),
    "merge-size-dtype": (lambda: tokred.merge(X, A, 3, S.long()), r"merge: size must be float32, .*, got int64"),
    "merge-size-bool": (lambda: tokred.merge(X, A, 3, S.bool()), r"merge: size must be float32, .*, got bool"),
    "merge-size-shape": (
        lambda: tokred.merge(X, A, 3, S[..., None]),
        r"merge: size must be \[B, N\] = \[2, 7\], got \[2, 7, 1\]",
    ),
    "merge-weight-shape": (
        lambda: tokred.merge(X, A, 3, S, S[:1]),
        r"merge: weight must be \[B, N\] = \[2, 7\], got \[1, 7\]",
    ),
    "merge-reduce": (
        lambda: tokred.merge(X, A, 3, reduce="median"),
        r'merge: reduce must be "mean", "sum" or "amax", got "median"',
    ),
    "unmerge-rank": (lambda: tokred.unmerge(X[0], A), r"unmerge: y must be \[B, M, C\], got \[7, 4\]"),
    "unmerge-assign-rank": (lambda: tokred.unmerge(X, A[0]), r"unmerge: assign must be int32 \[B, N\], got \[7\]"),
    "unmerge-assign-batch": (
        lambda: tokred.unmerge(X, A[:1]),
        r"unmerge: assign must be int32 \[B, N\] = \[2, 7\], got \[1, 7\]",
    ),
    "unmerge-assign-dtype": (
        lambda: tokred.unmerge(X, A.float()),
        r"unmerge: assign must be int32 .* got float32 \[2, 7\]",
    ),
    "match_merge-metric-shape": (
        lambda: tokred.match_merge(X, K[:, :, :6], 1),
        r"match_merge: metric must be \[B, H, N, D\] = \[2, 3, 7, 8\], got \[2, 3, 6, 8\]",
    ),
    "match_merge-metric-3d": (
        lambda: tokred.match_merge(X, X[:1], 1),
        r"match_merge: metric must be \[B, N, D\] = \[2, 7, 4\], got \[1, 7, 4\]",
    ),
    "match_merge-x-rank": (
        lambda: tokred.match_merge(K, K, 1),
        r"match_merge: x must be \[B, N, C\], got \[2, 3, 7, 8\]",
    ),
    "match_merge-prefix": (
        lambda: tokred.match_merge(X, K, 1, 9),
        r"match_merge: prefix must be in \[0, N\] = \[0, 7\], got 9",
    ),
    "match_merge-size": (
        lambda: tokred.match_merge(X, K, 1, 1, S.int()),
        r"match_merge: size must be float32, .*, got int32",
    ),
    "topk-rank": (lambda: tokred.topk(X, 1), r"topk: score must be \[B, N\], got \[2, 7, 4\]"),
    "topk-dtype": (lambda: tokred.topk(A, 1), r"topk: score must be float32, .*, got int32"),
    "topk-k": (lambda: tokred.topk(S, -1), r"topk: k must be at least 0, got -1"),
    "topk-prefix": (lambda: tokred.topk(S, 1, 8), r"topk: prefix must be in \[0, N\] = \[0, 7\], got 8"),
    "topk-prefix-negative": (
        lambda: tokred.topk(S, 1, -1),
        r"topk: prefix must be in \[0, N\] = \[0, 7\], got -1",
    ),
    "topk_gather-rank": (
        lambda: tokred.topk_gather(S, S, 1),
        r"topk_gather: x must be \[B, N, C\], got \[2, 7\]",
    ),
    "topk_gather-dtype": (
        lambda: tokred.topk_gather(X.int(), S, 1),
        r"topk_gather: x must be float32, .*, got int32",
    ),
    "topk_gather-score-dtype": (
        lambda: tokred.topk_gather(X, S.bool(), 1),
        r"topk_gather: score must be float32, .*, got bool",
    ),
    "topk_gather-score-shape": (
        lambda: tokred.topk_gather(X, S[:, :6], 1),
        r"topk_gather: score must be \[B, N\] = \[2, 7\], got \[2, 6\]",
    ),
    "topk_gather-score-rank": (
        lambda: tokred.topk_gather(X, X, 1),
        r"topk_gather: score must be \[B, N\] = \[2, 7\], got \[2, 7, 4\]",
    ),
    "topk_gather-k": (lambda: tokred.topk_gather(X, S, -3), r"topk_gather: k must be at least 0, got -3"),
    "topk_gather-prefix": (
        lambda: tokred.topk_gather(X, S, 1, 9),
        r"topk_gather: prefix must be in \[0, N\] = \[0, 7\], got 9",
    ),
    "topk_gather-fuse": (
        lambda: tokred.topk_gather(X, S, 1, fuse="max"),
        r'topk_gather: fuse must be "none", "sum" or "mean", got "max"',
    ),
    "attention-dtype": (lambda: tokred.attention(Q.int(), K, K), r"attention: q must be float32, .*, got int32"),
    "attention-rank": (
        lambda: tokred.attention(Q[0], K, K),
        r"attention: q must be \[B, H, Nq, D\], got \[3, 5, 8\]",
    ),
    "attention-width": (
        lambda: tokred.attention(Q[..., :7], K[..., :7], K[..., :7]),
        r"attention: q must be \[B, H, Nq, D\] with H > 0 and D a multiple of 8 up to 128, got \[2, 3, 5, 7\]",
    ),
    "attention-wide": (
        lambda: tokred.attention(*[t.repeat(1, 1, 1, 17) for t in (Q, K, K)]),
        r"attention: q must be .* with H > 0 and D a multiple of 8 up to 128, got \[2, 3, 5, 136\]",
    ),
    "attention-heads": (
        lambda: tokred.attention(Q[:, :0], K[:, :0], K[:, :0]),
        r"attention: q must be .* with H > 0 and D a multiple of 8 up to 128, got \[2, 0, 5, 8\]",
    ),
    "attention-k-rank": (
        lambda: tokred.attention(Q, K[0], K),
        r"attention: k must be \[B, H, N, D\], got \[3, 7, 8\]",
    ),
    "attention-k-dtype": (
        lambda: tokred.attention(Q, K.half(), K),
        r"attention: k must be float32 as q, got float16",
    ),
    "attention-k-shape": (
        lambda: tokred.attention(Q, K[:, :2], K),
        r"attention: k must be \[B, H, N, D\] = \[2, 3, 7, 8\], got \[2, 2, 7, 8\]",
    ),
    "attention-v-dtype": (
        lambda: tokred.attention(Q.half(), K.half(), K),
        r"attention: v must be float16 as q, got float32",
    ),
    "attention-v-shape": (
        lambda: tokred.attention(Q, K, Q),
        r"attention: v must be \[B, H, N, D\] = \[2, 3, 7, 8\], got \[2, 3, 5, 8\]",
    ),
    "attention-v-rank": (
        lambda: tokred.attention(Q, K, K[0]),
        r"attention: v must be \[B, H, N, D\] = \[2, 3, 7, 8\], got \[3, 7, 8\]",
    ),
    "attention-size-shape": (
        lambda: tokred.attention(Q, K, K, S[:, :5]),
        r"attention: size must be \[B, N\] = \[2, 7\], got \[2, 5\]",
    ),
    "attention-size-dtype": (
        lambda: tokred.attention(Q, K, K, S.bool()),
        r"attention: size must be float32, .*, got bool",
    ),
    "attention-scores": (
        lambda: tokred.attention(Q, K, K, scores="max"),
        r'attention: scores must be "none", "cls" or "mean", got "max"',
    ),
    "attention_scores-none": (
        lambda: tokred.attention_scores(Q, K, scores="none"),
        r'attention_scores: scores must be "cls" or "mean", got "none"',
    ),
    "attention_scores-k-shape": (
        lambda: tokred.attention_scores(Q, K[:1]),
        r"attention_scores: k must be \[B, H, N, D\] = \[2, 3, 7, 8\], got \[1, 3, 7, 8\]",
    ),
    "attention_scores-size": (
        lambda: tokred.attention_scores(Q, K, S.long()),
        r"attention_scores: size must be float32, .*, got int64",
    ),
    "attention_backward-v-shape": (
        lambda: BACK(Q, None, Q, K, Q, Q),
        r"attention_backward: v must be \[B, H, N, D\] = \[2, 3, 7, 8\], got \[2, 3, 5, 8\]",
    ),
    "attention_backward-grad_out-shape": (
        lambda: BACK(K, None, Q, K, K, Q),
        r"attention_backward: grad_out must be \[B, H, N, D\] = \[2, 3, 5, 8\], got \[2, 3, 7, 8\]",
    ),
    "attention_backward-grad_out-dtype": (
        lambda: BACK(Q.double(), None, Q, K, K, Q),
        r"attention_backward: grad_out must be float32 as q, got float64",
    ),
    "attention_backward-out": (
        lambda: BACK(None, None, Q, K, K, K),
        r"attention_backward: out must be \[B, H, N, D\] = \[2, 3, 5, 8\], got \[2, 3, 7, 8\]",
    ),
    "attention_backward-grad_scores-shape": (
        lambda: BACK(None, S[:, :5], Q, K, K, Q, scores="cls"),
        r"attention_backward: grad_scores must be \[B, N\] = \[2, 7\], got \[2, 5\]",
    ),
    "attention_backward-grad_scores-none": (
        lambda: BACK(None, S, Q, K, K, Q),
        r"attention_backward: grad_scores must be \[B, N\] = \[2, 0\], got \[2, 7\]",
    ),
    "attention_backward-grad_scores-dtype": (
        lambda: BACK(None, S.int(), Q, K, K, Q, scores="mean"),
        r"attention_backward: grad_scores must be float32, .*, got int32",
    ),
    "attention_backward-scores": (
        lambda: BACK(Q, None, Q, K, K, Q, scores="row"),
        r'attention_backward: scores must be "none", "cls" or "mean", got "row"',
    ),
}


@pytest.mark.parametrize("where", ["cpu", "reference"])
@pytest.mark.parametrize("name", BAD)
def test_refused(name, where):
    call, message = BAD[name]
    with tokred.use_backend(where), pytest.raises(RuntimeError, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)


def test_fakes_refuse_the_same():
    """A fake says what the kernel would say, so that a compiled model fails at compile time."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        for call, message in BAD.values():
            with pytest.raises(RuntimeError, match=message):
                call()


@pytest.mark.parametrize(
    "bad, got",
    [
        (lambda: torch.randn(2, 7, 4).to_sparse(), "layout torch.sparse_coo"),
        (lambda: torch.quantize_per_tensor(torch.randn(2, 7, 4), 0.1, 0, torch.qint8), "a quantized tensor"),
    ],
    ids=["sparse", "quantized"],
)
def test_refuses_tensors_that_are_not_dense(bad, got):
    for op, argument, call in [
        ("match", "metric", lambda t: tokred.match(t, 1)),
        ("merge", "x", lambda t: tokred.merge(t, A, 3)),
        ("unmerge", "y", lambda t: tokred.unmerge(t, A)),
        ("match_merge", "x", lambda t: tokred.match_merge(t, K, 1)),
        ("topk", "score", lambda t: tokred.topk(t, 1)),
        ("topk_gather", "x", lambda t: tokred.topk_gather(t, S, 1)),
        ("attention", "q", lambda t: tokred.attention(t, K, K)),
        ("attention_scores", "q", lambda t: tokred.attention_scores(t, K)),
    ]:
        with pytest.raises(RuntimeError, match=f"{op}: {argument} must be a dense tensor, got {got}"):
            call(bad())


def test_refuses_a_mix_of_devices():
    with pytest.raises(RuntimeError, match="merge: assign must be on meta, got cpu"):
        tokred.merge(X.to("meta"), A, 3)
    with pytest.raises(RuntimeError, match="topk_gather: score must be on meta, got cpu"):
        tokred.topk_gather(X.to("meta"), S, 3)
    with pytest.raises(RuntimeError, match="attention: k must be on meta, got cpu"):
        tokred.attention(Q.to("meta"), K, K)
    with pytest.raises(RuntimeError, match="attention: size must be on meta, got cpu"):
        tokred.attention(*[t.to("meta") for t in (Q, K, K)], S)


@pytest.mark.parametrize("bad", [-2, 3, 2**31 - 1, -(2**31)])
def test_hostile_assign_means_dropped_and_is_an_error_under_debug(bad):
    assign = A.clone()
    assign[0, 3] = bad
    out, size = tokred.merge(X, assign, 3)
    assert size.tolist() == [[6, 0, 0], [7, 0, 0]]
    assert tokred.unmerge(out, assign)[0, 3].abs().sum() == 0

    code = f"""
import torch, tokred_kernels as tokred
assign = torch.zeros(2, 7, dtype=torch.int32); assign[0, 3] = {bad}
calls = {{
    "merge": lambda a: tokred.merge(torch.ones(2, 7, 4), a, 3),
    "unmerge": lambda a: tokred.unmerge(torch.ones(2, 3, 4), a),
}}
for call in calls.values():
    call(assign.clamp(-1, 2))
    try:
        call(assign)
    except RuntimeError as error:
        print(str(error).splitlines()[0])
"""
    shown = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TOKRED_DEBUG": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    for op in ("merge", "unmerge"):
        assert f"{op}: assign must be in [-1, m) = [-1, 3) under TOKRED_DEBUG=1, got {bad}" in shown.stdout
