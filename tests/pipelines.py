"""What tests of pipelines look through, in a module that workers elsewhere can import too."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from serve_batch import runners

with runners.quiet():
    import apache_beam as beam


class Write(beam.DoFn):
    """Elements to files with their time and window: what a worker elsewhere computes is seen by nothing else."""

    def __init__(self, folder: Path, name: str):
        self._folder, self._name = folder, name

    def process(
        self,
        element: Any,
        timestamp: Any = beam.DoFn.TimestampParam,
        window: Any = beam.DoFn.WindowParam,
    ) -> Iterator[None]:
        start = float(getattr(window, "start", 0))
        said = [self._name, element, float(timestamp), start]
        (self._folder / f"{random.getrandbits(64):x}.json").write_text(json.dumps(said))
        yield from ()


def written(folder: Path) -> list[list[Any]]:
    """Returns the name, the element, the time and the start of the window of all that was written."""
    return [json.loads(path.read_text()) for path in folder.glob("*.json")]
