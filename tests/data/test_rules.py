"""Compare the rules with an independent truth: pycocotools' masks and MMDetection's data set."""

import json
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mmdet.registry import DATASETS
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO

from spec_mmdet.configs import find_config, read_config
from spec_mmdet.data.checks import LIMITS, check_annotations, check_contents, check_object, find_limits
from spec_mmdet.data.findings import Findings
from spec_mmdet.data.rules import (
    compare_mask_and_box,
    decode_runs,
    explain_exclusion,
    explain_image_exclusion,
    find_mask_fault,
    find_sound_objects,
    rasterise,
)

SIZE = (60, 40)  # width, height


@given(st.integers(1, 50), st.integers(1, 50), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_runs_equal_those_of_pycocotools(height, width, share, seed):
    mask = (np.random.default_rng(seed).random((height, width)) < share).astype(np.uint8)
    code = mask_utils.encode(np.asfortranarray(mask))
    code['counts'] = code['counts'].decode()
    runs = decode_runs(code['counts'])
    decoded = np.concatenate([np.full(run, i % 2) for i, run in enumerate(runs)])
    assert np.array_equal(decoded.reshape(width, height).T, mask)
    assert (find_mask_fault(code, width, height) == '') == mask.any()
    listed = dict(size=[height, width], counts=runs.tolist())
    assert find_mask_fault(listed, width, height) == find_mask_fault(code, width, height)
    broken = dict(code, counts=code['counts'][:-1])
    assert find_mask_fault(broken, width, height)


def test_invalid_rle_is_rejected():
    """pycocotools decodes every accepted RLE to a mask of the size that its counts give."""
    draw = random.Random(0)
    for _ in range(5000):
        text = ''.join(chr(draw.randint(33, 126)) for _ in range(draw.randint(0, 9)))
        code = dict(size=[SIZE[1], SIZE[0]], counts=text)
        if not find_mask_fault(code, *SIZE):
            assert mask_utils.decode(code).sum() == decode_runs(text)[1::2].sum() > 0


@pytest.mark.parametrize(
    'mask',
    [
        [],
        {},
        'text',
        [[]],
        [[1, 2, 3, 4]],
        [[1, 2, 3, 4, 5, 6, 7]],
        [[1, 2, 3, 4, 5, None]],
        [[1, 2, 3, 4, 5, '6']],
        [[1, 2, 3, 4, 5, float('inf')]],
        [[1, 2, 3, 4, 5, 10**400]],
        [[1, 2, 3, 4, 5, 1e300]],
        [[1e300, 2, -1e300, 4, 5, 6]],
        [[1, 2, 3, 4, 5, 6], None],
        [1, 2, 3, 4, 5, 6],
        dict(size=[40, 60], counts=None),
        dict(size=[60, 40], counts=[100, 2300]),
        dict(size=[40.0, 60.0], counts=[100, 2300]),
        dict(size=None, counts=[100, 2300]),
        dict(size=[40, 60], counts=[]),
        dict(size=[40, 60], counts=[2400]),
        dict(size=[40, 60], counts=[100.5, 2299.5]),
        dict(size=[40, 60], counts=[-100, 2500]),
        dict(size=[40, 60], counts=[100, 2**32 + 2300]),
        dict(size=[40, 60], counts=[100, float('nan')]),
        dict(size=[40, 60], counts=['100', 2300]),
        dict(size=[40, 60], counts='ö'),
        dict(size=[40, 60], counts=''),
        dict(size=[40, 60], counts='oooooooooooo'),
        dict(size=[40, 60], counts='o'),
    ],
    ids=str,
)
def test_faulty_masks(mask):
    assert find_mask_fault(mask, *SIZE)


def square(x: float, y: float, w: float, h: float) -> list[list[float]]:
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


@pytest.mark.parametrize(
    ('mask', 'box', 'fault', 'doubt'),
    [
        (square(10, 10, 20, 20), [10, 10, 20, 20], '', ''),
        (square(11, 9, 20, 20), [10, 10, 20, 20], '', ''),
        (square(5, 5, 10, 10), [10, 10, 20, 20], 'outside of their boxes', ''),
        (square(40, 10, 10, 10), [10, 10, 20, 20], 'outside of their boxes', ''),
        (square(10, 10, 20, 20), [10, 10, 30, 30], 'boxes that are corners', ''),
        (square(10, 10, 8, 8), [10, 10, 30, 28], '', 'less than half'),
        (square(0.1, 0.1, 0.3, 0.3), [10, 10, 30, 28], 'cover no pixel', ''),
        ([[3, 3, 20, 20, 37, 37]], [3, 3, 34, 34], 'cover no pixel', ''),
        ([[3, 3, 3, 3, 3, 3]], [3, 3, 1, 1], '', 'cover no pixel'),
        (square(30, 20, 0.5, 2), [30, 20, 1, 2], '', ''),
    ],
    ids=range(10),
)
def test_masks_against_boxes(mask, box, fault, doubt):
    for same in (mask, rasterise(mask, *SIZE)):
        if not (mask_utils.area(rasterise(mask, *SIZE)) == 0 and same is not mask):  # rejected as an empty RLE
            found = compare_mask_and_box(same, box, *SIZE)
            assert fault in found[0] and doubt in found[1] and bool(found[0]) == bool(fault), (found, same)


def test_objects_that_are_sound_together_are_sound_one_by_one():
    """Only objects that break no rule are found by NumPy, and ordinary ones are."""
    draw, values = random.Random(0), [-50, -1, 0, 0.5, 1, 30, 70, 1e300, float('nan'), float('inf')]
    image = dict(width=SIZE[0], height=SIZE[1])
    ordinary = [dict(image_id=1, bbox=[9, 8, 20, 15], area=300, iscrowd=0, segmentation=square(9, 8, 20, 15))]
    annotations = ordinary * 3
    for _ in range(3000):
        x, y, w, h = (draw.choice((5, 9.5, 20)) for _ in range(4))
        entry = dict(image_id=draw.choice((1, 1, 2)), bbox=[x, y, w, h], area=w * h, iscrowd=0)
        entry['segmentation'] = square(x, y, w, h) * draw.choice((1, 1, 1, 2))
        for place in (entry['bbox'], entry['segmentation'][0]):
            if draw.random() < 0.4:
                place[draw.randrange(len(place))] = draw.choice(values)
        if draw.random() < 0.2:
            entry[draw.choice(('area', 'iscrowd', 'ignore'))] = draw.choice((0, 1, -1, float('nan')))
        if draw.random() < 0.1:
            entry['segmentation'] = draw.choice((None, [], [[]], dict(counts='', size=[1, 1]), [[1, 2, 3, 4, 5]]))
        annotations.append(entry)
    found = find_sound_objects(annotations, {1: SIZE})
    assert {0, 1, 2} < found and len(found) > 300
    for place in found:
        assert check_object(annotations[place], image, True) == ('', ''), annotations[place]
        assert annotations[place]['image_id'] == 1
    assert not find_sound_objects([{**ordinary[0], 'bbox': [9, 8, 20, 15, 60, 40], 'image_id': 2}], {1: SIZE})
    for odd in (True, '3', None, 10**400):  # types that NumPy would convert
        for changed in (dict(area=odd), dict(bbox=[9, 8, 20, odd]), dict(segmentation=[[9, 8, 29, 8, odd, 23]])):
            assert not find_sound_objects([{**ordinary[0], **changed}], {1: SIZE})


def test_the_training_objects_equal_those_of_mmdetection(tmp_path):
    """Compare objects of every kind in images of every kind with what the data set passes on to training."""
    draw = random.Random(1)
    images = [dict(id=i, file_name=f'{i}.png', width=60, height=draw.choice((20, 40))) for i in range(40)]
    annotations = []
    for i in range(160):
        w, h = draw.choice((0.5, 5)), draw.choice((0.5, 5))
        flags = dict(iscrowd=int(draw.random() < 0.2), area=w * h if min(w, h) >= 1 else 0)
        flags |= dict(ignore=1) if draw.random() < 0.1 else {}
        box = dict(id=i, image_id=draw.randrange(25), category_id=draw.randrange(2), bbox=[5, 5, w, h], **flags)
        annotations.append(box)
    coco = dict(images=images, annotations=annotations, categories=[dict(id=i, name=f'{i}') for i in range(2)])
    path = tmp_path / 'a.json'
    path.write_text(json.dumps(coco))
    for filter_cfg in ({}, dict(filter_empty_gt=True), dict(min_size=32), dict(filter_empty_gt=True, min_size=32)):
        cfg = dict(
            type='CheckedCocoDataset', ann_file=str(path), data_prefix=dict(img=''), filter_cfg=filter_cfg, pipeline=[]
        )
        dataset = DATASETS.build(cfg | dict(metainfo=dict(classes=('1',))))
        theirs = {}
        for i in range(len(dataset)):
            info = dataset.get_data_info(i)
            theirs[info['img_id']] = sum(not instance['ignore_flag'] for instance in info['instances'])
        taken = [a for a in annotations if a['category_id'] == 1]
        with_objects = {a['image_id'] for a in taken}
        ours = {i['id']: 0 for i in images if not explain_image_exclusion(i, i['id'] in with_objects, filter_cfg)}
        for annotation in taken:
            if annotation['image_id'] in ours and not explain_exclusion(annotation):
                ours[annotation['image_id']] += 1
        assert ours == theirs


def test_more_objects_than_are_detected_or_evaluated():
    """The model keeps 100 detections per image, AP counts 100 per image and class."""

    def counted(numbers: list[int], **limits) -> dict[str, list[int]]:
        images = [dict(id=1, file_name='a.png', width=99, height=99)]
        box = dict(image_id=1, bbox=[1, 1, 40, 40], area=1600, iscrowd=0)
        objects = [dict(box, category_id=c) for c, number in enumerate(numbers) for _ in range(number)]
        categories = [dict(id=c, name=str(c)) for c in range(len(numbers))]
        found = Findings()
        coco = dict(images=images, annotations=objects, categories=categories)
        check_contents(coco, 'it', found, training=False, limits=limits or LIMITS)
        return {kind: places for kind, places in found.warnings.items() if 'objects, of which' in kind}

    assert not counted([100]) and not counted([60, 40])
    ((kind, places),) = counted([120, 10]).items()
    assert 'rcnn.max_per_img=N test_evaluator.proposal_nums=1,10,N' in kind and '130 objects' in str(places[0])
    ((kind, _),) = counted([60, 50]).items()
    assert 'max_per_img' in kind and 'proposal_nums' not in kind
    assert not counted([120], **{'model.test_cfg.rcnn.max_per_img': 200, 'test_evaluator.proposal_nums': 200})

    cfg = read_config(find_config('xcit_spec_maskrcnn'))
    assert find_limits(cfg, 'test') == LIMITS
    cfg.merge_from_dict({'model.test_cfg.rcnn.max_per_img': 300, 'val_evaluator.proposal_nums': (1, 10, 300)})
    assert find_limits(cfg, 'val') == {'model.test_cfg.rcnn.max_per_img': 300, 'val_evaluator.proposal_nums': 300}


def test_coco_has_no_fault(coco_mini):
    for split in ('train2017', 'val2017'):
        coco = COCO(str(coco_mini / 'annotations' / f'instances_{split}.json')).dataset
        found = Findings()
        check_annotations(coco, split, found, masks=True)
        assert not found.errors
        assert [kind for kind in found.warnings if 'crowd' not in kind and 'narrower' not in kind] == []
