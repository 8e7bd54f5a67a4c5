"""The training loop: epochs, updates, checkpoints.

Everything random in an epoch comes from generators seeded by (seed, epoch, rank), and an epoch starts from what the
checkpoint before it holds: a training that was stopped, however, goes on bit for bit as if it had not been.
"""

import csv
import dataclasses
import io
import itertools
from pathlib import Path

import timm.utils
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp

from . import build, checkpoint, data, distributed, objective
from .distributed import World
from .evaluate import evaluate
from .keep_rate import set_keep_rate, warm_up
from .settings import BadInput, Settings
from .watch import Watch

_FULL = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
# Updates between two looks at the loss on a GPU, each of which waits for the device.
_LOOK_EVERY = 50


def train(settings: Settings, world: World, *, resume: bool = False, watch: Watch | None = None) -> list[dict]:
    """Trains as the settings say and writes last.pt, best.pt and log.csv; returns the rows of the log.

    Raises:
        BadInput: settings, data or checkpoint do not fit; the loss is not finite, with last.pt as it was an epoch ago.
    """
    settings.check()
    return Training(settings, world, watch or Watch()).run(resume)


class Training:
    def __init__(self, settings: Settings, world: World, watch: Watch):
        self.settings, self.world, self.watch = settings, world, watch
        train_split = data.read(settings.data, settings.format, "train")
        held = data.read(settings.data, settings.format, "val")
        if held.classes != train_split.classes:
            raise BadInput(f"{settings.data}: train has {len(train_split.classes)} classes, val others")
        self.objective = build.objective(settings, train_split).to(world.device)
        self.model = self.objective.model
        self.loader = build.training_data(settings, train_split, self.model, world)
        self.held_out = build.held_out(held, self.model)
        self.mixup = build.mixup(settings, train_split)
        self.updates = len(self.loader) // settings.accumulate
        self.average = build.average(settings, self.model)
        if settings.compile:
            self.objective.compile()
        self.wrapped = distributed.wrap(self.objective, world, settings.fsdp)
        self.sharded = settings.fsdp and world.size > 1
        if self.average is not None and self.sharded:
            distributed.shard(self.average.module, self.average.module.blocks)
        self.optimizer = build.optimiser(settings, self.model)
        self.schedule = build.schedule(settings, self.optimizer, self.updates)
        self.measure = "mAP" if held.multi_label else "top1"
        self.classes = train_split.classes
        self.rows: list[dict] = []

    def run(self, resume: bool) -> list[dict]:
        folder = Path(self.settings.output)
        last = folder / "last.pt"
        if resume:
            self._restore(last)
        elif last.exists():
            raise BadInput(f"{last} is the checkpoint of a training; --resume goes on with it")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"cannot write to {folder}: {error}") from None
        self.world.wait()  # until every process has looked for last.pt
        for epoch in range(len(self.rows), self.settings.epochs):
            row = {"epoch": epoch, **self._epoch(epoch), **self._evaluate()}
            best = max((self._figure(r) for r in self.rows), default=float("-inf"))
            self.rows.append(row)
            self._save(folder, self._figure(row) > best)
            self.watch.epoch(row)
        return self.rows

    def _epoch(self, epoch: int) -> dict:
        """One pass over the training images, and its figures."""
        settings, world = self.settings, self.world
        seed = settings.seed + 1000 * (epoch + 1)
        timm.utils.random_seed(seed, world.rank)
        self.loader.sampler.set_epoch(seed)
        self.wrapped.train()
        self.watch.begin(f"epoch {epoch + 1} of {settings.epochs}", self.updates)
        loss_sum = torch.zeros((), dtype=torch.float64, device=world.device)
        seen, skipped, update, lr = 0, 0, epoch * self.updates, 0.0
        look = 1 if world.device.type == "cpu" else _LOOK_EVERY
        batches = itertools.islice(self.loader, self.updates * settings.accumulate)
        for index, (pixels, target, unreadable) in enumerate(batches, 1):
            skipped += self.watch.unreadable(unreadable, settings.strict_images, world.rank)
            if pixels is None:
                raise BadInput(f"train: no image of a batch could be read; {unreadable[0]}", world.rank)
            ends = index % settings.accumulate == 0
            with distributed.synchronise(self.wrapped, ends):
                loss = self._forward(pixels, target, update)
                (loss / settings.accumulate).backward()
            loss_sum += loss.detach()
            seen += len(pixels)
            if ends:
                lr = self._update(update)
                update += 1
                if update % look == 0 or index == self.updates * settings.accumulate:
                    self._check(loss_sum, epoch)
                    self.watch.advance(loss=loss_sum.item() / index, lr=lr)
                else:
                    self.watch.advance(lr=lr)
        totals = torch.tensor([loss_sum.item() / index, 1, seen, skipped], dtype=torch.float64)
        loss_mean, size, seen, skipped = world.total(totals).tolist()
        return {"lr": lr, "loss": loss_mean / size, "images": int(seen), "skipped": int(skipped)}

    def _forward(self, pixels: Tensor, target: Tensor, update: int) -> Tensor:
        settings, device = self.settings, self.world.device
        if settings.keep_rate_epochs:
            begin, steps = settings.keep_rate_from * self.updates, settings.keep_rate_epochs * self.updates
            set_keep_rate(self.model, warm_up(update, settings.options["keep_rate"], begin=begin, steps=steps))
        pixels, target = pixels.to(device, non_blocking=True), target.to(device, non_blocking=True)
        if self.mixup is not None:
            pairs = len(pixels) // 2 * 2  # an unreadable image leaves another without a partner
            pixels, target = self.mixup(pixels[:pairs], target[:pairs])
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.amp):
            return self.wrapped(pixels, target, objective.draw_again(self.model, settings))[0]

    def _update(self, update: int) -> float:
        self.schedule.step_update(update)
        if self.settings.clip_grad:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_grad)
        lr = self.optimizer.param_groups[0]["lr"]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(self.model)
        return lr

    def _check(self, loss_sum: Tensor, epoch: int) -> None:
        if not self.world.total(loss_sum.detach().clone()).isfinite():
            kept = f"{Path(self.settings.output) / 'last.pt'} is from the end of epoch {epoch}"
            raise BadInput(
                f"train: the loss is not finite in epoch {epoch + 1}; {kept if epoch else 'nothing is saved'}"
            )

    def _evaluate(self) -> dict:
        settings = self.settings
        if settings.keep_rate_epochs:
            set_keep_rate(self.model, settings.options["keep_rate"])
        options = {
            "batch_size": max(1, settings.batch_size // settings.accumulate // self.world.size),
            "workers": settings.workers,
            "amp": settings.amp,
            "strict": settings.strict_images,
            "watch": self.watch,
        }
        self.objective.eval()
        # Weights that are spread are gathered by the module that spread them, on all processes at once.
        predict = self.wrapped if self.sharded else None
        found = evaluate(self.model, self.held_out, self.world, predict=predict, **options)
        row = {name: found[name] for name in ("top1", "top5", "mAP") if name in found}
        if self.average is not None:
            model = self.average.module
            predict = model if self.sharded else None
            averaged = evaluate(model, self.held_out, self.world, predict=predict, **options)
            row[f"ema_{self.measure}"] = averaged[self.measure]
        return row

    def _figure(self, row: dict) -> float:
        return max(row[self.measure], row.get(f"ema_{self.measure}", 0.0))

    def _save(self, folder: Path, best: bool) -> None:
        weights, optimizer = dcp.get_state_dict(self.objective, self.optimizer, options=_FULL)
        averaged = None if self.average is None else dcp.get_model_state_dict(self.average.module, options=_FULL)
        self.world.wait()
        if not self.world.first:
            return
        state = {
            "model": _under("model.", weights),
            "teacher": _under("teacher.", weights),
            "ema": averaged,
            "optimizer": optimizer,
            "settings": {
                k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self.settings).items()
            },
            "classes": self.classes,
            "rows": self.rows,
        }
        checkpoint.save(folder / "last.pt", state)
        if best:
            checkpoint.save(folder / "best.pt", state)
        text = io.StringIO()
        table = csv.DictWriter(text, self.rows[0], lineterminator="\n")
        table.writeheader()
        table.writerows(self.rows)
        checkpoint.replace(folder / "log.csv", lambda file: file.write(text.getvalue().encode()))

    def _restore(self, last: Path) -> None:
        state = checkpoint.load(last)
        missing = {"model", "teacher", "ema", "optimizer", "rows", "classes"} - state.keys()
        if missing:
            raise BadInput(f"{last} is no checkpoint of a training: it has no {', '.join(sorted(missing))}")
        checkpoint.check_weights(self.model.state_dict(), state["model"], last)
        if state["classes"] != self.classes:
            raise BadInput(f"{last} was trained on {len(state['classes'])} other classes than those of the data")
        if (state["ema"] is None) != (self.average is None):
            raise BadInput(f"{last} and --ema disagree on whether there is an average of the weights")
        weights = {f"model.{name}": t for name, t in state["model"].items()}
        weights |= {f"teacher.{name}": t for name, t in state["teacher"].items()}
        options = dcp.StateDictOptions(full_state_dict=True)
        dcp.set_state_dict(
            self.objective,
            self.optimizer,
            model_state_dict=weights,
            optim_state_dict=state["optimizer"],
            options=options,
        )
        if self.average is not None:
            dcp.set_model_state_dict(self.average.module, state["ema"], options=options)
        self.rows = state["rows"]


def _under(prefix: str, weights: dict) -> dict:
    return {name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix)}
