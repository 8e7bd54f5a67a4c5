"""EViT: Top-K that fuses the patches it does not keep into one more token."""

from dataclasses import dataclass

from .topk import TopK


@dataclass(frozen=True)
class EViT(TopK):
    """Selection by the attention of the class token, with the rest fused.

    As `tokred_kernels.methods.topk.TopK`, and the patches that do not stay become one token behind those that do:

        fused = sum_j score_j x_j

    The sum is not normalised, as published. The fused token is an ordinary patch from then on: it competes in later
    stages and counts as one of their patches. Training goes through the scores of the fused token.
    Source: Liang et al., "Not All Patches are What You Need: Expediting Vision Transformers via Token
    Reorganizations" (EViT), ICLR 2022.

    Options: those of TopK, with the rule "evit", and
        fuse: False drops the others instead.
        normalize: divides the fused token by the sum of its scores.

    Raises:
        ValueError: as TopK.
    """

    rule: str = "evit"
    fuse: bool = True
    normalize: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("fuse", "normalize"):
            if not isinstance(getattr(self, option), bool):
                self._refuse(f"{option} must be True or False", getattr(self, option))

    @property
    def fusion(self) -> str:
        return ("mean" if self.normalize else "sum") if self.fuse else "none"
