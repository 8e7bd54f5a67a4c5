"""What token reduction keeps, merges and drops, compared: methods, keep rates, models and data sets.

    from tokred_kernels import analysis

    with tokred.trace(model) as traced:
        model(images)
    pattern = analysis.patterns(traced.last, model.num_prefix_tokens)  # [B, blocks, P]
    analysis.iou(analysis.kept(pattern[:, 9]), analysis.kept(other[:, 9])).mean()

Patterns: patterns, kept, labels, depths; recorded: observe, Header, Writer, Record, check_comparable.
Kept sets: iou, ioa, pack, pairwise_iou. Clusters: clusterings.
Features: Centred, linear_cka, procrustes, cca, pwcca. Maps of mean depth: kl, js, pearson, spearman, emd, sim.
Do patterns predict accuracy: proxy.

Everything takes and gives NumPy arrays. The definitions are those of Haurum et al., "Which Tokens to Use? Investigating
Token Reduction in Vision Transformers", ICCVW 2023, where a function does not say otherwise.
"""

from .clusters import Clusterings, clusterings
from .features import Centred, cca, linear_cka, procrustes, pwcca
from .maps import emd, js, kl, pearson, sim, spearman
from .observed import Observed, observe
from .pattern import depths, kept, labels, patterns
from .proxies import Proxy, proxy
from .record import Header, Record, Writer, check_comparable
from .sets import ioa, iou, pack, pairwise_iou

__all__ = [
    "Centred",
    "Clusterings",
    "Header",
    "Observed",
    "Proxy",
    "Record",
    "Writer",
    "cca",
    "check_comparable",
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
    "observe",
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
