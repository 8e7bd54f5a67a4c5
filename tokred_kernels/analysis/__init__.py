"""What token reduction keeps, merges and drops, compared: methods, keep rates, models and data sets.

    from tokred_kernels import analysis

    with tokred.trace(model) as traced:
        model(images)
    pattern = analysis.patterns(traced.last, model.num_prefix_tokens)  # [B, blocks, P]
    analysis.iou(analysis.kept(pattern[:, 9]), analysis.kept(other[:, 9])).mean()

Patterns: patterns, kept, labels, depths. Kept sets: iou, ioa, pack, pairwise_iou. Clusters: clusterings.
Features: linear_cka, procrustes, cca, pwcca. Maps of mean depth: kl, js, pearson, spearman, emd, sim.
Do patterns predict accuracy: proxy.

Everything takes and gives NumPy arrays. The definitions are those of Haurum et al., "Which Tokens to Use? Investigating
Token Reduction in Vision Transformers", ICCVW 2023, where a function does not say otherwise.
"""

from .clusters import Clusterings, clusterings
from .features import cca, linear_cka, procrustes, pwcca
from .maps import emd, js, kl, pearson, sim, spearman
from .patterns import depths, kept, labels, patterns
from .proxies import Proxy, proxy
from .sets import ioa, iou, pack, pairwise_iou

__all__ = [
    "Clusterings",
    "Proxy",
    "cca",
    "clusterings",
    "depths",
    "emd",
    "ioa",
    "iou",
    "js",
    "kept",
    "kl",
    "labels",
    "linear_cka",
    "pack",
    "pairwise_iou",
    "patterns",
    "pearson",
    "procrustes",
    "proxy",
    "pwcca",
    "sim",
    "spearman",
]
