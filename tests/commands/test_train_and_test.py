"""The command line tools in this process: training, testing, resuming, and errors for unusable inputs."""

import copy
import csv
import hashlib
import json
import os
import pickle
import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock, patch

import cv2
import numpy as np
import pytest
import torch
from conftest import CONFIG, ROOT, assert_ap_is_that_of_pycocotools, error_line, options, run_tool
from mmdet.registry import HOOKS
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.runner import EpochBasedTrainLoop
from torch.distributed.elastic.utils.distributed import get_free_port

from spec_mmdet.checkpoints.reading import load
from spec_mmdet.commands import test as testing
from spec_mmdet.errors import InputError
from spec_mmdet.models.tta import use_augmentation
from spec_mmdet.training.results import group_by_epoch, read_scalars
from spec_mmdet.training.terminal import Terminal

FEW = ['train_dataloader.dataset.indices=8']  # two steps of four images


def test_reported_ap_is_pycocotools_own(monkeypatch, shapes, trained, tmp_path, capsys):
    out = tmp_path / 'results.pkl'
    monkeypatch.chdir(tmp_path)
    args = [CONFIG, trained / 'epoch_1.pth', '--work-dir', 'work', '--out', out, '--show-dir', 'pictures']
    run_tool(monkeypatch, 'test', *args, *options(shapes))
    (reported,) = (json.loads(path.read_text()) for path in (tmp_path / 'work').glob('*/*.json'))
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) < 40
    for kind, name in dict(bbox='box AP', segm='mask AP').items():
        (line,) = (line for line in printed if line.startswith(name))
        assert [float(value.replace('-', '-1')) for value in line.removeprefix(name).split()] == [
            reported[f'coco/{kind}_{size}'] for size in ('mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l')
        ]
    assert len(list((tmp_path / 'pictures').glob('*.png'))) == 12

    ann_file = shapes / 'annotations' / 'instances_val.json'
    boxes, masks = [], []
    for result in pickle.loads(out.read_bytes()):
        found = result['pred_instances']
        for (x0, y0, x1, y1), score, label, rle in zip(*(found[k] for k in ('bboxes', 'scores', 'labels', 'masks'))):
            entry = dict(image_id=result['img_id'], category_id=int(label) + 1, score=float(score))
            boxes.append(dict(entry, bbox=[float(v) for v in (x0, y0, x1 - x0, y1 - y0)]))
            masks.append(dict(entry, segmentation=rle))
    assert_ap_is_that_of_pycocotools(reported, ann_file, bbox=boxes, segm=masks)


def test_resuming_continues_where_training_stopped(monkeypatch, shapes, trained, tmp_path):
    # When resumed, a better checkpoint would replace the best one in the work directory that tests share.
    two_epochs = [*options(shapes), 'train_cfg.max_epochs=2', 'default_hooks.checkpoint.save_best=None', *FEW]
    run_tool(monkeypatch, 'train', CONFIG, '--work-dir', tmp_path, '--resume', trained / 'epoch_1.pth', *two_epochs)
    before, after = (load(p) for p in (trained / 'epoch_1.pth', tmp_path / 'epoch_2.pth'))
    assert (before['meta']['iter'], after['meta']['iter']) == (40, 42)
    steps = {state['step'].item() for state in after['optimizer']['state'].values()}
    assert steps == {42}
    for key, value in before['state_dict'].items():
        if 'correction' in key:
            assert torch.equal(value, after['state_dict'][key])
    assert not torch.equal(
        before['state_dict']['neck.fpn_convs.0.conv.weight'], after['state_dict']['neck.fpn_convs.0.conv.weight']
    )


def test_training_writes_its_log_and_records(trained):
    best = 'best_coco_segm_mAP_epoch_1'
    assert {path.name for path in trained.glob('best_*.pth')} == {f'{best}.pth', f'{best}_weights.pth'}
    assert list(trained.glob('*/vis_data/events.out.tfevents.*'))
    (log,) = trained.glob('*/*.log')
    text = log.read_text()
    assert 'System environment:' in text and "type='SpecXCiT'" in text and ' eta: ' in text


