"""What two processes must agree on with one; torchrun runs this, test_training_distributed.py reads what it writes.

torchrun --standalone --nproc-per-node=2 tests/distributed_checks.py RESULTS DATA
"""

import dataclasses
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from training_folder import settings

from tokred_kernels.training import build, checkpoint, data, distributed, loop
from tokred_kernels.training.distributed import World
from tokred_kernels.training.evaluate import evaluate

METHODS = {
    "metr": dict(method="metr", options=dict(keep_rate=0.5, stages=[1])),
    "tome": dict(method="tome", options=dict(r=2)),
    "ats": dict(method="ats", options=dict(keep_rate=0.5, stages=[1])),
    "mctf": dict(method="mctf", options=dict(r=2), consistency=0.0),
    "dpcknn": dict(method="dpcknn", options=dict(keep_rate=0.5, stages=[1])),
}


def gradients(name, folder, world, fsdp):
    """The gradients of both processes, half of a batch each, against those of the batch in one: the largest error."""
    split = data.read(folder, "folder", "train")
    said = settings(folder, "", drop_path=0.0, smoothing=0.0, **METHODS[name])
    alone, shared = (build.objective(said, split).double().train() for _ in range(2))
    images = torch.randn(8, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    target = torch.arange(8) % 3
    wrapped = distributed.wrap(shared, world, fsdp)
    for part in range(2):  # accumulated over two forwards
        alone(images[part::2], target[part::2])[0].div(2).backward()
        own = slice(part + 2 * world.rank, None, 4)
        with distributed.synchronise(wrapped, part == 1):
            wrapped(images[own], target[own])[0].div(2).backward()
    errors = []
    for a, b in zip(alone.parameters(), shared.parameters(), strict=True):
        grad = b.grad.full_tensor() if isinstance(b.grad, DTensor) else b.grad
        errors.append((a.grad - grad).abs().max().item())
    return max(errors)


def shardings():
    """The ops on tensors that are sharded by image, or by head, against those on whole ones."""
    import tokred_kernels.training.sharding  # noqa: F401

    mesh = init_device_mesh("cpu", (2,))
    ops = torch.ops.tokred
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(4, 9, 16, generator=generator) for _ in range(2))
    q, k, v = (torch.randn(4, 2, 9, 8, generator=generator) for _ in range(3))
    size = torch.rand(4, 9, generator=generator) + 0.5
    assign = ops.match(x, 3)
    near = ops.pairwise_distance(x)
    centres = torch.arange(3, dtype=torch.int32).repeat(4, 1)
    label = ops.nearest(near, centres)
    calls = {
        "attention": (ops.attention, (q, k, v, size), dict(scores="cls")),
        "attention_scores": (ops.attention_scores, (q, k, size), {}),
        "match": (ops.match, (x, 3, 1, size), dict(two_way=True)),
        "match_merge": (ops.match_merge, (x, y, 3, 1, size), {}),
        "merge": (ops.merge, (x, assign, 6, size), {}),
        "add_merge_norm": (ops.add_merge_norm, (x, y, assign, 6, x[0, 0], y[0, 0], size), {}),
        "add_topk_gather_norm": (ops.add_topk_gather_norm, (x, y, size, 4, x[0, 0], None), dict(fuse="sum")),
        "unmerge": (ops.unmerge, (x[:, :6], assign), {}),
        "topk": (ops.topk, (size, 4), {}),
        "topk_gather": (ops.topk_gather, (x, size, 4), dict(fuse="mean")),
        "pairwise_distance": (ops.pairwise_distance, (x,), {}),
        "knn": (ops.knn, (near, 3), {}),
        "separation": (ops.separation, (near, size), {}),
        "nearest": (ops.nearest, (near, centres), {}),
        "medoids": (ops.medoids, (near, label, centres, size), {}),
    }
    found = {}
    for name, (op, args, keywords) in calls.items():
        spread = [distribute_tensor(a, mesh, [Shard(0)]) if isinstance(a, torch.Tensor) else a for a in args]
        got, want = op(*spread, **keywords), op(*args, **keywords)
        pairs = zip(*((t,) if isinstance(t, torch.Tensor) else t for t in (got, want)), strict=True)
        found[name] = all(g.placements == (Shard(0),) and torch.equal(g.full_tensor(), w) for g, w in pairs)
    for name, placement, scores in (("images", Shard(0), "mean"), ("heads", Shard(1), "none")):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        spread = [distribute_tensor(t.detach(), mesh, [placement]).requires_grad_() for t in leaves]
        keys = distribute_tensor(size, mesh, [placement if placement == Shard(0) else Replicate()])
        out, emitted = ops.attention(*leaves, size, scores=scores)
        (out.square().sum() + emitted.square().sum()).backward()
        got, emitted = ops.attention(*spread, keys, scores=scores)
        loss = got.square().sum() + (emitted.square().sum() if scores == "mean" else 0)
        loss.full_tensor().backward()
        found[f"attention by {name}"] = got.placements == (placement,) and all(
            b.grad.placements == (placement,) and torch.allclose(a.grad, b.grad.full_tensor(), atol=1e-6)
            for a, b in zip(leaves, spread, strict=True)
        )
    whole = distribute_tensor(x, mesh, [Shard(1)])  # by token: gathered first
    found["match by token"] = torch.equal(ops.match(whole, 3).full_tensor(), assign)
    return found


