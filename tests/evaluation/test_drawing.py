"""Names on pictures: as they are, in a font that has their letters."""

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from mmdet.structures import DetDataSample
from mmdet.visualization import DetLocalVisualizer
from mmengine.structures import InstanceData

from spec_mmdet.evaluation import drawing, report
from spec_mmdet.evaluation.drawing import font_for, letters_of, names_drawn

NAMES = ['US$5_^ or $\\frac{$', '$_$', 'Größe <b>', 'красный', '%', '\\']


def test_a_name_is_no_mathematics():
    with names_drawn(NAMES):
        report.draw_confusion(np.eye(len(NAMES) + 1, dtype=int), NAMES).savefig('/dev/null', format='png')
        visualizer = DetLocalVisualizer()
        visualizer.dataset_meta = dict(classes=NAMES, palette='random')
        found = InstanceData(bboxes=np.array([[5.0, 5, 40, 40]] * 6), labels=np.arange(6), scores=np.ones(6))
        visualizer.add_datasample('x', np.zeros((64, 64, 3), np.uint8), DetDataSample(pred_instances=found))
        assert visualizer.get_image().any()
    assert matplotlib.rcParams['text.parse_math']


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
