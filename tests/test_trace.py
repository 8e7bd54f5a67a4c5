"""trace: what was merged where, without changing what the model computes."""

import threading

import pytest
import torch
from timm.layers import set_reentrant_ckpt
from vits import TINY, images, tiny

import tokred_kernels as tokred
from tokred_kernels.trace import Forward, compose


def patched(name="deit", r=5, **options):
    return tokred.apply(tiny(name, **options), "tome", r=r)


def run(model, x=None):
    with torch.no_grad():
        return model(images() if x is None else x)


@pytest.mark.parametrize("name", TINY)
def test_source_is_the_composition_of_the_assignments(name):
    model = patched(name, r=[0, 5, 0, 7])
    want = run(model)
    with tokred.trace(model) as t:
        assert torch.equal(run(model), want)
    N0 = t.tokens[0]
    assert t.tokens == [N0, N0, N0 - 5, N0 - 5, N0 - 12]
    assert [a is None for a in t.assign] == [True, False, True, False]
    # The source matrix of the paper: rows now, columns then.
    matrix = torch.eye(N0).expand(2, -1, -1)
    for assign, M in zip(t.assign, t.tokens[1:], strict=True):
        if assign is not None:
            step = torch.zeros(2, M, assign.shape[1]).scatter(1, assign.long()[:, None], 1)
            matrix = step @ matrix
    assert t.source.dtype == torch.int32 and t.source.shape == (2, N0)
    assert torch.equal(t.source.long(), matrix.argmax(1))
    assert torch.equal(matrix.sum(1), torch.ones(2, N0))


def test_dropped_tokens_are_minus_1_ever_after():
    model = tokred.apply(tiny("distilled"), "topk", tokens=[20, 20, 9], stages=(0, 1, 2))
    with tokred.trace(model) as t:
        run(model)
    assert t.tokens == [38, 22, 22, 11, 11] and t.fused == [None] * 4
    assert [a is None for a in t.assign] == [False, True, False, True]
    first, second = t.assign[0], t.assign[2]
    for n in range(2):
        survivors = [j for j in range(38) if first[n, j] >= 0 and second[n, first[n, j]] >= 0]
        assert len(survivors) == 11 and t.source[n, survivors].tolist() == list(range(11))
        assert set(t.source[n].tolist()) == {-1, *range(11)}
    assert not t.in_fused.any()


@pytest.mark.parametrize("last", [30, 1])
def test_members_of_a_fused_token_follow_it(last):
    """The first fused token is kept by the last stage, or taken in by the next fused token."""
    model = tokred.apply(tiny("deit"), "evit", tokens=[32, last], stages=(0, 2))
    with tokred.trace(model) as t:
        run(model)
    assert t.tokens == [37, 34, 34, 2 + last, 2 + last] and t.fused == [33, None, 1 + last, None]
    first, second = t.assign[0], t.assign[2]
    for n in range(2):
        lost = [j for j in range(37) if first[n, j] == 33 or second[n, first[n, j]] == 1 + last]
        assert t.in_fused[n].nonzero().flatten().tolist() == lost
        assert all(t.source[n, j] == second[n, first[n, j]] for j in range(37))
    assert t.in_fused.dtype == torch.bool and torch.equal(t.in_fused, t.last.in_fused)
    alone = [j for j in range(37) if not t.in_fused[0, j]]
    assert len(t.source[0, alone].unique()) == len(alone)  # the others have a row each


def test_a_kept_fused_token_is_moved_with_its_members():
    """Made the best patch by hand, the fused token of block 0 becomes a kept row of block 2."""
    forward = Forward(
        torch.arange(4, dtype=torch.int32)[None],
        [4, 3, 2],
        [torch.tensor([[0, 2, 1, 2]], dtype=torch.int32), torch.tensor([[0, 2, 1]], dtype=torch.int32)],
        [2, 2],
    )
    assert forward.source.tolist() == [[0, 1, 2, 1]]
    assert forward.in_fused.tolist() == [[False, True, True, True]]


def test_tome_fuses_nothing():
    model = patched()
    with tokred.trace(model) as t:
        run(model)
    assert t.fused == [None] * 4 and not t.in_fused.any()


def test_without_reduction_every_token_is_its_own_source():
    model = patched(r=0)
    with tokred.trace(model) as t:
        run(model)
    assert torch.equal(t.source, torch.arange(37, dtype=torch.int32).expand(2, -1))
    assert t.assign == [None] * 4


