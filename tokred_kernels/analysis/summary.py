"""Records compared: a row for each setting and each pair of settings, as the report and its CSV files have them.

Patterns are those after the last block, but for `across_blocks`. A pair has the measures that suit both: IoU where
both drop or fuse patches, clusters where neither drops any, features where both recorded the class token; the others
are NaN.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from . import clusters, features, maps, proxies, sets
from .pattern import kept, labels
from .record import Record, check_comparable

# Images at a time: patterns stay on disk.
_IMAGES = 2048

DENSE = "dense"
REFERENCES = ("topk", "kmedoids")  # to whose patterns "Which Tokens to Use?" compares every method's
FEATURES = ("cka", "procrustes", "mean_cca", "pwcca")
MAPS: dict[str, Callable] = {
    "kl": maps.kl,
    "kl_back": lambda p, q: maps.kl(q, p),
    "js": maps.js,
    "pearson": maps.pearson,
    "spearman": maps.spearman,
    "emd": maps.emd,
    "sim": maps.sim,
}
OF_BLOCK = ("iou", "ioa", "homogeneity", "completeness", "v_measure", *FEATURES)
MEASURES = (*OF_BLOCK, *MAPS)


class Setting:
    """A record, and what comparisons need of it, read once: after a block, or after the last."""

    def __init__(self, record: Record, block: int | None = None) -> None:
        if len(record) == 0:
            raise ValueError(f"{record.path} holds no image")
        self.record, self.header = record, record.header
        self.block = record.header.depth - 1 if block is None else block

    @property
    def method(self) -> str:
        return self.header.method

    def after(self, block: int) -> "Setting":
        return Setting(self.record, block)

    def patterns(self) -> Iterator[np.ndarray]:
        """[n, P] after the block, some images at a time."""
        found = self.record.pattern(self.block)
        for start in range(0, len(found), _IMAGES):
            yield found[start : start + _IMAGES]

    @cached_property
    def packed(self) -> np.ndarray:
        """[n, W]: the kept sets after the block, see `pack`."""
        return np.concatenate([sets.pack(kept(pattern)) for pattern in self.patterns()])

    @cached_property
    def drops(self) -> bool:
        return any((pattern == -1).any() for pattern in self.patterns())

    @cached_property
    def selects(self) -> bool:
        """Some patches are dropped or fused."""
        return any((pattern < 0).any() for pattern in self.patterns())

    @cached_property
    def left(self) -> float:
        """Tokens that are left of the patches of an image, the mean."""
        count = 0
        for pattern in self.patterns():
            rows = np.sort(labels(pattern), 1)
            new = np.diff(rows, axis=1, prepend=-1) != 0
            count += (new & (rows >= 0)).sum()
        return float(count / len(self.record))

    @cached_property
    def depth_map(self) -> np.ndarray:
        return self.record.mean_depth()

    @cached_property
    def feature(self) -> features.Centred | None:
        """The class tokens after the block, or the last before it that has them; None if they cannot be compared."""
        blocks = [block for block in self.header.feature_blocks if block <= self.block]
        try:
            return features.Centred(self.record.feature(max(blocks))) if blocks else None
        except ValueError:  # one image, or the same class token for all
            return None

    @cached_property
    def top1(self) -> np.ndarray:
        return np.array(self.record.rows["top1"])

    @cached_property
    def accuracy(self) -> float:
        """Share of right answers; NaN where an image has no label."""
        label = self.record.rows["label"]
        return float((label == self.top1).mean()) if (label >= 0).all() else math.nan

    def agreement(self, dense: "Setting") -> float:
        """Share of images that get the answer of the dense model."""
        return float((self.top1 == dense.top1).mean())


class Group(NamedTuple):
    """The settings of one model on one data set, which are of the same images: first the dense model."""

    dataset: str
    model: str
    settings: list[Setting]

    @property
    def dense(self) -> Setting:
        return self.settings[0]

    @property
    def reduced(self) -> list[Setting]:
        return self.settings[1:]

    @property
    def rates(self) -> list[float]:
        return sorted({setting.header.keep_rate for setting in self.reduced}, reverse=True)

    def at(self, rate: float) -> list[Setting]:
        return [setting for setting in self.reduced if setting.header.keep_rate == rate]

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(setting.method for setting in self.reduced))


def groups(records: Sequence[Record], methods: Sequence[str]) -> list[Group]:
    """The records by data set and model, without those that have the dense model alone; in a group by method, in the
    order of `methods`, then by falling keep rate.

    Raises:
        ValueError: records of a group that are not of the same images and grid, or have no dense one beside them.
    """
    found: dict[tuple[str, str], list[Setting]] = {}
    for record in records:
        found.setdefault((record.header.dataset, record.header.model), []).append(Setting(record))
    order = [DENSE, *methods]
    for (dataset, model), settings in found.items():
        settings.sort(key=lambda s: (order.index(s.method), -(s.header.keep_rate or 0)))
        if settings[0].method != DENSE:
            raise ValueError(f"no dense record of {model} on {dataset}")
        check_comparable([setting.record for setting in settings])
    return [Group(*key, settings) for key, settings in found.items() if len(settings) > 1]


def compare(a: Setting, b: Setting) -> dict[str, float]:
    """Every measure of MEASURES for settings of the same images; NaN where it does not suit both."""
    row = {**dict.fromkeys(MEASURES, math.nan), **_compare_now(a, b)}
    if DENSE not in (a.method, b.method):
        row.update(compare_maps(a, b))
    return row


def _compare_now(a: Setting, b: Setting) -> dict[str, float]:
    """The measures that there are of one block."""
    row = dict.fromkeys(OF_BLOCK, math.nan)
    if a.selects and b.selects:
        row.update(_kept_sets(a, b))
    if DENSE not in (a.method, b.method) and not a.drops and not b.drops:
        row.update(_clusterings(a, b))
    if a.feature is not None and b.feature is not None:
        row.update(_features(a.feature, b.feature))
    return row


def compare_maps(a: Setting, b: Setting) -> dict[str, float]:
    """The measures of mean depth maps alone, for settings of different images too."""
    return {name: measure(a.depth_map, b.depth_map) for name, measure in MAPS.items()}


def pairs(group: Group) -> list[dict]:
    """Two methods at the same keep rate, and each with the dense model."""
    return [
        _row(group, a, b, keep_rate=rate)
        for rate in group.rates
        for a, b in itertools.combinations([group.dense, *group.at(rate)], 2)
    ]


def across_blocks(group: Group) -> list[dict]:
    """A reference and another method at the same keep rate, after each block that has the class token recorded."""
    rows, blocks = [], group.dense.header.feature_blocks
    for rate in group.rates:
        after = {(s.method, block): s.after(block) for s in group.at(rate) for block in blocks}
        methods = [setting.method for setting in group.at(rate)]
        for reference, method in itertools.product((m for m in REFERENCES if m in methods), methods):
            # Two references are a pair once.
            if method != reference and (reference == REFERENCES[0] or method not in REFERENCES):
                for block in blocks:
                    row = {"keep_rate": rate, "a": reference, "b": method, "block": block}
                    rows.append({**row, **_compare_now(after[reference, block], after[method, block])})
    return rows


def across_rates(group: Group) -> list[dict]:
    """One method at two keep rates; the first keeps more."""
    return [
        {"method": method, "keep_rate_a": a.header.keep_rate, "keep_rate_b": b.header.keep_rate, **compare(a, b)}
        for method in group.methods
        for a, b in itertools.combinations([s for s in group.reduced if s.method == method], 2)
    ]


def across_models(found: Sequence[Group]) -> list[dict]:
    """One method and keep rate in two models on the same images and grid; others have no pair."""
    rows = []
    for a, b in itertools.combinations(found, 2):
        if a.dataset != b.dataset or not _comparable(a, b):
            continue
        for one, other in _same(a, b):
            setting = {"method": one.method, "keep_rate": one.header.keep_rate}
            rows.append({"dataset": a.dataset, "a": a.model, "b": b.model, **setting, **compare(one, other)})
    return rows


def across_datasets(found: Sequence[Group]) -> list[dict]:
    """One model, method and keep rate on two data sets: mean depth maps."""
    rows = []
    for a, b in itertools.combinations(found, 2):
        if a.model == b.model and a.dataset != b.dataset:
            for one, other in _same(a, b):
                setting = {"method": one.method, "keep_rate": one.header.keep_rate}
                rows.append({"model": a.model, "a": a.dataset, "b": b.dataset, **setting, **compare_maps(one, other)})
    return rows


def settings(group: Group) -> list[dict]:
    """A row for the dense model and each setting."""
    return [
        {
            "method": setting.method,
            "keep_rate": math.nan if setting.header.keep_rate is None else setting.header.keep_rate,
            "left": setting.left,
            "depth": float(setting.depth_map.mean()),
            "agreement": setting.agreement(group.dense),
            "accuracy": setting.accuracy,
        }
        for setting in group.settings
    ]


def proxy_rows(group: Group, compared: Sequence[dict]) -> list[dict]:
    """Whether a measure against a reference method predicts who is more accurate, over the other methods.

    Accuracy is the share of right answers, or, of images without labels, of answers of the dense model.

    Args:
        compared: from `pairs`.
    """
    rows = []
    for rate, reference in itertools.product(group.rates, REFERENCES):
        at = {setting.method: setting for setting in group.at(rate)}
        if reference not in at:
            continue
        scores = {method: score(setting, group.dense) for method, setting in at.items()}
        for measure in MEASURES:
            points = [
                (row[measure], scores[reference] - scores[({row["a"], row["b"]} - {reference}).pop()])
                for row in compared
                if row["keep_rate"] == rate and reference in (row["a"], row["b"]) and DENSE not in (row["a"], row["b"])
            ]
            points = [point for point in points if np.isfinite(point).all()]
            if len(points) >= 4:
                found = proxies.proxy(*map(np.array, zip(*points, strict=True)))
                row = {"keep_rate": rate, "reference": reference, "measure": measure, "n": len(points)}
                rows += [{**row, **found._asdict()}] if math.isfinite(found.spearman) else []
    return rows


def score(setting: Setting, dense: Setting) -> float:
    """Accuracy, or without labels the agreement with the dense model."""
    return setting.agreement(dense) if math.isnan(setting.accuracy) else setting.accuracy


def _row(group: Group, a: Setting, b: Setting, keep_rate: float) -> dict:
    return {"keep_rate": keep_rate, "a": a.method, "b": b.method, **compare(a, b)}


def _comparable(a: Group, b: Group) -> bool:
    try:
        check_comparable([a.dense.record, b.dense.record])
    except ValueError:
        return False
    return True


def _same(a: Group, b: Group) -> Iterator[tuple[Setting, Setting]]:
    """Settings of a and b of one method and keep rate."""
    there = {(s.method, s.header.keep_rate): s for s in b.reduced}
    for setting in a.reduced:
        other = there.get((setting.method, setting.header.keep_rate))
        if other is not None:
            yield setting, other


def _kept_sets(a: Setting, b: Setting) -> dict[str, float]:
    """IoU, and IoA with the setting that keeps less on average as B."""
    both, one, other = (np.bitwise_count(x).sum(1, dtype=np.int64) for x in (a.packed & b.packed, a.packed, b.packed))
    less = other if other.mean() <= one.mean() else one
    return {
        "iou": float((both / np.maximum(one + other - both, 1)).mean()),
        "ioa": float((both / np.maximum(less, 1)).mean()),
    }


def _clusterings(a: Setting, b: Setting) -> dict[str, float]:
    total = np.zeros(3)
    for one, other in zip(a.patterns(), b.patterns(), strict=True):
        total += np.sum(clusters.clusterings(labels(one), labels(other)), axis=1)
    return dict(zip(clusters.Clusterings._fields, (total / len(a.record)).tolist(), strict=True))


def _features(x: features.Centred, y: features.Centred) -> dict[str, float]:
    row = {"cka": features.linear_cka(x, y), "procrustes": features.procrustes(x, y)}
    try:
        return {**row, "mean_cca": float(features.cca(x, y).mean()), "pwcca": features.pwcca(x, y)}
    except ValueError:  # fewer images than CCA needs
        return row
