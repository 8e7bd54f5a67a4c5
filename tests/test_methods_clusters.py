"""DPC-KNN and K-Medoids against slow float64 forms."""

import copy

import method_oracles
import pytest
import torch
from method_oracles import Choices
from vits import images, randomised, tiny

import tokred_kernels as tokred
from tokred_kernels.methods import METHODS
from tokred_kernels.methods._clusters import ranked

P, C = 20, 16  # C^-1/2 is exact: what is equal for the definition is equal in floating point


def patches(kind, batch=2, seed=3):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, P, C, generator=generator, dtype=torch.float64)
    if kind == "equal":
        x[:] = x[:, :1].clone()
    elif kind == "zero":
        x[:] = 0
    elif kind == "duplicates":
        x[:, 1::2] = x[:, ::2].clone()
    elif kind == "line":  # ties of integers in every step
        x = torch.zeros(batch, P, C, dtype=torch.float64)
        x[..., 0] = torch.randint(0, 9, (batch, P), generator=generator).double()
    elif kind == "two groups":
        x[:, ::2] += 50
    elif kind == "one far":
        x[:, 7] *= 1000
    elif kind == "close":
        x = 1 + 1e-3 * x
    return x


KINDS = ["random", "equal", "zero", "duplicates", "line", "two groups", "one far", "close"]


class Block:
    """What `reduce` needs of a block."""

    def __init__(self, prefix, part=None):
        self.tokred_prefix, self.tokred_part = prefix, part


def score_part(seed=0):
    part = METHODS["dpcknn"](keep_rate=0.5).part(tiny("deit", embed_dim=C), 3)
    return randomised(part, seed).double()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 7, 19])
