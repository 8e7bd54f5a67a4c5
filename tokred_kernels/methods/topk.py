"""Top-K: in a few blocks, keep the patches that the class token attends to most, and drop the others."""

from dataclasses import dataclass

from torch import Tensor, nn

from ._staged import Staged


@dataclass(frozen=True)
class TopK(Staged):
    """Selection by attention, for any trained model; it gains from fine-tuning.

    In each stage, between attention and MLP, the k patches with the best scores stay, in their order. The score of a
    patch is what the class token attends to it with in this very block, averaged over the heads:

        score_j = 1/H sum_h softmax(q k^T D^-1/2)_h0j

    Tokens have no sizes: average pooling is a plain mean of what is left.
    Source: Haurum et al., "Which Tokens to Use?", ICCVW 2023 (Top-K).

    Options: those of `tokred_kernels.methods.Staged`, and
        scores: "cls", or "mean", the column mean of the attention matrix, for models without a class token.

    Raises:
        ValueError: an option is malformed; the model has no such block, or no class token.
    """

    scores: str = "cls"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scores not in ("cls", "mean"):
            self._refuse('scores must be "cls" or "mean"', self.scores)

    @property
    def fusion(self) -> str:
        """`fuse` of topk_gather."""
        return "none"

    @property
    def fuses(self) -> bool:
        return self.fusion != "none"

    def check(self, model: nn.Module) -> None:
        super().check(model)
        if self.scores == "cls" and not model.has_class_token:
            raise ValueError(f'{self._name()}: the model has no class token to score by; use scores="mean"')
        self._check_heads(model)

    def step(self, block, x: Tensor, size: Tensor | None, r: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if r == 0:
            x = x + block.attend(*block.project(x))[0]
            return x + block.feed_forward(x), size, None
        y, scores = block.heads(*block.project(x), scores=self.scores)
        x, assign, y = block.select_and_norm(x, y, scores, x.shape[1] - block.tokred_prefix - r, self.fusion)
        return x + block.feed_normed(y), size, assign
