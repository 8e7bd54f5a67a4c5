"""What `tokred train` can be told: one field a flag, and one key of a configuration file."""

import dataclasses
import operator
from dataclasses import dataclass, field
from pathlib import Path


class BadInput(ValueError):
    """What the user can put right. `rank` is the only process that knows of it; None: all do."""

    def __init__(self, message: object, rank: int | None = None):
        super().__init__(message)
        self.rank = rank


_LIMITS = {"least": ("at least", operator.ge), "most": ("at most", operator.le), "above": ("above", operator.gt)}


def _say(default: object, text: str, **more: object) -> object:
    return field(default=default, metadata={"help": text, **more})


@dataclass(frozen=True)
class Settings:
    """A training. The method and its options are those of `tokred_kernels.apply`; None trains the dense model."""

    model: str = _say("", "a timm VisionTransformer, such as deit_small_patch16_224")
    data: str = _say("", "the folder of the data", metavar="DIR")
    output: str = _say("", "folder for last.pt, best.pt and log.csv", metavar="DIR")
    method: str | None = None
    options: dict = field(default_factory=dict)
    format: str = _say("folder", "of the data", choices=("folder", "nabirds", "coco", "nuswide"))
    pretrained: bool = _say(False, "start from timm's pretrained weights")
    init: str = _say("", "start from the weights in this file", metavar="FILE")
    model_options: dict = field(default_factory=dict)
    epochs: int = _say(30, "passes over the training data", least=1)
    batch_size: int = _say(256, "images an update, over all processes and accumulated batches", least=1)
    accumulate: int = _say(1, "forwards an update", least=1)
    opt: str = _say("adamw", "timm's name of the optimiser")
    lr: float = _say(5e-5, "learning rate, after the warm-up", above=0)
    min_lr: float = _say(1e-6, "learning rate at the end of the cosine", least=0)
    weight_decay: float = _say(0.05, "of weights, not of biases and norms", least=0)
    warmup_epochs: int = _say(0, "epochs in which the learning rate rises to lr", least=0)
    clip_grad: float = _say(0.0, "largest norm of the gradient; 0: any", least=0)
    smoothing: float = _say(0.1, "label smoothing", least=0, most=0.99)
    drop_path: float = _say(0.1, "stochastic depth", least=0, most=0.99)
    mixup: float = _say(0.0, "alpha of mixup, 0.8 in DeiT; 0: none", least=0)
    cutmix: float = _say(0.0, "alpha of cutmix, 1 in DeiT; 0: none", least=0)
    augment: str = _say("", "timm's automatic augmentation, such as rand-m9-mstd0.5-inc1; nothing: none")
    erase: float = _say(0.0, "probability of random erasing", least=0, most=1)
    repeats: int = _say(1, "repeated augmentation: times that an image is in an epoch that has it, 3 in DeiT", least=1)
    scale: float = _say(0.08, "least area of the random crop; 1: only resized", above=0, most=1)
    flip: float = _say(0.5, "probability of a horizontal flip", least=0, most=1)
    ema: float = _say(0.0, "decay of an average of the weights, such as 0.9999; 0: none", least=0, most=0.9999999)
    amp: bool = _say(False, "automatic mixed precision, bfloat16")
    checkpointing: bool = _say(False, "gradient checkpointing")
    compile: bool = _say(False, "torch.compile")
    exits: tuple[int, ...] = field(default=())
    exit_at: str = _say("post_block", "where exits read the class token", choices=("post_block", "post_attn"))
    exit_weight: float = _say(0.15, "metr: weight of the exits' loss", least=0)
    distill_weight: float = _say(0.15, "metr: weight of what exits learn from the last logits", least=0)
    tau: float = _say(1.0, "metr: temperature of that", above=0)
    consistency: float = _say(3.0, "mctf: weight of the second pass's consistency; 0: no second pass", least=0)
    ratio_weight: float = _say(2.0, "dynamicvit: weight of the share of patches kept", least=0)
    keep_rate_from: int = _say(0, "epoch from which the keep rate comes down from 1", least=0)
    keep_rate_epochs: int = _say(0, "epochs in which it does, by a cosine; 0: it is constant", least=0)
    strict_images: bool = _say(False, "stop at an unreadable image instead of skipping it")
    workers: int = _say(0, "processes that load images, for each process that trains", least=0)
    device: str = _say("", "cpu or cuda (default: cuda where there is one)")
    fsdp: bool = _say(False, "shard weights over the processes (FSDP2) instead of copying them (DDP)")
    seed: int = _say(0, "of everything random", least=0, most=2**31 - 1)

    def check(self) -> None:
        """Raises BadInput for values out of range, and for combinations that make no sense."""
        for name in ("model", "data", "output"):
            if not getattr(self, name):
                raise BadInput(f"train: --{name} is needed")
        for f in dataclasses.fields(self):
            check_range(f, getattr(self, f.name))
        if self.warmup_epochs >= self.epochs and self.warmup_epochs:
            raise BadInput(f"train: warmup_epochs must be below epochs, {self.epochs}, got {self.warmup_epochs}")
        if self.keep_rate_epochs and self.compile:
            raise BadInput("train: a keep rate that changes and --compile do not go together: every rate is a graph")
        if self.compile and self.exit_at == "post_attn":
            raise BadInput("train: exits at post_attn need hooks, which --compile does not see")
        if self.init and self.pretrained:
            raise BadInput("train: give either --init or --pretrained")
        if self.exits and self.method != "metr":
            raise BadInput(f"train: exits are metr's, the method is {self.method}")
        if Path(self.data).exists() and not Path(self.data).is_dir():
            raise BadInput(f"train: the data must be a folder, {self.data} is a file")


def check_range(f: dataclasses.Field, value: object) -> None:
    for key, (words, holds) in _LIMITS.items():
        if key in f.metadata and not holds(value, f.metadata[key]):  # NaN holds nowhere
            raise BadInput(f"train: {f.name} must be {words} {f.metadata[key]}, got {value!r}")