def test_history_holds_every_forward_and_the_trace_the_last():
    model = patched()
    with tokred.trace(model) as t:
        run(model)
        run(model, images(3, seed=5))
        run(model.forward_features)
        run(model.forward_intermediates)
        model.forward_intermediates(images(), [1], stop_early=True)
    assert [f.tokens for f in t.history] == [[37, 32, 27, 22, 17]] * 4 + [[37, 32, 27]]
    assert [f.source.shape[0] for f in t.history] == [2, 3, 2, 2, 2]
    assert torch.equal(t.history[0].source, t.history[2].source)
    assert t.last is t.history[-1] and torch.equal(t.source, t.history[-1].source)


def test_hooks_leave_with_the_context_even_after_an_error():
    model = patched()
    with pytest.raises(ZeroDivisionError), tokred.trace(model):
        raise ZeroDivisionError
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with tokred.trace(model) as t:
        run(model)
    run(model)
    assert len(t.history) == 1
    assert len(model.blocks[0](torch.randn(1, 9, 32), None, 1)) == 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_under_checkpointing_is_not_recorded_again(reentrant):
    model = patched()
    model.set_grad_checkpointing(True)
    set_reentrant_ckpt(reentrant)
    try:
        with tokred.trace(model) as t:
            model(images()).sum().backward()
            model(images()).sum().backward()
    finally:
        set_reentrant_ckpt(False)
    assert [f.tokens for f in t.history] == [[37, 32, 27, 22, 17]] * 2
    assert all(p.grad is not None for p in model.parameters())


def test_patch_dropout_counts_the_tokens_that_were_kept():
    model = patched(patch_drop_rate=0.5).train()
    with tokred.trace(model) as t:
        model(images())
    assert t.tokens == [19, 14, 9, 5, 3]


def test_one_trace_a_thread():
    model = patched()
    with tokred.trace(model) as outer:
        with pytest.raises(RuntimeError, match="this thread is tracing already"), tokred.trace(patched()):
            pass
        run(model)
    assert len(outer.history) == 1
    with tokred.trace(model):  # the refused one has not locked the thread
        pass


def test_threads_trace_one_model_apart():
    model = patched()
    inputs = [images(2, seed=1), images(3, seed=2)]
    want = []
    for x in inputs:
        with tokred.trace(model) as t:
            run(model, x)
        want.append(t.source)
    histories: list = [None, None]
    barrier = threading.Barrier(2)

    def work(n):
        try:
            with tokred.trace(model) as t:
                barrier.wait()
                for _ in range(20):
                    run(model, inputs[n])
                barrier.wait()
            histories[n] = t.history
        except BaseException:
            barrier.abort()  # the other thread would wait for ever
            raise

    threads = [threading.Thread(target=work, args=(n,)) for n in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n in (0, 1):
        assert histories[n] is not None and len(histories[n]) == 20
        assert all(torch.equal(f.source, want[n]) for f in histories[n])


def test_a_thread_that_does_not_trace_is_not_recorded():
    model = patched()
    results = []
    with tokred.trace(model) as t:
        thread = threading.Thread(target=lambda: results.append(run(model)))
        thread.start()
        thread.join()
    assert len(results) == 1, "the thread failed"
    assert t.history == [] and torch.equal(results[0], run(model))
    with pytest.raises(RuntimeError, match="no forward was seen"):
        _ = t.source


def test_compiled_and_unpatched_models_are_refused():
    model = patched()
    with pytest.raises(ValueError, match="trace the uncompiled model"):
        tokred.trace(torch.compile(model))
    model.blocks[1].compile()
    with pytest.raises(ValueError, match="trace the uncompiled model"):
        tokred.trace(model)
    with pytest.raises(ValueError, match="VisionTransformer has no token reduction; apply one first"):
        tokred.trace(tiny("deit"))


def test_a_compiled_form_of_the_model_is_not_traced():
    model = patched()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    want = run(compiled)
    with tokred.trace(model) as t:
        assert torch.equal(run(compiled), want)
    with pytest.raises(RuntimeError, match="run the traced, uncompiled model"):
        _ = t.source
    torch._dynamo.reset()
    with tokred.trace(model), pytest.raises(torch._dynamo.exc.Unsupported):
        run(torch.compile(model, backend="eager", fullgraph=True))


def test_compose_keeps_what_was_dropped():
    source = torch.tensor([[0, -1, 2, 1]], dtype=torch.int32)
    assign = torch.tensor([[0, -1, 1]], dtype=torch.int32)
    assert compose(source, assign).tolist() == [[0, -1, 1, -1]]
    assert compose(None, assign) is assign and compose(source, None) is source and compose(None, None) is None
