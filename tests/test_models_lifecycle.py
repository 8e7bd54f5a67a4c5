"""A patched model lives as an ordinary module: removal, copies, checkpointing, threads, changing inputs."""

import copy
import io
import pickle
import threading

import pytest
import torch
from timm.layers import set_reentrant_ckpt
from timm.models.vision_transformer import Block, VisionTransformer
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from vits import FIXED, METHODS, TINY, images, pairs, reduced, tiny

import tokred_kernels as tokred


def patched(name="deit", r=5, **options):
    return tokred.apply(tiny(name, **options), "tome", r=r)


def run(model, x=None):
    with torch.no_grad():
        return model(images() if x is None else x)


@pytest.mark.parametrize(("name", "method"), [(name, "tome") for name in TINY] + pairs("distilled", "cls-reg9", "gap"))
def test_remove_restores_exactly(name, method):
    model, twin = tiny(name), tiny(name)
    before = {n: (type(m), set(vars(m))) for n, m in model.named_modules()}
    parameters = {id(p) for p in model.parameters()}
    keys = list(model.state_dict())
    assert reduced(model, method) is model
    learned = [key for key in model.state_dict() if ".tokred_part." in key]
    assert [key for key in model.state_dict() if key not in learned] == keys
    assert parameters <= {id(p) for p in model.parameters()}
    assert isinstance(model, VisionTransformer) and all(isinstance(b, Block) for b in model.blocks)
    assert tokred.remove(model) is model
    assert {n: (type(m), set(vars(m))) for n, m in model.named_modules()} == before
    assert list(model.state_dict()) == keys and {id(p) for p in model.parameters()} == parameters
    assert torch.equal(run(model), run(twin))


def test_remove_of_an_unpatched_model_does_nothing():
    model = tiny("deit")
    assert tokred.remove(model) is model and type(model) is VisionTransformer
    linear = torch.nn.Linear(2, 2)
    assert tokred.remove(linear) is linear


def test_apply_after_remove_takes_other_options_and_methods():
    model = patched(r=5)
    tokred.apply(tokred.remove(model), "tome", r=2)
    assert torch.equal(run(model), run(patched(r=2)))
    reduced(tokred.remove(model), "evit")
    assert torch.equal(run(model), run(reduced(tiny("deit"), "evit")))


@pytest.mark.parametrize("method", METHODS)
def test_a_deepcopy_is_removed_on_its_own(method):
    model = reduced(tiny("deit"), method)
    want = run(model)
    other = copy.deepcopy(model)
    assert torch.equal(run(other), want)
    tokred.remove(other)
    assert torch.equal(run(other), run(tiny("deit")))
    assert torch.equal(run(model), want)


def test_a_deepcopied_model_is_patched_apart_from_its_original():
    model = tiny("deit")
    tokred.apply(copy.deepcopy(model), "tome", r=5)
    assert type(model) is VisionTransformer


@pytest.mark.parametrize("method", METHODS)
def test_torch_save_pickle_and_state_dict(method):
    model = reduced(tiny("distilled"), method)
    want = run(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(run(torch.load(buffer, weights_only=False)), want)
    assert torch.equal(run(pickle.loads(pickle.dumps(model))), want)
    other = reduced(tiny("distilled", seed=9), method)
    for block in other.blocks:  # what is learned is loaded too
        for p in () if block.tokred_part is None else block.tokred_part.parameters():
            p.data.zero_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(run(other), want)


def gradients(model, x, seed=0):
    torch.manual_seed(seed)
    model.zero_grad()
    model(x).square().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    ("name", "method"),
    [("gap-reg4-nocls", "tome"), ("siglip-map", "tome"), ("cls-reg9", "topk"), *pairs("distilled")],
)
def test_gradient_checkpointing_changes_nothing(name, method, reentrant):
    rates = dict(drop_path_rate=0.2, proj_drop_rate=0.1, attn_drop_rate=0.1 if method == "tome" else 0.0)
    model = reduced(tiny(name, **rates), method, **(dict(r=[0, 5, 0, 3]) if method == "tome" else {})).train()
    want = gradients(model, images())
    model.set_grad_checkpointing(True)
    set_reentrant_ckpt(reentrant)
    try:
        got = gradients(model, images())
    finally:
        set_reentrant_ckpt(False)
    assert got.keys() == want.keys()
    for n in want:
        assert torch.equal(got[n], want[n]), n