def test_terminal_output_of_training(trained):
    """Print fewer than forty lines before the first iteration, without the details that only the log needs."""
    lines = (trained / 'terminal.txt').read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith('epoch 1/1 '))
    assert 10 < first < 40
    text = '\n'.join(lines[:first])
    says = [
        '160 images',
        'circle, square, triangle, star',
        'MaskRCNN on SpecXCiT, 2.0 M parameters',
        'lam=1)',
        'random',
    ]
    says += ['batch size 4', '1 epoch of 40 iterations', 'AdamW', '0.002 after 5 iterations', 'CPU, 1 thread', '.log (']
    assert not [words for words in says if words not in text]
    assert 'images are few' in text and 'deprecat' not in text and 'paramwise' not in text
    for words in ('loss ', 'rpn_cls ', 'mask ', 'rate ', ' images/s', ' GiB', ' left'):
        assert words in lines[first]
    assert any(line.startswith('epoch 1/1  validation: box AP 0.') for line in lines)
    assert lines[-1] == 'best checkpoint: best_coco_segm_mAP_epoch_1.pth'  # relative to the start folder


def test_the_remaining_time_after_a_resumption_with_shorter_epochs(capsys):
    """The total number of iterations, MMEngine's base, is below the number of the last iteration."""
    hub = MessageHub('shorter')
    hub.update_scalars({'train/time': 2.0, 'train/loss': 1.0, 'train/lr': 0.1})
    runner = Mock(train_loop=Mock(spec=EpochBasedTrainLoop), train_dataloader=range(10), message_hub=hub)
    runner.configure_mock(epoch=1, max_epochs=3, iter=150, max_iters=30)
    terminal = Terminal()
    terminal.interval = 4
    terminal.after_train_iter(runner, 3, dict(inputs=[0]))
    assert '0:00:32 left' in capsys.readouterr().out  # 6 + 10 iterations


def test_a_bar_on_a_terminal_and_all_of_the_log(shapes, tmp_path):
    if not shutil.which('script'):
        pytest.skip('no script(1) to give a command a terminal')
    command = [sys.executable, '-m', 'spec_mmdet', 'train', CONFIG, '--no-check', '--work-dir', tmp_path / 'work']
    command = shlex.join(map(str, [*command, *options(shapes), *FEW]))
    shown = subprocess.run(
        ['script', '-qec', command, tmp_path / 'typed'], cwd=tmp_path, capture_output=True, text=True
    )
    assert shown.returncode == 0, shown.stdout
    assert 'epoch 1/1 ' in shown.stdout and '━' in shown.stdout and '0/2' in shown.stdout
    assert 'System environment' not in shown.stdout and 'images/s' in shown.stdout


def test_a_checkpoint_without_detections_is_not_the_best(monkeypatch, shapes, tmp_path):
    blind = [*FEW, 'model.test_cfg.rcnn.score_thr=1.1']
    run_tool(monkeypatch, 'train', CONFIG, '--work-dir', tmp_path, *options(shapes), *blind)
    assert (tmp_path / 'epoch_1.pth').is_file() and not list(tmp_path.glob('best*'))
    hook = HOOKS.build(dict(type='AtomicCheckpointHook', interval=1, save_best='coco/bbox_mAP', rule='greater'))
    runner = Mock(work_dir=tmp_path, epoch=1)
    with patch('mmengine.hooks.CheckpointHook._save_best_checkpoint') as saved:
        for value in (0.0, -1, float('nan'), 0.1):
            hook.after_val_epoch(runner, {'coco/bbox_mAP': value, 'loss': 0})
    assert [call.args[1]['coco/bbox_mAP'] for call in saved.call_args_list] == [None, None, None, 0.1]
    with pytest.raises(InputError, match='coco/segm_mAP is -1'):
        testing.require_measured({'coco/bbox_mAP': 0.0, 'coco/segm_mAP': -1.0, 'coco/segm_mAP_s': -1.0})


def test_documented_options_of_training(monkeypatch, shapes, tmp_path):
    page = (ROOT / 'docs' / 'guide' / 'train.md').read_text()
    documented = ['optim_wrapper.accumulative_counts=4', 'default_hooks.ema.type=EMAHook']
    assert all(option in page for option in documented)
    settings = [*documented, 'default_hooks.ema.momentum=0.5', 'train_dataloader.dataset.indices=8']
    settings.append('train_dataloader.batch_size=1')
    run_tool(monkeypatch, 'train', CONFIG, '--work-dir', tmp_path, *options(shapes), *settings)
    saved = load(tmp_path / 'epoch_1.pth')
    assert saved['meta']['iter'] == 8
    assert {state['step'].item() for state in saved['optimizer']['state'].values()} == {2}
    key = 'neck.fpn_convs.0.conv.weight'
    assert not torch.equal(saved['state_dict'][key], saved['ema_state_dict'][f'module.{key}'])
    for key, value in saved['state_dict'].items():
        if 'correction' in key:
            assert torch.equal(value, saved['ema_state_dict'][f'module.{key}'])


