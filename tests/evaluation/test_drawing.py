"""Names on pictures: as they are, in a font that has their letters."""

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from mmdet.registry import VISUALIZERS
from mmdet.structures import DetDataSample
from mmdet.visualization import DetLocalVisualizer
from mmengine.structures import InstanceData

from spec_mmdet.evaluation import drawing, figures
from spec_mmdet.evaluation.drawing import (
    LabelVisualizer,
    Mark,
    draw,
    font_for,
    letters_of,
    names_drawn,
    overlap,
    place,
)

NAMES = ['US$5_^ or $\\frac{$', '$_$', 'Größe <b>', 'красный', '%', '\\']


def test_a_name_is_no_mathematics():
    with names_drawn(NAMES):
        figures.draw_confusion(np.eye(len(NAMES) + 1, dtype=int), NAMES).savefig('/dev/null', format='png')
        visualizer = LabelVisualizer()
        visualizer.dataset_meta = dict(classes=NAMES, palette='random')
        found = InstanceData(bboxes=np.array([[5.0, 5, 40, 40]] * 6), labels=np.arange(6), scores=np.ones(6))
        visualizer.add_datasample('x', np.zeros((64, 64, 3), np.uint8), DetDataSample(pred_instances=found))
        assert visualizer.get_image().any()
    assert matplotlib.rcParams['text.parse_math']


def test_mmdetections_visualizer_keeps_its_name():
    assert VISUALIZERS.get('DetLocalVisualizer') is DetLocalVisualizer
    assert VISUALIZERS.get('LabelVisualizer') is LabelVisualizer


def test_a_font_is_looked_for(monkeypatch, tmp_path, capsys):
    own = matplotlib.font_manager.findfont('DejaVu Sans')
    symbols = matplotlib.font_manager.findfont('STIXGeneral')
    assert font_for(set(map(ord, 'Größe красный'))) == ('DejaVu Sans', set())
    (letter, *_) = sorted(letters_of(symbols) - letters_of(own))
    monkeypatch.setattr(drawing, 'findSystemFonts', lambda: [str(tmp_path / 'absent.ttf'), symbols])
    assert font_for({letter, ord('a')}) == ('STIXGeneral', set())
    with names_drawn([f'a{chr(letter)}']):
        assert matplotlib.rcParams['font.sans-serif'][0] == 'STIXGeneral'
    assert not capsys.readouterr().out
    monkeypatch.setattr(drawing, 'findSystemFonts', lambda: [])
    with names_drawn(['红色 a']), pytest.warns(UserWarning, match='Glyph'):
        Figure().text(0, 0, '红色').figure.savefig('/dev/null', format='png')
    assert 'warning: 2 letters' in capsys.readouterr().out


def test_labels_leave_what_is_small_to_be_seen():
    """Of a crowd of small boxes, none is under a label, and labels are inside the picture and apart."""
    rng = np.random.default_rng(0)
    size, text = (400, 300), (50, 14)
    boxes = [[x, y, x + 12, y + 10] for x in range(40, 360, 80) for y in range(20, 300, 60)]
    taken = list(boxes)
    for box in boxes:
        x, y = place(text, box, taken, size)
        taken.append([x, y, x + text[0], y + text[1]])
    labels = taken[len(boxes) :]
    assert all(0 <= x0 and 0 <= y0 and x1 <= size[0] and y1 <= size[1] for x0, y0, x1, y1 in labels)
    for i, label in enumerate(labels):
        assert not any(overlap(label, box) for box in boxes) and not any(overlap(label, o) for o in labels[:i])

    image = rng.integers(0, 255, (60, 80, 3))
    mask = np.zeros((60, 80), bool)
    mask[10:20, 10:30] = True
    drawn = draw(image, [Mark((10, 10, 30, 20), '', (255, 0, 0), mask, dashed=True)])
    inside, outside = np.s_[13:17, 13:27], np.s_[40:, 40:]
    expected = np.trunc(0.6 * image[inside] + 0.4 * np.array([255, 0, 0]))
    assert np.array_equal(drawn[inside], expected) and np.array_equal(drawn[outside], image[outside])
