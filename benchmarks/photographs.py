"""Photographs that Python packages ship, as two data sets: `python -m benchmarks.photographs FOLDER`.

scikit-learn, scikit-image and matplotlib have sixteen. Each is cut into seven: the whole, and six crops of three fifths
of its sides.
"""

import argparse
import importlib.util
from pathlib import Path

from PIL import Image

SOURCES = {
    "scenes": (
        ("skimage/data", ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")),
        ("sklearn/datasets/images", ("china.jpg", "flower.jpg")),
        ("matplotlib/mpl-data/sample_data", ("grace_hopper.jpg",)),
    ),
    "textures": (
        ("skimage/data", ("brick.png", "coins.png", "grass.png", "gravel.png")),
        ("skimage/data", ("hubble_deep_field.jpg", "ihc.png", "moon.png", "retina.jpg")),
    ),
}
LONGEST = 640  # pixels; models see 224


def crops(image: Image.Image) -> list[Image.Image]:
    """The image, then two rows of three crops that overlap."""
    width, height = image.size
    w, h = width * 3 // 5, height * 3 // 5
    corners = [(x * (width - w) // 2, y * (height - h)) for y in range(2) for x in range(3)]
    return [image, *(image.crop((x, y, x + w, y + h)) for x, y in corners)]


def write(folder: Path) -> None:
    """Makes a folder for each data set, unless it is there."""
    for name, sources in SOURCES.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for inside, files in sources:
            package, _, rest = inside.partition("/")
            for file in files:
                with Image.open(_package(package) / rest / file) as image:
                    photograph = image.convert("RGB")
                photograph.thumbnail((LONGEST, LONGEST))
                for number, crop in enumerate(crops(photograph)):
                    path = folder / name / f"{number}-{Path(file).stem}.png"
                    if not path.exists():
                        crop.save(path)


def _package(name: str) -> Path:
    """Where a package is installed; it is not imported, so that it needs none of its dependencies."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise SystemExit(f"photographs: needs the package {name}")
    return Path(next(iter(spec.submodule_search_locations)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.photographs", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    write(parser.parse_args().folder)