def test_exhausted_memory(monkeypatch, shapes, tmp_path):
    enormous = 'model.rpn_head.feat_channels=10000000000'
    says = error_line(monkeypatch, 'train', CONFIG, '--work-dir', tmp_path, *options(shapes), enormous)
    assert 'out of memory (' in says and 'train_dataloader.batch_size=1' in says


def sigma_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return extreme singular values of the demo's projections, with and without lambda = 1, by layer and role."""
    sigma = {}
    for key, weight in load(checkpoint)['state_dict'].items():
        if key.endswith('attn.qkv.weight'):
            for role, W in zip('QKV', weight.double().chunk(3)):
                both = torch.linalg.svdvals(torch.stack([W, W + torch.eye(len(W))]))
                sigma[f'{key.removeprefix("backbone.").removesuffix(".weight")}.{role}'] = both[:, [-1, 0]]
    assert len(sigma) == 18
    return sigma


def test_training_writes_condition_numbers(trained):
    with (trained / 'conditioning.csv').open(newline='') as file:
        rows = list(csv.DictReader(file))
    assert list(dict.fromkeys(row['iter'] for row in rows)) == ['1', '20', '40']
    last = {f'{row["layer"]}.{row["matrix"]}': row for row in rows if row['iter'] == '40'}
    sigma = sigma_of(trained / 'epoch_1.pth')
    assert len(last) == len(sigma) + 6
    for name, ((low, high), (conditioned_low, conditioned_high)) in sigma.items():
        for figure, value in dict(
            sigma_min=low,
            sigma_max=high,
            kappa=high / low,
            conditioned_sigma_min=conditioned_low,
            conditioned_sigma_max=conditioned_high,
            conditioned_kappa=conditioned_high / conditioned_low,
        ).items():
            assert float(last[name][figure]) == pytest.approx(value.item(), rel=1e-4)
    jacobians = [last[f'blocks.{i}.attn.J'] for i in range(6)]
    for row in jacobians:
        low, high, kappa = (float(row[figure]) for figure in ('sigma_min', 'sigma_max', 'kappa'))
        assert 0 < low < high and kappa == pytest.approx(high / low)

    # Five curves, the medians over the layers, and no curve for a single layer.
    entries = [entry for entry in read_scalars(trained) if 'conditioning/seconds' in entry]
    assert [entry['step'] for entry in entries] == [1, 20, 40]
    kappas = {f'kappa_{r}': [(s[1, 1] / s[1, 0]).item() for n, s in sigma.items() if n.endswith(r)] for r in 'QKV'}
    expected = {name: statistics.median(values) for name, values in kappas.items()}
    expected['kappa_J'] = statistics.median(float(row['kappa']) for row in jacobians)
    expected['sigma_min'] = statistics.median(s[1, 0].item() for s in sigma.values())
    assert set(entries[-1]) == {f'conditioning/{name}' for name in (*expected, 'seconds')} | {'step'}
    for name, value in expected.items():
        assert entries[-1][f'conditioning/{name}'] == pytest.approx(value, rel=1e-4)


def test_training_writes_plots_and_predictions(trained, shapes):
    (epoch,) = csv.DictReader((trained / 'results.csv').read_text().splitlines())
    records = read_scalars(trained)
    losses = [entry['loss'] for entry in records if 'loss' in entry]
    (metrics,) = (entry for entry in records if 'coco/bbox_mAP' in entry)
    assert (epoch['epoch'], epoch['iter']) == ('1', '25')  # the last one that the logger wrote
    assert float(epoch['loss']) == pytest.approx(statistics.mean(losses))
    assert float(epoch['coco/segm_mAP_50']) == metrics['coco/segm_mAP_50']
    names = ['results.png', 'val_epoch_1.jpg', *(f'train_batch_{i}.jpg' for i in (1, 2, 3))]
    sizes = {name: cv2.imread(str(trained / name)).shape for name in names}
    assert sizes['train_batch_1.jpg'] == sizes['train_batch_2.jpg'] and sizes['val_epoch_1.jpg'][1] > 4 * 320
    run = json.loads((trained / 'run.json').read_text())
    assert run['seed'] == 0 and run['conditioning'] == "dict(type='identity', lam=1)" and '--work-dir' in run['command']
    assert run['commit'].startswith(subprocess.check_output(['git', 'rev-parse', 'HEAD'], cwd=ROOT, text=True).strip())
    annotations = {split: shapes / 'annotations' / f'instances_{split}.json' for split in ('train', 'val')}
    digests = {split: {str(p): hashlib.sha256(p.read_bytes()).hexdigest()} for split, p in annotations.items()}
    assert run['data'] == digests
    for name in ('epoch_1.pth', 'best_coco_segm_mAP_epoch_1_weights.pth'):
        assert load(trained / name)['meta']['run'] == run


