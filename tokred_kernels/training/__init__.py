"""Training of models with token reduction: the losses of its methods, and what `tokred train` does with them."""

from .keep_rate import set_keep_rate, warm_up
from .losses import consistency, distillation, multi_exit, policy, teacher

__all__ = ["consistency", "distillation", "multi_exit", "policy", "set_keep_rate", "teacher", "warm_up"]
