"""Test tools/predict.py and its three-line Python equivalent: predictions, pictures, files and errors."""

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import CONFIG, ROOT, assert_ap_is_that_of_pycocotools, error_line, options, run_tool
from mmdet.apis import DetInferencer
from mmengine.config import Config
from mmengine.structures import InstanceData
from PIL import Image
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO

from spec_mmdet.checkpoints.reading import load
from spec_mmdet.commands import predict
from spec_mmdet.data.images import DEEP
from spec_mmdet.inference.inferencer import detect, load_inferencer, predict_files


@pytest.fixture(scope='module')
def nothing(tmp_path_factory, trained) -> Path:
    """The trained detector with all scores below 0.3, so that pictures are written without drawings."""
    checkpoint = load(trained / 'epoch_1.pth')
    checkpoint['state_dict']['roi_head.bbox_head.fc_cls.bias'][-1] += 100
    path = tmp_path_factory.mktemp('nothing') / 'nothing.pth'
    torch.save(dict(state_dict=checkpoint['state_dict']), path)  # as in converted checkpoints, without classes
    return path


def results(folder: Path) -> tuple[list[dict], list[dict]]:
    """Return the images and results that the tool has written."""
    return tuple(json.loads((folder / f'{name}.json').read_text()) for name in ('images', 'predictions'))


def test_predictions_equal_those_of_the_test_command(monkeypatch, shapes, trained, tmp_path):
    detector, val, truth = trained / 'epoch_1.pth', shapes / 'val', shapes / 'annotations' / 'instances_val.json'
    run_tool(monkeypatch, 'test', CONFIG, detector, '--work-dir', tmp_path / 'test', '--out', tmp_path / 'test.pkl',
             *options(shapes))  # fmt: skip
    # A config of COCO's classes: the checkpoint's classes win.
    coco80 = [f'model.roi_head.{head}_head.num_classes=80' for head in ('bbox', 'mask')]
    run_tool(monkeypatch, 'predict', CONFIG, detector, val, '--score', 0, '--batch-size', 12, '--no-pictures',
             '--out', tmp_path / 'out', '--cfg-options', *coco80)  # fmt: skip

    images, predicted = results(tmp_path / 'out')
    assert [category['name'] for category in images['categories']] == ['circle', 'square', 'triangle', 'star']
    names = {image['id']: image['file_name'] for image in images['images']}
    for result in pickle.loads((tmp_path / 'test.pkl').read_bytes()):
        name, expected = Path(result['img_path']).name, result['pred_instances']
        ours = [entry for entry in predicted if names[entry['image_id']] == name]
        x, y, w, h = np.array([entry['bbox'] for entry in ours]).T
        np.testing.assert_allclose(np.stack([x, y, x + w, y + h], axis=1), expected['bboxes'], atol=1e-3)
        np.testing.assert_allclose([entry['score'] for entry in ours], expected['scores'], atol=1e-5)
        assert [entry['category_id'] - 1 for entry in ours] == expected['labels'].tolist()
        for entry, rle in zip(ours, expected['masks'], strict=True):
            assert (mask_utils.decode(entry['segmentation']) != mask_utils.decode(rle)).sum() <= 2
    (reported,) = (json.loads(path.read_text()) for path in (tmp_path / 'test').glob('*/*.json'))
    both = COCO(str(tmp_path / 'out' / 'images.json')).loadRes(str(tmp_path / 'out' / 'predictions.json'))
    assert len(both.anns) == len(predicted) and len(both.imgs) == 12
    ids = {image['file_name']: image['id'] for image in COCO(str(truth)).dataset['images']}
    boxes = [dict(entry, image_id=ids[names[entry['image_id']]]) for entry in predicted]
    masks = [{key: value for key, value in entry.items() if key != 'bbox'} for entry in boxes]
    assert_ap_is_that_of_pycocotools(reported, truth, bbox=boxes, segm=masks)