def test_curves_of_a_resumed_training(tmp_path):
    """Iterations that were trained again count once, with their last values."""

    def write(name, *entries):
        path = tmp_path / name / 'vis_data' / 'scalars.json'
        path.parent.mkdir(parents=True)
        path.write_text('\n'.join(map(json.dumps, entries)))

    def train(iteration, loss):
        return dict(loss=loss, lr=0.1, iter=iteration, step=iteration)

    epochs = [{'coco/bbox_mAP': 0.1 * epoch, 'step': epoch} for epoch in (1, 2, 3)]
    write('1', train(5, 3.0), train(10, 2.0), epochs[0], train(15, 9.0), train(20, 9.0))
    write('2', train(15, 1.0), train(20, 0.5), epochs[1])
    write('3', train(25, 0.5), epochs[2])
    assert [entry['loss'] for entry in read_scalars(tmp_path) if 'loss' in entry] == [3.0, 2.0, 1.0, 0.5, 0.5]
    rows = list(group_by_epoch(read_scalars(tmp_path)))
    assert [(row['epoch'], row['iter'], row['loss']) for row in rows] == [(1, 10, 2.5), (2, 20, 0.75), (3, 25, 0.5)]


def test_analyze_conditioning(monkeypatch, shapes, trained, tmp_path, capsys):
    backbone_alone = tmp_path / 'backbone.pth'
    weights = load(trained / 'epoch_1.pth')['state_dict']
    torch.save(
        {k.removeprefix('backbone.'): v for k, v in weights.items() if k.startswith('backbone.')}, backbone_alone
    )
    sigma = sigma_of(trained / 'epoch_1.pth')
    tables = []
    for path in (trained / 'epoch_1.pth', backbone_alone):
        out = tmp_path / path.stem
        args = [CONFIG, path, '--images', shapes / 'val', '--max-images', 2, '--out', out]
        run_tool(monkeypatch, 'analyze', *args)
        assert (out / 'conditioning.png').stat().st_size > 10_000
        projections, jacobians = (
            list(csv.DictReader((out / f'{name}.csv').open())) for name in ('projections', 'jacobians')
        )
        for row in projections:
            (low, high), (conditioned_low, conditioned_high) = sigma[f'{row["name"]}.{row["role"]}']
            assert float(row['sigma_min']) == pytest.approx(low.item(), rel=1e-6)
            assert float(row['kappa']) == pytest.approx((high / low).item(), rel=1e-6)
            assert float(row['conditioned_kappa']) == pytest.approx((conditioned_high / conditioned_low).item())
        assert len(projections) == 18
        assert len(jacobians) == 12 and len({row['image'] for row in jacobians}) == 2
        tables.append(capsys.readouterr().out.split('wrote')[0])
    assert tables[0] == tables[1]
    assert 'kappa(W+C)' in tables[0] and 'Jacobian of' in tables[0] and ' all\n' in tables[0]


def test_analyze_conditioning_of_third_party_attention(monkeypatch, tmp_path, capsys):
    config = tmp_path / 'swin.py'
    config.write_text(
        "_base_ = 'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py'\n"
        'model = dict(backbone=dict(init_cfg=None, depths=[1, 2, 1, 1]))\n'
    )
    picture = tmp_path / 'picture.png'
    cv2.imwrite(str(picture), np.zeros((64, 64, 3), np.uint8))
    run_tool(monkeypatch, 'analyze', config, '--images', tmp_path, '--out', tmp_path / 'out')
    printed = capsys.readouterr().out
    assert printed.count('w_msa.qkv') == 3 * 5
    assert 'XCA layers' in printed


