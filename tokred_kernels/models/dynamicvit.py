"""What the loss of DynamicViT needs, from one forward in training."""

from torch import Tensor, nn

from .. import methods
from ._refuse import check_uncompiled


def policy_logits(model: nn.Module, images: Tensor) -> tuple[Tensor, dict[int, Tensor], Tensor]:
    """The logits of a DynamicViT in training, the decisions of its stages and its patches.

    With keep_i the decisions of stage i, rho_i the share to keep (0.7, 0.49, 0.343), and the dense model as teacher:

        loss = CE(logits) + 2 mean_i mean_B (mean_P keep_i - rho_i)^2 + 1/2 KL(logits, teacher's logits)
               + 1/2 MSE(patches that the last stage keeps, the teacher's same patches)

    Args:
        model: patched with "dynamicvit", in training mode, run eagerly.
        images: [B, 3, H, W].

    Returns:
        logits [B, classes]; {block: keep [B, P]}, 1 or 0, with gradients, for each stage; the patches [B, P, C] after
        the final norm, dropped ones too.

    Raises:
        ValueError: the model is of another method, compiled or in eval mode.

    Source: Rao et al., "DynamicViT", NeurIPS 2021, section 3.3.
    """
    if not isinstance(getattr(model, "tokred_method", None), methods.DynamicViT):
        raise ValueError('policy_logits: the model is not patched with "dynamicvit"')
    check_uncompiled("policy_logits", model)
    if not model.training:
        raise ValueError("policy_logits: the model is in eval mode, where patches are removed; call model.train()")
    x, size = model._embed(images), None
    prefix = model.num_prefix_tokens
    keep = {}
    for index, (block, r) in enumerate(zip(model.blocks, model._schedule(x), strict=True)):
        # Not by hooks: under reentrant checkpointing they would see decisions without gradients.
        x, size = model._run(block, x, size, r)
        if r:
            keep[index] = size[:, prefix:]
    x = model.norm(x)
    return model.forward_head(x, size=size), keep, x[:, prefix:]
