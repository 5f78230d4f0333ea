"""Plot seconds over pixels from a benchmark of several sizes; linear cost is a line of slope one.

spec-mmdet benchmark --models timm ours --sizes 320x320 640x640 800x1216 --out work_dirs/benchmark
python -m benchmarks.speed_plot work_dirs/benchmark/benchmark.json speed.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure


def draw(rows: list[dict], path: Path, title: str) -> None:
    """Draw the rows of a benchmark, both axes logarithmic."""
    figure = Figure(figsize=(11, 4.5), layout='constrained')
    for axis, job in zip(figure.subplots(1, 2), ('inference', 'training')):
        for name in dict.fromkeys(row['model'] for row in rows):
            points = [(row['height'] * row['width'], row[f'{job}_s']) for row in rows if row['model'] == name]
            axis.loglog(*zip(*points), marker='o', label=name)
        axis.set(xlabel='pixels', ylabel='seconds', title=job)
        axis.legend(loc='upper left', bbox_to_anchor=(1, 1), frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=80)


if __name__ == '__main__':
    content = json.loads(Path(sys.argv[1]).read_text())
    draw(content['rows'], Path(sys.argv[2]), content['settings']['device_name'])
