"""The parts of a training, from its settings: model, loss, data, optimiser, schedule, average."""

import copy

import timm
import timm.data
import timm.loss
import timm.optim
import timm.scheduler
import timm.utils
import torch
from timm.data.distributed_sampler import RepeatAugSampler
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from ..models.metr import add_exits
from ..models.published import load_published
from ..models.timm import apply
from . import checkpoint, data
from .distributed import World
from .keep_rate import set_keep_rate
from .objective import Objective
from .settings import BadInput, Settings


def objective(settings: Settings, split: data.Split) -> Objective:
    """The patched model in its loss, with its exits or its teacher, from random, pretrained or given weights."""
    dense = dense_model(settings, len(split.classes))
    model = copy.deepcopy(dense)
    teacher = None
    try:
        if settings.method is not None:
            apply(model, settings.method, **settings.options)
            if settings.method == "metr":
                add_exits(model, settings.exits or _stages(model))
        if settings.keep_rate_epochs:
            if not isinstance(settings.options.get("keep_rate"), float):
                raise BadInput("train: a keep rate that comes down needs one --keep-rate")
            set_keep_rate(model, 1.0)
    except (ValueError, TypeError) as error:
        raise BadInput(error) from None
    if settings.method == "dynamicvit" and any(block.tokred_part is not None for block in model.blocks):
        teacher = dense.eval().requires_grad_(False)
    if settings.method == "mctf" and settings.consistency and (split.multi_label or not model.has_class_token):
        why = "one class an image" if split.multi_label else "a class token"
        raise BadInput(f"train: the consistency loss of mctf needs {why}; --consistency 0 trains without")
    if settings.checkpointing:
        model.set_grad_checkpointing()
    return Objective(model, criterion(settings, split), settings, teacher)


def dense_model(settings: Settings, classes: int | None) -> nn.Module:
    """timm's model, with as many classes or its own; as good as new for the same settings."""
    if not timm.is_model(settings.model):
        raise BadInput(f"timm has no model {settings.model!r}")
    timm.utils.random_seed(settings.seed)
    options = {"drop_path_rate": settings.drop_path, **settings.model_options}
    if classes is not None:
        options["num_classes"] = classes
    try:
        model = timm.create_model(settings.model, pretrained=settings.pretrained, **options)
    except Exception as error:  # whatever a constructor makes of its options, or a download may raise
        raise BadInput(f"cannot create the model {settings.model}: {type(error).__name__}: {error}") from None
    if settings.init:
        found = checkpoint.load(settings.init)
        if "settings" in found:  # one of our own, maybe with exits
            checkpoint.load_weights(model, found["model"], settings.init)
        else:
            try:
                load_published(model, found)
            except ValueError as error:
                raise BadInput(f"{settings.init}: {error}") from None
    return model


def _stages(model: nn.Module) -> tuple[int, ...]:
    """The blocks that a method may reduce in."""
    return tuple(index for index in range(len(model.blocks)) if model.tokred_method.may_reduce(index)) or tuple(
        model.tokred_method.stages
    )


def criterion(settings: Settings, split: data.Split) -> nn.Module:
    """Cross entropy on indices or on the weights of mixup; asymmetric loss where images have several labels."""
    if split.multi_label:
        return timm.loss.AsymmetricLossMultiLabel(gamma_neg=4, gamma_pos=0, clip=0.05)
    mixed = settings.mixup > 0 or settings.cutmix > 0
    return nn.CrossEntropyLoss(label_smoothing=0 if mixed else settings.smoothing)  # Mixup smooths by itself


def mixup(settings: Settings, split: data.Split) -> timm.data.Mixup | None:
    if not (settings.mixup or settings.cutmix):
        return None
    return timm.data.Mixup(
        settings.mixup,
        settings.cutmix,
        label_smoothing=0 if split.multi_label else settings.smoothing,
        num_classes=len(split.classes),
        multi_label=split.multi_label,
    )


def training_data(settings: Settings, split: data.Split, model: nn.Module, world: World) -> DataLoader:
    """Batches of one forward; the images of an update are the same for any number of processes."""
    pieces = world.size * settings.accumulate
    each = settings.batch_size // pieces
    if each * pieces != settings.batch_size:
        raise BadInput(
            f"train: batch_size {settings.batch_size} must be a multiple of processes x accumulate, {pieces}"
        )
    if (settings.mixup or settings.cutmix) and each % 2:
        raise BadInput(f"train: mixup and cutmix mix pairs, a forward has {each} images")
    if len(split.samples) < settings.batch_size:
        raise BadInput(f"train: {len(split.samples)} images do not fill a batch of {settings.batch_size}")
    whole = settings.scale == 1
    transform = timm.data.create_transform(
        **_config(model),
        is_training=True,
        no_aug=whole and not settings.flip and not settings.augment and not settings.erase,
        scale=(settings.scale, 1.0),
        ratio=(1.0, 1.0) if whole else None,
        hflip=settings.flip,
        color_jitter=0.0,
        auto_augment=settings.augment or None,
        re_prob=settings.erase,
    )
    images = data.Images(split, transform)
    if settings.repeats > 1:  # an epoch has as many images as there are: each this often, or not at all
        sampler = RepeatAugSampler(images, world.size, world.rank, num_repeats=settings.repeats, selected_round=0)
    else:
        sampler = DistributedSampler(images, world.size, world.rank, drop_last=True)
    return data.loader(images, each, sampler, settings.workers, drop_last=True)


def held_out(split: data.Split, model: nn.Module) -> data.Images:
    return data.Images(split, timm.data.create_transform(**_config(model), is_training=False))


def _config(model: nn.Module) -> dict:
    """timm's transform of the model, at the size that it was made for."""
    return timm.data.resolve_model_data_config(model, args={"img_size": model.patch_embed.img_size[0]})


def optimiser(settings: Settings, model: nn.Module) -> torch.optim.Optimizer:
    try:
        return timm.optim.create_optimizer_v2(
            model, settings.opt, settings.lr, settings.weight_decay, filter_bias_and_bn=True
        )
    except (AssertionError, ValueError, KeyError) as error:
        raise BadInput(f"train: timm has no optimiser {settings.opt!r}: {error}") from None


def schedule(settings: Settings, optimizer: torch.optim.Optimizer, updates: int):
    """The learning rate of each update: a linear warm-up, then a cosine; `updates` are those of an epoch."""
    return timm.scheduler.CosineLRScheduler(
        optimizer,
        max(1, updates * settings.epochs),
        lr_min=min(settings.min_lr, settings.lr),
        warmup_t=updates * settings.warmup_epochs,
        warmup_lr_init=settings.lr * 1e-3,
        t_in_epochs=False,
    )


def average(settings: Settings, model: nn.Module) -> timm.utils.ModelEmaV3 | None:
    return timm.utils.ModelEmaV3(model, settings.ema) if settings.ema else None
