"""The confusion matrix of many classes: the most confused ones are drawn, and all counts are listed."""

import time

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg

from spec_mmdet.evaluation.outcomes import Scores
from spec_mmdet.evaluation.plots import (
    CLASSES,
    draw_confusion,
    draw_scores,
    draw_training,
    list_confusions,
    select_confused,
)
from spec_mmdet.training.results import draw_curves


def many_classes() -> tuple[np.ndarray, list[str]]:
    rng = np.random.default_rng(0)
    classes = 1203
    matrix = np.diag(rng.integers(0, 50, classes + 1))
    matrix[-1, -1] = 0
    matrix[:, -1] += rng.poisson(3, classes + 1)
    pairs = rng.integers(0, classes, (2, 400))
    np.add.at(matrix, tuple(pairs), 1)
    matrix[7, 900], matrix[1100, 7] = 60, 40
    return matrix, [f'class {i}' for i in range(classes)]


def test_the_most_confused_classes_are_drawn():
    matrix, names = many_classes()
    start = time.process_time()
    figure = draw_confusion(matrix, names)
    figure.savefig('/dev/null', format='png')
    assert time.process_time() - start < 10  # 30 s with all classes
    (axis,) = figure.axes
    labels = [text.get_text() for text in axis.get_yticklabels()]
    assert len(labels) == CLASSES + 2 and {'class 7', 'class 900', 'class 1100', '1173 others'} < set(labels)
    places = {label: i for i, label in enumerate(labels)}
    share = axis.images[0].get_array()
    assert share[places['class 7'], places['class 900']] == 60 / matrix[7].sum()
    wrong = matrix[:-1, :-1] - np.diag(np.diag(matrix)[:-1])
    confused = wrong.sum(axis=0) + wrong.sum(axis=1)
    drawn = select_confused(matrix, CLASSES)
    assert confused[drawn].min() >= np.delete(confused, drawn).max() and (np.diff(drawn) > 0).all()
    kept = np.isin(np.arange(len(names)), drawn)
    others = matrix[:-1][~kept]
    assert np.isclose(share[places['1173 others'], -1], others[:, -1].sum() / others.sum())


def test_legends_do_not_cover_curves():
    records = [dict(loss=3 / i, loss_mask=1 / i, lr=0.1, iter=i, step=i) for i in range(1, 9)]
    records.append({'coco/bbox_mAP': 0.1, 'coco/segm_mAP': 0.2, 'step': 1})
    ramp = np.linspace(0, 1, 101)
    figures = [
        draw_scores(Scores(ramp, ramp, 1 - ramp, ramp * (1 - ramp)), 'Boxes'),
        draw_curves(records, 'a training'),
        *draw_training(
            {'loss': ([1, 2], [3.0, 2.0]), 'box AP': ([2], [0.5]), 'mask AP': ([2], [0.5])}, ['box AP', 'mask AP']
        ).values(),
    ]
    legends = []
    for figure in figures:
        FigureCanvasAgg(figure).draw()
        for axis in figure.axes:
            if legend := axis.get_legend():
                legends.append(legend)
                assert not legend.get_window_extent().overlaps(axis.get_window_extent())
                assert figure.bbox.containsx(legend.get_window_extent().x0)
    assert len(legends) == 6


def test_few_classes_are_all_drawn():
    matrix = np.array([[5, 2, 1], [0, 3, 0], [12000, 0, 0]])
    (axis,) = draw_confusion(matrix, ['a', 'b']).axes
    assert [text.get_text() for text in axis.get_xticklabels()] == ['a', 'b', 'background']
    assert sorted(text.get_text() for text in axis.texts) == ['1', '12k', '2', '3', '5']


def test_all_counts_are_listed():
    matrix, names = many_classes()
    rows = list_confusions(matrix, names)
    places = {name: i for i, name in enumerate([*names, 'background'])}
    again = np.zeros_like(matrix)
    for row in rows:
        again[places[row['truth']], places[row['predicted']]] = row['count']
    assert np.array_equal(again, matrix) and rows[0]['count'] == matrix.max()
    assert dict(truth='class 7', predicted='class 900', count=60) in rows
