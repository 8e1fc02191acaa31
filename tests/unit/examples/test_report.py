"""The picture is drawn from plain values."""

from __future__ import annotations

from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from examples.demo_parts.report import Curve, Lane, Save, Story, draw

PIXELS = (1248, 1560, 4)


def story(*, continued: int = 4) -> Story:
    steps, losses = [1, 2, 3, 4], [5.0, 4.0, 3.0, 2.5]
    saves = [Save(2, 1.0, 1.1, committed=True), Save(3, 1.5, 1.6, committed=False)]
    return Story(
        reference=Curve("reference", steps, losses),
        killed=Curve("killed", steps, losses),
        lost=(3, 3),
        kill_step=3,
        continued=[Curve(f"c{n}", [5, 6], [2.0, 1.5]) for n in range(continued)],
        lanes=[
            Lane("reference", [(0.5, 2.0)], saves[:1], None, 0),
            Lane("killed", [(0.5, 1.6), (4.0, 5.0)], saves, 1.6, 2),
        ],
    )


@pytest.mark.parametrize("continued", [0, 1, 4])
def test_a_picture_is_written(tmp_path: Path, continued: int) -> None:
    file = tmp_path / "new folder" / "report.png"
    draw(story(continued=continued), file)
    pixels = matplotlib.image.imread(file)
    assert pixels.shape == PIXELS
    # Some of it is ink: not a blank page.
    assert 0.02 < float(np.mean(pixels[:, :, :3].min(axis=2) < 0.95)) < 0.5