def evaluation(folder, world):
    """Eleven images on two processes, and on one."""
    split = data.read(folder, "folder", "val")
    said = settings(folder, "", method="ats", options=dict(keep_rate=0.5, stages=[1]))
    model = build.objective(said, split).model
    images = build.held_out(split, model)
    options = dict(batch_size=2, count_tokens=True)
    return [evaluate(model, images, w, **options) for w in (world, World(torch.device("cpu")))]


def resumed(folder, out, world):
    """How far weights and their average are apart: two epochs on one process, on two, and one on one and one on two;
    with FSDP2, compiled, too."""
    still = dict(drop_path=0.0, scale=1.0, flip=0.0, ema=0.5, method="metr", options=dict(keep_rate=0.5, stages=[1]))
    found = {}
    for name in ("ddp", "fsdp"):
        said = settings(folder, out / f"{name}-both", fsdp=name == "fsdp", compile=name == "fsdp", **still)
        loop.train(said, world)
        once = dataclasses.replace(said, output=str(out / f"{name}-then"), fsdp=False, compile=False)
        if world.first:
            alone = World(torch.device("cpu"))
            loop.train(dataclasses.replace(once, output=str(out / f"{name}-one")), alone)
            half = loop.Training(once, alone, loop.Watch())
            half.settings = dataclasses.replace(once, epochs=1)
            half.run(False)
        world.wait()
        loop.train(dataclasses.replace(once, fsdp=said.fsdp), world, resume=True)
        world.wait()
        if world.first:
            one = checkpoint.load(out / f"{name}-one" / "last.pt")
            assert any((one["ema"][k] - t).abs().max() > 1e-4 for k, t in one["model"].items())
            for other in ("both", "then"):
                state = checkpoint.load(out / f"{name}-{other}" / "last.pt")
                assert len(state["rows"]) == 2 and all("ema_top1" in row for row in state["rows"])
                found[f"{name} {other}"] = max(
                    (t - state[part][k]).abs().max().item() for part in ("model", "ema") for k, t in one[part].items()
                )
    return found


def main(out, folder):
    torch.set_num_threads(1)
    compiled = torch.nn.Module.compile
    torch.nn.Module.compile = lambda self: compiled(self, backend="eager")  # Dynamo's graphs, without C++ to build
    world = distributed.start("cpu")
    result = {"gradients": {}}
    for name in METHODS:
        for fsdp in (False, True):
            result["gradients"][f"{name} {'fsdp' if fsdp else 'ddp'}"] = gradients(name, folder, world, fsdp)
    result["shardings"] = shardings()
    result["evaluation"] = evaluation(folder, world)
    result["resumed"] = resumed(folder, out, world)
    both = world.gather(result)
    if world.first:
        (out / "results.json").write_text(json.dumps(both))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