def test_analyze_conditioning_refuses(monkeypatch, shapes, trained, tmp_path):
    detector = trained / 'epoch_1.pth'
    for args, says in (
        (['absent.py'], 'config absent.py: no such file'),
        ([CONFIG, 'absent.pth'], 'checkpoint absent.pth: no such file'),
        ([CONFIG, detector, '--cfg-options', 'model.backbone.conditioning.lam=2.0'], 'made with conditioning'),
        (
            [CONFIG, detector, '--cfg-options', 'model.backbone.arch.depth=7'],
            'does not fit',
        ),
        ([CONFIG, '--images', tmp_path], 'contains no images'),
        ([CONFIG, '--images', tmp_path / 'absent'], 'contains no images'),
        ([CONFIG, '--max-images', '0'], 'at least 1'),
        ([ROOT / 'configs' / '_base_' / 'coco_3x.py'], 'no model with a backbone'),
    ):
        assert says in error_line(monkeypatch, 'analyze', *args, '--out', tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_tta(monkeypatch, shapes, trained, tmp_path):
    run_tool(monkeypatch, 'test', CONFIG, trained / 'epoch_1.pth', '--tta', '--work-dir', tmp_path, *options(shapes))
    (reported,) = (json.loads(path.read_text()) for path in tmp_path.glob('*/*.json'))
    assert reported['coco/segm_mAP_50'] > 0


def test_mmdetections_tta_is_replaced_if_it_cannot_merge_masks(capsys):
    cfg = Config.fromfile(CONFIG)
    cfg.tta_model = dict(type='mmdet.DetTTAModel', tta_cfg=dict(nms=dict(type='soft_nms'), max_per_img=7))
    boxes, masks = copy.deepcopy(cfg), copy.deepcopy(cfg)
    use_augmentation(boxes, masks=False)
    use_augmentation(masks, masks=True)
    assert (boxes.model.type, masks.model.type) == ('mmdet.DetTTAModel', 'MaskTTAModel')
    assert masks.model.tta_cfg == boxes.model.tta_cfg and 'MaskTTAModel' in capsys.readouterr().out


def test_several_processes(shapes, tmp_path):
    env = dict(os.environ, PYTHON=sys.executable, PORT=str(get_free_port()), CUDA_VISIBLE_DEVICES='')
    work = tmp_path / 'work'
    train = [ROOT / 'tools' / 'dist_train.sh', CONFIG, '2', '--work-dir', work, *options(shapes), *FEW]
    subprocess.run(train, check=True, env=env, stdout=subprocess.DEVNULL)
    assert load(work / 'epoch_1.pth')['meta']['iter'] == 1  # eight images: two processes of four images

    test = [ROOT / 'tools' / 'dist_test.sh', CONFIG, work / 'epoch_1.pth', '2', '--work-dir', work / 'test']
    test += ['--report', work / 'report']
    subprocess.run([*test, *options(shapes)], check=True, env=env, stdout=subprocess.DEVNULL)
    # Read as text: every process writes this file, so that it can end with the rest of another's.
    (reported,) = (path.read_text() for path in (work / 'test').glob('*/*.json'))
    assert '"coco/segm_mAP"' in reported
    assert (work / 'report' / 'index.html').is_file()


@pytest.fixture
def broken_shapes(shapes, tmp_path):
    """A copy of the data set that a test may change."""
    subprocess.run(['cp', '-r', shapes, tmp_path / 'broken'], check=True)
    return tmp_path / 'broken'


def spoil_json(edit, split='train'):
    def spoil(root):
        path = root / 'annotations' / f'instances_{split}.json'
        coco = json.loads(path.read_text())
        edit(coco)
        path.write_text(json.dumps(coco))

    return spoil


def without_val(root):
    shutil.rmtree(root / 'val')
    (root / 'annotations/instances_val.json').unlink()


def val_twice(root):
    shutil.copytree(root / 'val', root / 'val2017')
    shutil.copy(root / 'annotations/instances_val.json', root / 'annotations/instances_val2017.json')


@pytest.mark.parametrize(
    ('spoil', 'says'),
    [
        (lambda root: (root / 'annotations').rename(root / 'elsewhere'), 'train lacks its annotation file'),
        (lambda root: (root / 'val').rename(root / 'elsewhere'), 'instances_val.json'),
        (without_val, 'lacks annotations/instances_val*.json and the folder val*'),
        (val_twice, 'several data sets for val (val, val2017)'),
        (lambda root: (root / 'annotations/instances_train.json').write_text('<html>'), 'not JSON'),
        (lambda root: (root / 'annotations/instances_train.json').write_text('[1]'), 'no list "images"'),
        (spoil_json(lambda coco: coco.pop('annotations')), 'no list "annotations"'),
        (
            spoil_json(lambda coco: coco['annotations'][0].pop('bbox')),
            'number 1 of its "annotations", id 1, has no bbox in instances_train.json',
        ),
        (spoil_json(lambda coco: coco['images'].clear()), 'contains no images'),
        (spoil_json(lambda coco: coco['categories'][0].pop('name')), 'number 1 of its "categories", id 1, has no name'),
        (spoil_json(lambda coco: coco['categories'].clear()), 'contains no categories'),
        (spoil_json(lambda coco: coco['categories'][0].update(name='star')), 'categories have the name'),
        (spoil_json(lambda coco: coco['categories'].reverse(), 'val'), 'not the 4 trained classes (their order'),
        (spoil_json(lambda coco: coco['categories'].pop(), 'val'), 'instances_val.json: its categories are not the 4'),
        (
            spoil_json(lambda coco: coco['categories'][0].update(name='ring')),
            '(missing: ring and additional: circle',
        ),
        (lambda root: (root / 'train/000003.png').unlink(), 'lacks 1 of the 160 images, first 000003.png'),
    ],
)
def test_unusable_data(monkeypatch, broken_shapes, tmp_path, spoil, says):
    spoil(broken_shapes)
    assert says in error_line(monkeypatch, 'train', CONFIG, '--work-dir', tmp_path / 'work', *options(broken_shapes))
    assert not (tmp_path / 'work').exists()


def test_a_checkpoint_brings_its_classes(monkeypatch, broken_shapes, trained, tmp_path):
    spoil_json(lambda coco: coco['categories'].reverse(), 'val')(broken_shapes)
    spoil_json(lambda coco: coco['categories'].reverse())(broken_shapes)
    work = ['--work-dir', tmp_path / 'work', *options(broken_shapes)]
    says = 'not the 4 trained classes (their order differs)'
    assert says in error_line(monkeypatch, 'test', CONFIG, trained / 'epoch_1.pth', *work)
    assert says in error_line(monkeypatch, 'train', CONFIG, '--resume', trained / 'epoch_1.pth', *work)

    converted = tmp_path / 'converted.pth'
    run_tool(monkeypatch, 'convert', trained / 'epoch_1.pth', converted, '--detector', CONFIG)
    assert load(converted)['meta']['dataset_meta'] == dict(classes=['circle', 'square', 'triangle', 'star'])


def test_images_without_annotations_can_be_predicted_for_submission(monkeypatch, broken_shapes, trained, tmp_path):
    spoil_json(lambda coco: coco.pop('annotations'), 'val')(broken_shapes)
    args = [CONFIG, trained / 'epoch_1.pth', '--work-dir', tmp_path / 'work', *options(broken_shapes)]
    assert 'no list "annotations"' in error_line(monkeypatch, 'test', *args)
    out = tmp_path / 'submission'
    run_tool(monkeypatch, 'test', *args, 'test_evaluator.format_only=True', f'test_evaluator.outfile_prefix={out}')
    assert json.loads((tmp_path / 'submission.segm.json').read_text())


def test_unusable_config_and_checkpoint(monkeypatch, shapes, trained, tmp_path):
    assert 'config absent.py: no such file' in error_line(monkeypatch, 'train', 'absent.py')
    assert 'config absent.py: no such file' in error_line(monkeypatch, 'test', 'absent.py', 'absent.pth')
    text = tmp_path / 'text.pth'
    text.write_text('not a checkpoint')
    no_weights = tmp_path / 'epochs.pth'
    torch.save(dict(epoch=3), no_weights)
    for path, says in (('absent.pth', 'no such file'), (text, 'not a checkpoint'), (no_weights, 'no weights')):
        assert says in error_line(monkeypatch, 'test', CONFIG, path, '--work-dir', tmp_path, *options(shapes))
        assert says in error_line(
            monkeypatch, 'train', CONFIG, '--work-dir', tmp_path, '--resume', path, *options(shapes)
        )
    pretrained = ['model.backbone.init_cfg.type=Pretrained', f'model.backbone.init_cfg.checkpoint={text}']
    args = [CONFIG, '--work-dir', tmp_path, *options(shapes), *pretrained]
    assert 'not a checkpoint' in error_line(monkeypatch, 'train', *args)
    for option, says in (
        ('model.backbone.conditioning.lam=2.0', 'made with conditioning'),
        ('model.rpn_head.anchor_generator.scales=[4,8]', 'does not fit the configured model'),
    ):
        args = [CONFIG, trained / 'epoch_1.pth', '--work-dir', tmp_path, *options(shapes), option]
        assert says in error_line(monkeypatch, 'test', *args)