def test_images_of_the_same_name_and_a_video(monkeypatch, trained, nothing, shapes, tmp_path):
    """Write five frames of rising brightness, with a colour that shows whether red and blue are exchanged."""
    for i, folder in enumerate(('a', 'b'), start=1):
        (tmp_path / folder).mkdir()
        shutil.copy(shapes / 'val' / f'{i:06}.png', tmp_path / folder / 'same.png')
    clip = tmp_path / 'clip.avi'
    writer = cv2.VideoWriter(str(clip), cv2.VideoWriter_fourcc(*'MJPG'), 12, (96, 80))
    for i in range(5):
        writer.write(np.full((80, 96, 3), (10, 20, 50 + 40 * i), np.uint8))
    writer.release()

    out = tmp_path / 'out'
    args = [tmp_path / 'a', f'{tmp_path}/b/*.png', clip, tmp_path / 'b' / 'same.png', '--batch-size', 3]
    run_tool(monkeypatch, 'predict', trained / 'xcit_spec_shapes.py', nothing, *args, '--out', out)
    images, predicted = results(out)
    assert predicted == [] and [category['name'] for category in images['categories']][:2] == ['circle', 'square']
    assert [(image['id'], image['file_name'], image.get('frame_id')) for image in images['images']] == [
        (1, 'a/same.png', None),
        (2, 'b/same.png', None),
        *((3 + i, 'clip.avi', i) for i in range(5)),
    ]
    assert [(image['width'], image['height']) for image in images['images'][1:3]] == [(128, 128), (96, 80)]
    for name in ('a/same.png', 'b/same.png'):  # unchanged if nothing is drawn
        difference = cv2.absdiff(cv2.imread(str(tmp_path / name)), cv2.imread(str(out / name)))
        assert difference.mean() < 3
    video = cv2.VideoCapture(str(out / 'clip.avi'))
    assert video.get(cv2.CAP_PROP_FPS) == 12
    for i in range(5):
        assert video.read()[1].mean(axis=(0, 1)) == pytest.approx([10, 20, 50 + 40 * i], abs=6)
    assert not video.read()[0]

    drawn = tmp_path / 'drawn'
    run_tool(monkeypatch, 'predict', CONFIG, trained / 'epoch_1.pth', tmp_path / 'a', '--score', 0.1, '--out', drawn)
    scores = [entry['score'] for entry in results(drawn)[1]]
    assert scores and min(scores) >= 0.1
    difference = cv2.absdiff(cv2.imread(str(tmp_path / 'a' / 'same.png')), cv2.imread(str(drawn / 'same.png')))
    assert difference.mean() > 10


def test_corrupt_images_do_not_affect_the_others(monkeypatch, trained, shapes, tmp_path, capsys):
    folder = tmp_path / 'images'
    folder.mkdir()
    good = shapes / 'val' / '000001.png'
    (folder / '1.png').write_bytes(good.read_bytes()[:2000])
    shutil.copy(good, folder / '2.png')
    Image.open(good).save(folder / '3.jpg', quality=95)
    (folder / '3.jpg').write_bytes((folder / '3.jpg').read_bytes()[:-200])
    (folder / '4.png').write_bytes(b'')
    (folder / '5.png').mkdir()
    (folder / '6.png').write_text('text')
    (folder / '._2.png').write_bytes(b'\0\5\x16\7')
    for name in ('7.png', '8.png'):
        cv2.imwrite(str(folder / name), cv2.imread(str(good), cv2.IMREAD_GRAYSCALE).astype(np.uint16) * 16)
    for name, height in (('90.png', 20), ('91.png', 4)):  # after scaling, 1 pixel high, which is padded, or none
        Image.new('RGB', (2000, height)).save(folder / name)
    for inputs in (folder, f'{folder}/*.*'):
        out = tmp_path / f'out{inputs == folder}'
        args = [CONFIG, trained / 'epoch_1.pth', inputs, '--score', 0, '--out', out, '--no-pictures', '--batch-size', 4]
        args += ['--cfg-options', 'test_dataloader.dataset.pipeline.1.keep_ratio=True']
        refusal = error_line(monkeypatch, 'predict', *args)
        assert f'6 of 10 inputs failed, first {folder / "1.png"}' in refusal
        images, predicted = results(out)
        assert [image['file_name'] for image in images['images']] == ['2.png', '7.png', '8.png', '90.png'] and predicted
        printed = capsys.readouterr().out
        assert all(
            f'  {folder / name}\n' in printed for name in ('1.png', '3.jpg', '4.png', '5.png', '6.png', '91.png')
        )
        assert printed.count('8 bits') == 1 and f'2 {DEEP}; first: {folder / "7.png"}' in printed
        assert ('hidden files: ._2.png' in printed) == (inputs == folder)


