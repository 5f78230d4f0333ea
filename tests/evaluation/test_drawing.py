"""Names on pictures are unchanged and in a font with their letters; labels are placed where they cover least."""

import time

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from mmdet.registry import VISUALIZERS
from mmdet.structures import DetDataSample
from mmdet.visualization import DetLocalVisualizer
from mmengine.structures import InstanceData

from spec_mmdet.evaluation import drawing, plots
from spec_mmdet.evaluation.drawing import (
    LabelPlacer,
    LabelVisualizer,
    Mark,
    draw,
    find_font,
    list_letters,
    use_font_for,
)

NAMES = ['US$5_^ or $\\frac{$', '$_$', 'Größe <b>', 'красный', '%', '\\']


def test_names_are_not_read_as_mathematics():
    with use_font_for(NAMES):
        plots.draw_confusion(np.eye(len(NAMES) + 1, dtype=int), NAMES).savefig('/dev/null', format='png')
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
    assert find_font(set(map(ord, 'Größe красный'))) == ('DejaVu Sans', set())
    (letter, *_) = sorted(list_letters(symbols) - list_letters(own))
    monkeypatch.setattr(drawing, 'findSystemFonts', lambda: [str(tmp_path / 'absent.ttf'), symbols])
    assert find_font({letter, ord('a')}) == ('STIXGeneral', set())
    with use_font_for([f'a{chr(letter)}']):
        assert matplotlib.rcParams['font.sans-serif'][0] == 'STIXGeneral'
    assert not capsys.readouterr().out
    monkeypatch.setattr(drawing, 'findSystemFonts', lambda: [])
    with use_font_for(['红色 a']), pytest.warns(UserWarning, match='Glyph'):
        Figure().text(0, 0, '红色').figure.savefig('/dev/null', format='png')
    assert '2 letters' in capsys.readouterr().out


def overlap(a, b) -> float:
    """Compute how many pixels two boxes have in common."""
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


def place_all(boxes, text, size) -> list:
    placer = LabelPlacer(boxes, size)
    return [(x, y, x + text[0], y + text[1]) for x, y in (placer.place(text, box) for box in boxes)]


def test_labels_do_not_cover_small_boxes():
    """In a crowd of small boxes no box is under a label, and labels are inside the picture without overlap."""
    size, text = (400, 300), (50, 14)
    boxes = [[x, y, x + 12, y + 10] for x in range(40, 360, 80) for y in range(20, 300, 60)]
    labels = place_all(boxes, text, size)
    assert all(0 <= x0 and 0 <= y0 and x1 <= size[0] and y1 <= size[1] for x0, y0, x1, y1 in labels)
    for i, label in enumerate(labels):
        assert not any(overlap(label, box) for box in boxes) and not any(overlap(label, o) for o in labels[:i])


def test_labels_cover_as_little_as_by_exact_areas():
    """The labels of random scenes cover little more than each label's best position, computed from exact areas."""
    rng = np.random.default_rng(0)
    text, size = (50.0, 14.0), (640, 480)

    def cover(label, others):
        return sum(overlap(label, other) / (1 + (other[2] - other[0]) * (other[3] - other[1])) for other in others)

    for count in (10, 60, 200):
        corners, extents = rng.uniform(0, 400, (count, 2)), np.exp(rng.uniform(2, 5, (count, 2)))
        boxes = np.hstack([corners, np.minimum(corners + extents, size)]).tolist()
        taken, best, ours = list(boxes), 0.0, 0.0
        for label, (x0, y0, x1, y1) in zip(place_all(boxes, text, size), boxes):
            w, h = text
            spots = [(x0, y0 - h), (x0, y1), (x1, y0), (x0 - w, y0), (x1 - w, y0 - h), (x1 - w, y1), (x0, y0)]
            inside = [(min(max(x, 0), size[0] - w), min(max(y, 0), size[1] - h)) for x, y in spots]
            best += min(cover((x, y, x + w, y + h), taken) for x, y in inside)
            ours += cover(label, taken)
            taken.append(label)
        assert best <= ours + 1e-9 and ours < 1.1 * best + 0.5, (count, ours, best)


def test_drawing_is_linear_in_the_objects():
    """Four times as many labels take far less than sixteen times as long, and large masks do not copy the image."""
    rng = np.random.default_rng(0)
    image = np.zeros((1500, 2000, 3), np.uint8)

    def measure(count: int) -> float:
        corners = rng.uniform(0, 1400, (count, 2))
        marks = [Mark((x, y, x + 20, y + 15), 'object 0.53', (255, 0, 0)) for x, y in corners]
        start = time.process_time()
        draw(image, marks)
        return time.process_time() - start

    measure(10)
    assert measure(2000) < 8 * measure(500)
    mask = np.zeros((3000, 4000), bool)
    mask[10:50, 20:90] = True
    mark = Mark((20, 10, 90, 50), '', (255, 0, 0), mask)
    assert mark.mask.nbytes == 40 * 70 and mark.corner == (20, 10)
    empty = Mark((0, 0, 5, 5), '', (255, 0, 0), np.zeros((60, 80), bool))
    assert np.array_equal(draw(np.zeros((60, 80, 3)), [empty])[10:], np.zeros((50, 80, 3)))


def test_a_mask_is_drawn_within_its_outline():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (60, 80, 3))
    mask = np.zeros((60, 80), bool)
    mask[10:20, 10:30] = True
    drawn = draw(image, [Mark((10, 10, 30, 20), '', (255, 0, 0), mask, dashed=True)])
    inside, outside = np.s_[13:17, 13:27], np.s_[40:, 40:]
    expected = np.trunc(0.6 * image[inside] + 0.4 * np.array([255, 0, 0]))
    assert np.array_equal(drawn[inside], expected) and np.array_equal(drawn[outside], image[outside])
