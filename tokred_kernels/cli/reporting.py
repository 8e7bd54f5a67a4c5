"""The records of `tokred analyze` into its report, without running a model."""

import base64
import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .. import methods
from ..analysis import pattern
from ..analysis.record import Record
from . import datasets, table
from .errors import UserError
from .images import open_image
from .recording import LIST, SUFFIX

if TYPE_CHECKING:
    from ..analysis.report import Example
    from ..analysis.summary import Group


def write(folder: Path, examples: int, progress: table.Stages) -> Path:
    """Writes the report of all records in `folder`; the path of the page.

    Args:
        examples: how many photographs of each data set to show.

    Raises:
        UserError: there is no record, or one is truncated, damaged or not comparable.
    """
    from ..analysis import report, summary

    sets = {path.parent.name: datasets.read(path) for path in sorted(folder.glob(f"*/{LIST}"))}
    progress.stage("reading the records")
    records = [_complete(path, sets) for path in sorted(folder.glob(f"*/*{SUFFIX}"))]
    if not any(record.header.keep_rate for record in records):
        raise UserError(f"no records in {folder}: name a --model and a --method to record")
    records.sort(key=lambda record: (record.header.dataset, record.header.width))

    def pictures(group: "Group") -> list["Example"]:
        return _examples(group, sets[group.dataset], examples, folder / "figures")

    try:
        return report.write(folder, summary.groups(records, list(methods.METHODS)), pictures, progress.stage)
    except ValueError as error:
        raise UserError(error) from None


def _complete(path: Path, sets: dict[str, datasets.Dataset]) -> Record:
    again = "run the same tokred analyze again to finish it"
    try:
        record = Record(path)
        record.verify()
    except ValueError as error:
        raise UserError(f"{error}; {again}" if "truncated" in str(error) else error) from None
    dataset = sets.get(path.parent.name)
    if dataset is None or record.header.dataset != dataset.name:
        raise UserError(
            f"{path} is of the data set {record.header.dataset}, and is not in its folder beside its {LIST}"
        )
    if len(record) != len(dataset.files):
        raise UserError(f"{path} is truncated: {len(record)} of {len(dataset.files)} images; {again}")
    return record


def _examples(group: "Group", dataset: datasets.Dataset, count: int, figures: Path) -> list["Example"]:
    """The first photographs as the model sees them, and what each method makes of them; also one PNG a keep rate."""
    from .. import draw
    from ..analysis import report

    header = group.dense.header
    transform = _transform(header.model)
    found, rows, marks = [], {rate: [] for rate in group.rates}, set()
    for index, file in enumerate(dataset.files[:count]):
        digest = np.frombuffer(hashlib.blake2b(file.read_bytes(), digest_size=16).digest(), "<u8")
        if (digest != group.dense.record.rows["image"][index]).any():
            raise UserError(f"{file} is another image than when it was recorded")
        photograph = transform(open_image(file))
        for rate in group.rates:
            panels = [draw.Titled(photograph, file.name, f"keep {rate:g}")]
            for setting in group.at(rate):
                one = np.array(setting.record.pattern(header.depth - 1)[index])
                source, fused = pattern.labels(one), set(pattern.labels(one[one < -1]).tolist())
                left = len(set(source.tolist()) - {-1})
                marks |= draw.marks(source, fused)
                panels.append(
                    draw.Titled(draw.panel(photograph, source, header.grid, fused), setting.method, str(left))
                )
            found.append(report.Example(file.name, rate, [(p.title, _uri(p.image)) for p in panels]))
            rows[rate].append(panels)
    for rate, lines in rows.items():
        if lines:
            heading = f"{header.model} on {group.dataset}, {header.weights} weights, keep rate {rate:g}: patches left"
            sheet = draw.sheet(lines, heading, marks)
            sheet.save(figures / f"{report.name(group)}.examples.{rate:g}.png", optimize=True)
    return found


def _transform(model: str) -> Callable:
    """What timm's model of that name sees of a photograph; of other models the whole."""
    import timm
    from PIL import Image

    if not timm.is_model(model):
        return lambda image: image.resize((224, 224), Image.Resampling.NEAREST)
    config = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(model).to_dict())
    transform = timm.data.create_transform(**{**config, "mean": (0,) * 3, "std": (1,) * 3}, is_training=False)
    return lambda image: Image.fromarray((transform(image) * 255).round().byte().permute(1, 2, 0).numpy())


def _uri(image) -> str:
    data = io.BytesIO()
    image.save(data, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()