def test_masks_below_the_score_are_not_built(trained, shapes):
    """The detector's own output, before predict filters it, is that of a lower score threshold without the rest."""
    image = cv2.imread(str(shapes / 'val' / '000001.png'))

    def find(score: float) -> InstanceData:
        cfg = Config.fromfile(trained / 'xcit_spec_shapes.py')
        (sample,) = detect(load_inferencer(cfg, str(trained / 'epoch_1.pth'), 'cpu', score), [image])
        return sample.pred_instances

    everything = find(0.0)
    score = everything.scores.median().item()  # exactly the score of one of them
    found, kept = find(score), everything[everything.scores >= score]
    assert 0 < len(found.masks) == len(kept) < len(everything)
    for key in ('scores', 'labels', 'bboxes', 'masks'):
        assert torch.equal(found[key], kept[key])


def test_images_that_the_detector_rejects_are_reported(monkeypatch, trained, shapes, tmp_path, capsys):
    """One of four images in a batch fails, as for lack of memory."""
    folder = tmp_path / 'images'
    folder.mkdir()
    for i in (1, 3, 4):
        shutil.copy(shapes / 'val' / f'{i:06}.png', folder / f'{i}.png')
    cv2.imwrite(str(folder / '2.png'), np.zeros((10, 4000, 3), np.uint8))
    forward = DetInferencer.forward

    def reject(self, inputs, **kwargs):
        if any(sample.ori_shape == (10, 4000) for sample in inputs['data_samples']):
            raise RuntimeError('you tried to allocate\nmuch')
        return forward(self, inputs, **kwargs)

    monkeypatch.setattr(DetInferencer, 'forward', reject)
    args = [CONFIG, trained / 'epoch_1.pth', folder, '--score', 0.1, '--batch-size', 4, '--out', tmp_path / 'out']
    refusal = error_line(monkeypatch, 'predict', *args)
    assert f'1 of 4 inputs failed, first {folder / "2.png"} (images of 4000 x 10 pixels' in refusal
    assert 'too little memory' in refusal
    images, predicted = results(tmp_path / 'out')
    assert [image['file_name'] for image in images['images']] == ['1.png', '3.png', '4.png']
    assert {entry['image_id'] for entry in predicted} == {1, 2, 3}
    assert f'  {folder / "2.png"}\n' in capsys.readouterr().out


def test_frames_that_the_detector_rejects_stay_in_the_video(trained, nothing, tmp_path):
    """Reject the third of five frames of rising brightness, for lack of memory."""
    clip = tmp_path / 'clip.avi'
    writer = cv2.VideoWriter(str(clip), cv2.VideoWriter_fourcc(*'MJPG'), 12, (96, 80))
    for i in range(5):
        writer.write(np.full((80, 96, 3), 50 + 40 * i, np.uint8))
    writer.release()
    inferencer = load_inferencer(Config.fromfile(trained / 'xcit_spec_shapes.py'), str(nothing), 'cpu')
    forward = inferencer.model.test_step

    def reject(data):
        if any(100 < image.float().mean() < 150 for image in data['inputs']):
            raise MemoryError
        return forward(data)

    inferencer.model.test_step = reject
    count, damaged, _ = predict_files(inferencer, [clip], tmp_path / 'out', {}, batch_size=2)
    assert (
        count == 4 and [paths for paths in damaged.values()] == [[clip]] and 'too little memory' in next(iter(damaged))
    )
    assert [image['frame_id'] for image in results(tmp_path / 'out')[0]['images']] == [0, 1, 3, 4]
    video = cv2.VideoCapture(str(tmp_path / 'out' / 'clip.avi'))
    for i in range(5):
        assert video.read()[1].mean() == pytest.approx(50 + 40 * i, abs=8)