@pytest.mark.parametrize("learned", [False, True])
def test_dpcknn_is_the_oracle(kind, k, learned):
    part, prefix = (score_part() if learned else None), 2
    method = METHODS["dpcknn"](keep_rate=0.5, equal_weight=not learned)
    x = patches(kind)
    whole = torch.cat([torch.full((2, prefix, C), torch.nan, dtype=x.dtype), x], 1)
    with torch.no_grad():
        got, _, assign = method.reduce(Block(prefix, part), whole, None, k)
        for image, rows, label in zip(x, got, assign, strict=True):
            want, labels = method_oracles.dpcknn(image, k, part)
            assert label.tolist() == [0, 1, *(labels + prefix).tolist()]
            assert rows[:prefix].isnan().all()
            torch.testing.assert_close(rows[prefix:], want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("k_neighbors", [1, 3, 50])
def test_dpcknn_takes_any_number_of_neighbours(k_neighbors):
    method = METHODS["dpcknn"](keep_rate=0.5, equal_weight=True, k_neighbors=k_neighbors)
    for kind in ("random", "line"):
        x = patches(kind)
        _, _, assign = method.reduce(Block(0), x, None, 6)
        for image, label in zip(x, assign, strict=True):
            assert label.tolist() == method_oracles.dpcknn(image, 6, None, k_neighbors)[1].tolist()


def test_dpcknn_is_deterministic_and_a_cluster_of_one_is_a_copy():
    method = METHODS["dpcknn"](keep_rate=0.5, equal_weight=True)
    x = patches("random").half()
    runs = [method.reduce(Block(0), x, None, 12) for _ in range(3)]
    assert all(torch.equal(a[0], runs[0][0]) and torch.equal(a[2], runs[0][2]) for a in runs)
    out, _, assign = runs[0]
    for image, rows, label in zip(x, out, assign, strict=True):
        alone = [c for c in range(12) if (label == c).sum() == 1]
        assert alone
        for c in alone:
            assert torch.equal(rows[c], image[label == c][0])


def test_gradients_of_dpcknn_are_those_of_the_plain_weighted_mean():
    part, x = score_part(), patches("random").requires_grad_()
    rows, _, assign = METHODS["dpcknn"](keep_rate=0.5).reduce(Block(0, part), x, None, 7)
    got = torch.autograd.grad(rows.square().sum(), [x, *part.parameters()])
    member = torch.nn.functional.one_hot(assign.long(), 7).mT * part["score"](x).mT.exp()
    plain = (member / member.sum(2, keepdim=True)) @ x
    want = torch.autograd.grad(plain.square().sum(), [x, *part.parameters()])
    for a, b in zip(got[:2], want[:2], strict=True):
        assert b.abs().max() > 1e-3
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_the_best_are_ranked_by_the_order_rule():
    nan, inf = torch.nan, torch.inf
    score = torch.tensor([[nan, 1, -0.0, 0, -inf, 1, inf, nan], [nan] * 8])
    assert ranked(score, 8).tolist() == [[6, 1, 5, 2, 3, 0, 4, 7], list(range(8))]
    assert ranked(score, 2).dtype == torch.int32


@pytest.mark.parametrize("method", ["dpcknn", "kmedoids"])
@pytest.mark.parametrize("equal_weight", [False, True])
def test_an_image_of_nan_leaves_the_others_alone(method, equal_weight):
    model = tokred.apply(tiny("deit"), method, tokens=[25, 9], stages=(1, 3), equal_weight=equal_weight)
    x = images()
    with torch.no_grad():
        want = model(x)
        x[0] = torch.nan
        got = model(x)
    assert got[0].isnan().all() and torch.equal(got[1], want[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_dpcknn_weights_do_not_overflow(dtype):
    """The published exp is inf from a score of 11.1 in float16, 88.8 in float32."""
    part = score_part().to(dtype)
    part["score"].bias.data += 200
    method = METHODS["dpcknn"](keep_rate=0.5)
    x = patches("random").to(dtype)
    got = method.reduce(Block(0, part), x, None, 4)[0]
    part["score"].bias.data -= 200
    want = method.reduce(Block(0, part), x, None, 4)[0]
    torch.testing.assert_close(got, want, rtol=0, atol=0.3 if dtype == torch.float16 else 2e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 7, 19])
@pytest.mark.parametrize("update", ["textbook", "wttu"])
@pytest.mark.parametrize("weights", ["random", "tied", "equal", "equal start"])
def test_kmedoids_is_the_oracle(kind, k, update, weights):
    method = METHODS["kmedoids"](keep_rate=0.5, update=update, equal_weight=weights == "equal start")
    x = patches(kind)
    weight = torch.rand(2, P, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
    if weights == "tied":
        weight = (4 * weight).ceil() / 4
    elif weights != "random":
        weight = torch.ones_like(weight)
    centres, label = method.cluster(x, weight, k)
    assert centres.dtype == label.dtype == torch.int32
    for n in range(2):
        start = None if weights == "equal start" else weight[n].tolist()
        choices = Choices()
        want = method_oracles.kmedoids(x[n], k, start, update, choices=choices)
        assert choices.clear, "the seed leaves a choice to rounding"
        assert centres[n].tolist() == want[0].tolist() and label[n].tolist() == want[1].tolist()


def test_kmedoids_reduces_the_sum_of_distances_and_empty_clusters_keep_their_medoid():
    x = patches("line")
    weight = torch.rand(2, P, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    d = tokred.pairwise_distance(x)
    costs = []
    for iterations in (0, 1, 3):
        centres, _ = METHODS["kmedoids"](keep_rate=0.5, iterations=iterations).cluster(x, weight, 3)
        nearest = d.gather(2, centres.long()[:, None].expand(-1, P, -1)).amin(2)
        costs.append((weight * nearest).sum(1))
    assert (costs[1] <= costs[0]).all() and (costs[2] <= costs[1]).all() and (costs[2] < costs[0]).any()
    equal = patches("equal")
    centres, label = METHODS["kmedoids"](keep_rate=0.5).cluster(equal, weight, 6)
    assert centres[:, 1:].tolist() == weight.sort(descending=True).indices[:, 1:6].tolist() and (label == 0).all()


def reduction(method, options, choices):
    """For `method_oracles.run`."""
    keep = {1: 25, 3: 9}

    def reduce(index, part, x, matrix):
        if index not in keep:
            return None
        if method == "dpcknn":
            return method_oracles.dpcknn(x, keep[index], part, choices=choices)
        weight = None if options.get("equal_weight") else matrix.sum((0, 1))[-len(x) :].tolist()
        centres, label = method_oracles.kmedoids(
            x, keep[index], weight, options.get("update", "textbook"), choices=choices
        )
        return x[centres], label

    return reduce


FORMS = [
    ("dpcknn", {}),
    ("dpcknn", dict(equal_weight=True)),
    ("kmedoids", {}),
    ("kmedoids", dict(update="wttu")),
    ("kmedoids", dict(equal_weight=True)),
]


@pytest.mark.parametrize(("method", "options"), FORMS)
@pytest.mark.parametrize("name", ["no-prefix", "deit", "distilled", "dinov2-reg4", "gap"])
def test_models_agree_with_the_float64_oracle(method, options, name):
    model = randomised(tokred.apply(tiny(name), method, tokens=[25, 9], stages=(1, 3), **options)).eval()
    choices = Choices(rounding=1e-5)
    with torch.no_grad():
        want, source = method_oracles.run(model, images(), reduction(method, options, choices))
        # float32 may choose otherwise where two values are closer than it rounds.
        for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 3e-5))[: 1 + choices.clear]:
            patched = copy.deepcopy(model).to(dtype)
            with tokred.trace(patched) as t:
                got = patched(images().to(dtype))
            assert torch.equal(t.source.long(), source)
            torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance * want.abs().max().item())
            p = model.num_prefix_tokens
            after = [36, 36, 25, 25, 9] if method == "dpcknn" else [36, 25, 25, 9, 9]
            assert t.tokens == [p + n for n in after]


def test_kmedoids_counts_attention_before_and_after_its_stage():
    """As the published code: the block before the stage runs on all of its tokens, the stage on what is left."""
    counts = tokred.schedule.tokens(tiny("deit"), method="kmedoids", tokens=[25, 9], stages=(1, 3))
    assert counts == [(37, 37), (26, 26), (26, 26), (10, 10)]


def test_constant_patches_stay_constant():
    for method in ("dpcknn", "kmedoids"):
        model = tokred.apply(tiny("gap"), method, tokens=[9], stages=(1,))
        for parameter in (model.pos_embed, model.patch_embed.proj.weight):
            parameter.data.zero_()
        with torch.no_grad():
            x = model.forward_features(images())
        assert x.shape[1] == 9
        torch.testing.assert_close(x, x[:, :1].expand_as(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("dpcknn", dict(k_neighbors=0), "dpcknn: k_neighbors must be an int of at least 1, got 0"),
        ("dpcknn", dict(k_neighbors=True), "dpcknn: k_neighbors must be an int of at least 1, got True"),
        ("dpcknn", dict(equal_weight="no"), "dpcknn: equal_weight must be True or False, got 'no'"),
        ("kmedoids", dict(update="mean"), "kmedoids: update must be one of textbook, wttu, got 'mean'"),
        ("kmedoids", dict(iterations=-1), "kmedoids: iterations must be an int of at least 0, got -1"),
        ("kmedoids", dict(equal_weight=1), "kmedoids: equal_weight must be True or False, got 1"),
        (
            "kmedoids",
            dict(stages=(0, 2)),
            "kmedoids: stages must be from 1, as the weights are the attention of the block before, got (0, 2)",
        ),
    ],
)
def test_bad_options_are_refused_in_one_line(method, options, message):
    model = tiny("deit")
    with pytest.raises(ValueError) as caught:
        tokred.apply(model, method, **{"keep_rate": 0.5, "stages": (1,), **options})
    assert str(caught.value) == message
    assert not hasattr(model, "tokred_method")


def test_kmedoids_refuses_heads_too_wide_to_emit_their_attention():
    wide = tiny("deit", embed_dim=272)
    with pytest.raises(ValueError, match="kmedoids: scores need heads of width 128 at most, got 136"):
        tokred.apply(wide, "kmedoids", keep_rate=0.5, stages=(1,))
    tokred.apply(wide, "kmedoids", keep_rate=0.5, stages=(1,), equal_weight=True)
