"""The losses of methods that are trained, each from the output of one call on the model.

    loss = multi_exit(criterion, tokred.exit_logits(model, images), target)                              METR
    loss = consistency(criterion, tokred.two_passes(model, images, r=4), target)                         MCTF
    loss = policy(criterion, tokred.policy_logits(model, images), target, teacher(dense, images), rates) DynamicViT

criterion(logits, target) is the loss of the training: cross entropy on class indices, soft targets of mixup, or any
other. Logits are read in float32, or float64 where they are float64.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Criterion = Callable[[Tensor, Tensor], Tensor]


def distillation(logits: Tensor, teacher: Tensor, *, tau: float = 1.0) -> Tensor:
    """How far logits [B, classes] are from a teacher's, which get no gradient:

    tau^2 mean_B KL(softmax(teacher / tau) || softmax(logits / tau))
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    own, others = ((y.to(wide) / tau).log_softmax(-1) for y in (logits, teacher.detach()))
    return tau**2 * F.kl_div(own, others, reduction="batchmean", log_target=True)


def multi_exit(
    criterion: Criterion,
    output: tuple[Tensor, Mapping[int, Tensor]],
    target: Tensor,
    *,
    exit_weight: float = 0.15,
    distill_weight: float = 0.15,
    tau: float = 1.0,
) -> Tensor:
    """METR's loss, with exits that learn from the target and from the model's own last word:

    criterion(logits) + exit_weight sum_i criterion(exit_i) + distill_weight sum_i distillation(exit_i, logits)

    Args:
        output: of `tokred_kernels.exit_logits`.

    Source: Liu et al., "A Simple Romance Between Multi-Exit Vision Transformer and Token Reduction", ICLR 2024. The
    published code lacks its distillation: that the teacher gets no gradient, and the factor tau^2, are ours.
    """
    logits, exits = output
    loss = criterion(logits, target)
    for early in exits.values():
        loss = loss + exit_weight * criterion(early, target)
        loss = loss + distill_weight * distillation(early, logits, tau=tau)
    return loss


def consistency(
    criterion: Criterion,
    output: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]],
    target: Tensor,
    *,
    weight: float = 3.0,
    threshold: float = 0.4,
) -> Tensor:
    """MCTF's loss: what more fusing leaves of the class token z should be what less fusing leaves,

    criterion(student) + criterion(teacher) + weight mean_{b in S} mean_C (z_teacher - z_student)^2

    where S are the images that the student gives their class a probability above the threshold, of mixed images the sum
    of their classes; 0 if there are none. No gradient flows through z_teacher.

    Args:
        output: of `tokred_kernels.two_passes`: (logits, z) of the student and of the teacher.
        target: class indices [B], or weights [B, classes]; an image is of the classes above its lowest weight.

    Source: Lee et al., "Multi-criteria Token Fusion with One-step-ahead Attention", CVPR 2024.
    """
    (logits, token), (teacher_logits, teacher_token) = output
    wide = torch.promote_types(logits.dtype, torch.float32)
    own = F.one_hot(target, logits.shape[1]) > 0 if target.dim() == 1 else target > target.amin(1, keepdim=True)
    sure = (logits.detach().to(wide).softmax(1) * own).sum(1) > threshold
    apart = (teacher_token.detach().to(wide) - token.to(wide)).square().mean(1)
    apart = torch.where(sure, apart, 0).sum() / sure.sum().clamp(min=1)
    return criterion(logits, target) + criterion(teacher_logits, target) + weight * apart


def policy(
    criterion: Criterion,
    output: tuple[Tensor, Mapping[int, Tensor], Tensor],
    target: Tensor,
    teacher: tuple[Tensor, Tensor],
    rates: Sequence[float],
    *,
    ratio_weight: float = 2.0,
    distill_weight: float = 0.5,
    patch_weight: float = 0.5,
) -> Tensor:
    """DynamicViT's loss: keep as many patches as asked, and agree with the dense model,

    criterion(logits) + ratio_weight mean_i mean_B (mean_P keep_i - rate_i)^2
    + distill_weight distillation(logits, teacher's) + patch_weight mean_{kept, C} (patches - teacher's patches)^2

    where kept are the patches of the batch that the last stage keeps; that term is 0 if there are none.

    Args:
        output: of `tokred_kernels.policy_logits`.
        teacher: of `teacher`; it gets no gradient.
        rates: the share of all patches to keep, one a stage: 0.7, 0.49, 0.343 for a keep rate of 0.7.

    Raises:
        ValueError: not one rate a stage.

    Source: Rao et al., "DynamicViT", NeurIPS 2021, with the weights of its DeiT-S.
    """
    logits, keep, patches = output
    if len(rates) != len(keep):
        raise ValueError(f"policy: rates must have one entry a stage, {len(keep)}, got {list(rates)}")
    teacher_logits, teacher_patches = teacher
    shares = torch.stack([stage.mean(1) for stage in keep.values()])
    ratio = (shares - shares.new_tensor(rates)[:, None]).square().mean()
    kept = list(keep.values())[-1].detach() > 0.5
    wide = torch.promote_types(patches.dtype, torch.float32)
    apart = (patches.to(wide) - teacher_patches.detach().to(wide)).square().mean(2)
    apart = torch.where(kept, apart, 0).sum() / kept.sum().clamp(min=1)
    distilled = distill_weight * distillation(logits, teacher_logits)
    return criterion(logits, target) + ratio_weight * ratio + distilled + patch_weight * apart


@torch.no_grad()
def teacher(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """The logits [B, classes] of a dense timm model and its patches [B, P, C] behind the final norm, for `policy`."""
    x = model.forward_features(images)
    return model.forward_head(x), x[:, model.num_prefix_tokens :]