def test_unusable_inputs(monkeypatch, trained, shapes, tmp_path):
    detector, image = trained / 'epoch_1.pth', shapes / 'val' / '000001.png'
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'notes.txt').write_text('text')
    (tmp_path / 'text.png').write_text('text')
    (tmp_path / 'text.mp4').write_text('text')
    out = tmp_path / 'out'
    for args, says in (
        (['absent.py', detector, image], 'config absent.py: no such file'),
        ([CONFIG, 'absent.pth', image], 'checkpoint absent.pth: no such file'),
        ([CONFIG, tmp_path / 'notes.txt', image], 'not a checkpoint'),
        ([CONFIG, detector, image, 'absent.png'], 'absent.png: no such file or folder'),
        ([CONFIG, detector, tmp_path / 'empty'], 'no images'),
        ([CONFIG, detector, f'{tmp_path}/*.jpg'], 'matches no images'),
        ([CONFIG, detector, tmp_path / 'notes.txt'], 'neither an image'),
        ([CONFIG, detector, image, tmp_path / 'text.png'], 'text.png: OpenCV cannot read'),
        ([CONFIG, detector, tmp_path / 'text.mp4'], 'text.mp4: OpenCV cannot read'),
        ([CONFIG, detector, image, '--score', 30], '--score must be from 0 to 1'),
        ([CONFIG, detector, image, '--device', 'abacus'], '--device abacus: '),
        ([CONFIG, detector, image, '--out', tmp_path], 'exists and is not empty'),
        (
            [CONFIG, detector, image, '--cfg-options', 'model.backbone.conditioning.lam=2.0'],
            'made with conditioning',
        ),
        (
            [CONFIG, detector, image, '--cfg-options', 'model.rpn_head.anchor_generator.scales=[4,8]'],
            'does not fit the configured model',
        ),
        ([ROOT / 'configs' / '_base_' / 'coco_3x.py', detector, image], 'lacks a model'),
    ):
        assert says in error_line(monkeypatch, 'predict', '--out', out, *args)
    assert not out.exists()


def test_from_python(trained, shapes, tmp_path):
    """Run the lines of the command's docstring, with the names of files."""
    demo = tmp_path / 'work_dirs' / 'demo'
    demo.mkdir(parents=True)
    shutil.copy(trained / 'xcit_spec_shapes.py', demo)
    shutil.copy(trained / 'epoch_1.pth', demo / 'epoch_3.pth')
    shutil.copy(shapes / 'val' / '000001.png', tmp_path / 'image.png')
    lines = [line.strip() for line in predict.__doc__.splitlines()]
    first = lines.index('import spec_mmdet')
    places = {'CONFIG.py': 'work_dirs/demo/xcit_spec_shapes.py', 'CHECKPOINT.pth': 'work_dirs/demo/epoch_3.pth'}
    for name, path in places.items():
        lines = [line.replace(name, path) for line in lines]
    code = [*lines[first : first + 4], 'import json; print(json.dumps(results["predictions"]))']
    run = subprocess.run([sys.executable, '-c', '\n'.join(code)], cwd=tmp_path, capture_output=True)
    assert not run.returncode, run.stderr.decode()
    (found,) = json.loads(run.stdout.splitlines()[-1])
    assert found['scores'] and found.keys() == {'labels', 'scores', 'bboxes', 'masks'}
    assert 'do not match' not in run.stderr.decode() + run.stdout.decode()
    assert (tmp_path / 'out' / 'vis' / 'image.png').is_file()