@pytest.mark.parametrize("method", METHODS)
def test_checkpointed_dense_outputs_change_nothing(method):
    model = reduced(tiny("deit"), method)
    want = model.forward_intermediates(images())
    model.set_grad_checkpointing(True)
    for reentrant in (False, True):
        set_reentrant_ckpt(reentrant)
        try:
            got = model.forward_intermediates(images())
        finally:
            set_reentrant_ckpt(False)
        assert torch.equal(got[0], want[0]) and all(torch.equal(a, b) for a, b in zip(got[1], want[1], strict=True))


@pytest.mark.parametrize("name", ["deit", "gap-reg4-nocls", "siglip-map", "avgmax", "qk_norm"])
def test_gradients_are_those_of_a_gather_through_the_same_assignment(name):
    """Against merging with index_add in the same places: the matching itself has no gradient."""
    model = patched(name).double()
    want = gradients(model, images().double())
    assert all(g.isfinite().all() for g in want.values())

    def by_index_add(x, assign, m, size=None):
        out, size_out = kernel(x.detach(), assign, m, size)
        rows = assign.long()[..., None].expand_as(x)
        w = torch.ones(x.shape[:2], dtype=x.dtype) if size is None else size
        total = torch.zeros_like(out).scatter_add(1, rows, x * w[..., None])
        return total / size_out[..., None], size_out

    kernel = torch.ops.tokred.merge
    try:
        torch.ops.tokred.merge = by_index_add
        got = gradients(model, images().double())
    finally:
        torch.ops.tokred.merge = kernel
    for n in want:
        torch.testing.assert_close(got[n], want[n], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_training_with_every_kind_of_dropout_gives_finite_gradients(method):
    rates = dict(drop_path_rate=0.3, proj_drop_rate=0.1, pos_drop_rate=0.1)
    rates["patch_drop_rate"] = 0.0 if method in FIXED else 0.25
    rates["attn_drop_rate"] = 0.2 if method == "tome" else 0.0  # scores know no dropout
    model = reduced(tiny("cls-reg9", drop_rate=0.1, **rates), method).train()
    found = gradients(model, images())
    assert all(g.isfinite().all() for g in found.values())
    assert found.keys() == {n for n, _ in model.named_parameters()}
    assert not torch.equal(model(images()), model(images()))


@pytest.mark.parametrize(
    ("name", "method"),
    [("siglip-map", "tome"), ("gap", "tome"), ("gap", "topk"), *pairs("distilled", but=FIXED)],
)
def test_batch_size_and_resolution_may_change_from_forward_to_forward(name, method):
    model = reduced(tiny(name, dynamic_img_size=True), method)
    for batch, side in [(2, 48), (1, 48), (3, 64), (2, 32), (2, 48)]:
        fresh = reduced(tiny(name, dynamic_img_size=True), method)
        x = images(batch, side)
        assert torch.equal(run(model, x), run(fresh, x))
        assert run(model.forward_intermediates, x)[1][-1].shape == (batch, 32, side // 8, side // 8)


@pytest.mark.parametrize(
    ("name", "method"),
    [(name, "tome") for name in TINY if name != "no-prefix"]  # there timm itself fails
    + pairs("distilled"),
)
def test_an_empty_batch_gives_empty_results(name, method):
    model = reduced(tiny(name), method)
    assert run(model, images(0)).shape == (0, *run(model).shape[1:])
    final, grids = run(model.forward_intermediates, images(0))
    assert grids[-1].shape == (0, 32, 6, 6) and final.shape[0] == 0


def test_set_input_size_of_a_patched_model():
    model = patched("gap")
    model.set_input_size(64)
    with torch.no_grad():
        full = model.forward_intermediates(images(2, 64))[0]
        torch.testing.assert_close(model.forward_head(full), model(images(2, 64)), rtol=1e-4, atol=1e-4)


def test_pruned_blocks_and_a_new_classifier_keep_the_schedule():
    model = patched("deit", r=[5, 4, 3, 2])
    model.prune_intermediate_layers(1)
    assert [b.shape[1] for b in (run(model.forward_features),)] == [37 - 5 - 4 - 3 - 2]
    model.prune_intermediate_layers([1])
    assert run(model.forward_features).shape[1] == 37 - 5 - 4
    model = tokred.apply(tiny("deit"), "topk", tokens=[20, 10], stages=(1, 3))
    model.prune_intermediate_layers([2])
    assert run(model.forward_features).shape[1] == 1 + 20
    assert tokred.schedule.tokens(model) == [(37, 37), (37, 21), (21, 21)]
    model = patched("deit")
    model.reset_classifier(3)
    assert run(model).shape == (2, 3)


@pytest.mark.parametrize("head", ["", "avg"])
def test_reset_classifier_may_change_the_pool(head):
    model = patched("deit")
    model.reset_classifier(3, head)
    dense = tiny("deit")
    dense.reset_classifier(3, head)
    assert run(model).dim() == run(dense).dim()


def test_more_tokens_than_there_are_are_never_removed():
    model = patched("deit", r=10**6, img_size=8)  # one patch
    torch.testing.assert_close(run(model, images(2, 8)), run(tiny("deit", img_size=8), images(2, 8)))


@pytest.mark.parametrize(("name", "method"), [("gap", "tome"), *pairs("deit")])
def test_interleaved_forwards_do_not_mix(name, method):
    model, x, y = reduced(tiny(name), method), images(2, seed=1), images(3, seed=2)
    want = run(model, x), run(model, y)
    with torch.no_grad():
        a, b = model._embed(x), model._embed(y)
        a_size = b_size = None
        for block, r in zip(model.blocks, model._schedule(a), strict=True):
            a, a_size = block(a, a_size, r)
            b, b_size = block(b, b_size, r)
        assert torch.equal(model.forward_head(model.norm(a), size=a_size), want[0])
        assert torch.equal(model.forward_head(model.norm(b), size=b_size), want[1])


@pytest.mark.parametrize("method", METHODS)
def test_two_threads_share_a_model(method):
    model = reduced(tiny("deit"), method)
    inputs = [images(2, seed=1), images(3, seed=2)]
    want = [run(model, x) for x in inputs]
    results: list[list] = [[], []]

    def work(n):
        for _ in range(20):
            results[n].append(run(model, inputs[n]))

    threads = [threading.Thread(target=work, args=(n,)) for n in (0, 1)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for n in (0, 1):
        assert len(results[n]) == 20 and all(torch.equal(y, want[n]) for y in results[n])


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "s"), 1), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_a_patched_model_trains_under_ddp_and_fsdp(one_process):
    want = gradients(patched("gap"), images())
    got = gradients(DistributedDataParallel(patched("gap")), images())
    for n in want:
        torch.testing.assert_close(got[f"module.{n}"], want[n])
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    sharded = patched("gap")
    for block in sharded.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    got = gradients(sharded, images())
    for n in want:
        torch.testing.assert_close(got[n].full_tensor(), want[n])
    with pytest.raises(ValueError, match="holds a patched model"):
        tokred.remove(sharded)
    want = gradients(reduced(tiny("deit"), "evit"), images())
    got = gradients(DistributedDataParallel(reduced(tiny("deit"), "evit")), images())
    for n in want:
        torch.testing.assert_close(got[f"module.{n}"], want[n])


def test_block_hooks_of_the_user_run():
    model, seen = patched("deit"), []
    model.blocks[1].register_forward_hook(lambda m, args, out: seen.append((args[0].shape[1], out[0].shape[1])))
    run(model)
    assert seen == [(32, 27)]


def test_attn_mask_and_is_causal_are_refused_in_every_forward():
    model, x = patched("deit"), images()
    mask = torch.zeros(37, 37)
    for call in (model, model.forward_features, model.forward_intermediates):
        with pytest.raises(ValueError, match="attn_mask"):
            call(x, attn_mask=mask)
        with pytest.raises(ValueError, match="is_causal"):
            call(x, is_causal=True)
    with pytest.raises(ValueError, match="attn_mask"):
        model.get_intermediate_layers(x, attn_mask=mask)
