"""Build, train and run a config of each family of MMDetection without a compiled mmcv.

    python tests/ops/zoo.py           writes docs/results/operators.csv
    python tests/ops/zoo.py NAME ...  prints the rows of these folders

Models have the size of their configs and random weights; images are small. Operators of CUDA tensors are routed to
ours: mmcv's deformable attention for CPU tensors is made to call them.
"""

import copy
import csv
import gc
import os
import sys
import tempfile
import time
import warnings
from functools import cache
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'error')

import mmcv._ext
import mmcv.ops.multi_scale_deform_attn as deform_attn
import mmdet
import numpy as np
import torch
from mmdet.registry import MODELS
from mmdet.structures import ReIDDataSample
from mmdet.structures.mask import BitmapMasks
from mmdet.testing import demo_mm_inputs, demo_mm_proposals, demo_track_inputs
from mmdet.utils import register_all_modules
from mmengine.config import Config, ConfigDict
from mmengine.logging import MessageHub, MMLogger
from mmengine.optim import OptimWrapper
from mmengine.structures import InstanceData

TABLE = Path(__file__).parents[2] / 'docs' / 'results' / 'operators.csv'
HEADING = '| family | config | trains a step | predicts | operators of mmcv called |'
CONFIGS = Path(mmdet.__file__).parent / '.mim' / 'configs'

OPERATORS = mmcv._ext.OPERATORS

# The shortest name among small models stands for its folder, except for these: the shortest lacks the folder's
# operators, or is only a part of another model.
PARTICULAR = {
    'bytetrack': 'bytetrack_yolox_x_8xb4-80e_crowdhuman-mot17halftrain_test-mot17halfval',
    'carafe': 'mask-rcnn_r50_fpn-carafe_1x_coco',
    'cascade_rpn': 'cascade-rpn_faster-rcnn_r50-caffe_fpn_1x_coco',
    'centernet': 'centernet_r18-dcnv2_8xb16-crop512-140e_coco',
    'dcn': 'faster-rcnn_r50_fpn_dpool_1x_coco',
    'dcnv2': 'faster-rcnn_r50_fpn_mdpool_1x_coco',
    'detectors': 'detectors_htc-r50_1x_coco',
    'dyhead': 'atss_r50_fpn_dyhead_1x_coco',
    'empirical_attention': 'faster-rcnn_r50-attn0010-dcn_fpn_1x_coco',
    'faster_rcnn': 'faster-rcnn_r50_fpn_soft-nms_1x_coco',
    'foveabox': 'fovea_r50_fpn_gn-head-align_4xb4-2x_coco',
    'guided_anchoring': 'ga-faster-rcnn_r50_fpn_1x_coco',
    'groie': 'mask-rcnn_r50_fpn_groie_1x_coco',
    'legacy_1.x': 'mask-rcnn_r50_fpn_1x_coco_v1',
    'nas_fpn': 'retinanet_r50_nasfpn_crop640-50e_coco',
    'pisa': 'faster-rcnn_r50_fpn_pisa_1x_coco',
    'solov2': 'solov2-light_r50-dcn_fpn_ms-3x_coco',
    'sort': 'sort_faster-rcnn_r50_fpn_8xb2-4e_mot17halftrain_test-mot17halfval',
    'strongsort': 'strongsort_yolox_x_8xb4-80e_crowdhuman-mot17halftrain_test-mot17halfval',
    'tood': 'tood_r50_fpn_1x_coco',
}
SMALL = ('r18', 'r50', '-t-', '-t_', 'tiny', '_s_', 'pvt-t', 'd53')
TRACKERS = {
    'ByteTrack',
    'DeepSORT',
    'MaskTrackRCNN',
    'Mask2FormerVideo',
    'OCSORT',
    'QDTrack',
    'SORT',
    'StrongSORT',
}
SIDE = 128
SIDES = {'ssd300': 300, 'yolact': 256, 'grounding': 256, 'dino': 256}
# Numbers of proposals, samples and results, and layers that are recomputed to save memory.
FEWER = {'num_cp': 0, 'score_thr': 0.0, 'nms_pre': 100, 'max_per_img': 100, 'num': 64}
WORDS = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', '.', 'cat', 'dog']


def config_of(family: str) -> Path:
    """Return the config that stands for a folder.

    Raises:
        LookupError: if the folder has no model.
    """
    if family in PARTICULAR:
        return CONFIGS / family / f'{PARTICULAR[family]}.py'
    names = sorted(
        (CONFIGS / family).glob('*.py'),
        key=lambda path: (not any(s in path.stem for s in SMALL), len(path.stem), path.stem),
    )
    for path in names:
        if '_tta' not in path.stem and 'model' in Config.fromfile(path, import_custom_modules=False):
            return path
    raise LookupError(f'no config of {family} has a model')


def families() -> list[str]:
    """Return the folders with models."""
    found = []
    for folder in sorted(path for path in CONFIGS.iterdir() if path.is_dir() and path.name != '_base_'):
        try:
            config_of(folder.name)
            found.append(folder.name)
        except LookupError:
            pass
    return found


@cache
def language_model() -> str:
    """Write a small random BERT that knows two words; configs name one to download."""
    import transformers

    folder = tempfile.mkdtemp()
    Path(folder, 'vocab.txt').write_text('\n'.join(WORDS))
    sizes = dict(vocab_size=len(WORDS), num_hidden_layers=1, intermediate_size=64)
    transformers.BertModel(transformers.BertConfig(**sizes)).save_pretrained(folder)
    transformers.BertTokenizerFast(str(Path(folder, 'vocab.txt'))).save_pretrained(folder)
    return folder


def adapt(value):
    """Return a config for one process on a CPU, without downloads: plain BN, few candidates, no score too low."""
    if isinstance(value, dict):
        pretrained = isinstance(value.get('init_cfg'), dict) and 'checkpoint' in value['init_cfg']
        none = {'pretrained', 'teacher_ckpt'} | ({'init_cfg'} if pretrained else set())
        changed = {key: None if key in none else adapt(each) for key, each in value.items()}
        for key in FEWER.keys() & changed.keys():
            if isinstance(changed[key], (int, float)):
                changed[key] = min(changed[key], FEWER[key])
        if changed.get('type') in ('SyncBN', 'MMSyncBN'):
            changed['type'] = 'BN'
        if str(changed.get('type')).endswith('TIMMBackbone'):
            changed['pretrained'] = False
        return changed
    if isinstance(value, (list, tuple)):
        return type(value)(adapt(each) for each in value)
    if value == 'bert-base-uncased':
        return language_model()
    if isinstance(value, str) and value.startswith('configs/'):
        return str(CONFIGS / value.removeprefix('configs/'))
    return value


def record_operators(called: set[str]) -> None:
    """Make mmcv's functions record which operator they call, including deformable attention."""

    def noting(name, operator):
        def note(*args, **kwargs):
            called.add(name)
            return operator(*args, **kwargs)

        return note

    for name, operator in OPERATORS.items():
        setattr(mmcv._ext, name, noting(name, operator))

    def as_cuda_tensors(value, shapes, locations, weights):
        starts = torch.cat([shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]])
        return deform_attn.MultiScaleDeformableAttnFunction.apply(value, shapes, starts, locations, weights, 64)

    deform_attn.multi_scale_deformable_attn_pytorch = as_cuda_tensors


def classes_of(model) -> int:
    """Return the smallest number of classes of the model's parts."""
    return min(
        [part.num_classes for part in model.modules() if isinstance(getattr(part, 'num_classes', None), int)] or [1]
    )


def images(model, cfg: dict, side: int, count: int) -> dict:
    """Make a batch for a detector of images."""
    shape = (3, side, side)
    name = cfg['type']
    further = {}
    if name in ('GLIP', 'GroundingDINO'):
        further = dict(texts=['cat . dog . '] * count, custom_entities=True)
    stuff = cfg.get('panoptic_fusion_head', {}).get('num_stuff_classes') or 0
    batch = demo_mm_inputs(count, shape, num_items=[3, 2][:count], num_classes=2, with_semantic=True, **further)
    classes = classes_of(model)
    for n, sample in enumerate(batch['data_samples']):
        # Boxes and masks with an area, instead of random ones.
        boxes = torch.tensor([[4.0, 8, 60, 70], [40, 30, 120, 110], [70, 4, 100, 50]])[: 3 - n] * (side / 128)
        masks = np.zeros((len(boxes), side, side), np.uint8)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist()):
            mask[y0:y1, x0:x1] = 1
        labels = torch.arange(len(boxes)) % min(classes, 2)
        sample.gt_instances = InstanceData(bboxes=boxes, labels=labels)
        if 'mask' in str(cfg).lower():
            sample.gt_instances.masks = BitmapMasks(masks, side, side)
        sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
        sample.gt_sem_seg.sem_seg = (sample.gt_sem_seg.sem_seg % 2).long() + (classes if stuff else 0)
        sample.set_metainfo(
            dict(scale_factor=(1.0, 1.0), pad_shape=(side, side), homography_matrix=np.eye(3, dtype=np.float32))
        )
    if name == 'FastRCNN':
        for sample, proposals in zip(batch['data_samples'], demo_mm_proposals([shape] * count, 20)):
            sample.proposals = proposals
    return batch


def batch_of(model, cfg: dict, side: int, train: bool) -> dict:
    """Make a batch for training or prediction."""
    name = cfg['type']
    if name == 'BaseReID':
        samples = [ReIDDataSample().set_gt_label(n // 2) for n in range(4)]
        return dict(inputs=list(torch.randint(0, 255, (4, 3, 256, 128), dtype=torch.uint8)), data_samples=samples)
    if name in ('QDTrack', 'MaskTrackRCNN', 'Mask2FormerVideo') or (name in TRACKERS and not train):
        masks = name != 'QDTrack'
        batch = demo_track_inputs(
            1, 2, key_frames_inds=[0], image_shapes=(3, side, side), num_items=[3], num_classes=1, with_mask=masks
        )
        for frame in batch['data_samples'][0].video_data_samples:
            frame.gt_instances.bboxes = torch.tensor([[4.0, 8, 60, 70], [40, 30, 120, 110], [70, 4, 100, 50]])
            frame.gt_instances.instances_ids = torch.arange(3)
            frame.set_metainfo(dict(ori_video_length=2, scale_factor=(1.0, 1.0), frame_id=frame.frame_id))
            if masks:
                filled = np.zeros((3, side, side), np.uint8)
                filled[:, 20:90, 10:80] = 1
                frame.gt_instances.masks = BitmapMasks(filled, side, side)
        return batch
    if name == 'SoftTeacher' and train:
        branches = {
            branch: images(model, cfg['detector'], side, 2) for branch in ('sup', 'unsup_teacher', 'unsup_student')
        }
        return {part: {b: batch[part] for b, batch in branches.items()} for part in ('inputs', 'data_samples')}
    return images(model, cfg, side, 2 if train else 1)


def train_a_step(model, cfg, side) -> None:
    """Take one step of SGD.

    Raises:
        AssertionError: if a loss or a gradient is not finite, or there are no gradients.
    """
    MessageHub.get_current_instance().update_info_dict(dict(epoch=0, iter=0))  # as a runner does
    optimizer = OptimWrapper(torch.optim.SGD(model.parameters(), lr=1e-6))
    optimizer.zero_grad = lambda **kwargs: None
    model.train()  # some return None
    losses = model.train_step(batch_of(model, cfg, side, True), optimizer)
    wrong = [name for name, loss in losses.items() if not np.isfinite(float(loss))]
    assert not wrong, f'{wrong} are not finite'
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert gradients and any(gradient.any() for gradient in gradients), 'no gradients'
    assert all(gradient.isfinite().all() for gradient in gradients), 'gradients that are not finite'


def predict(model, cfg, side) -> None:
    """Raises: AssertionError: if there is nothing in the results, or something that is not finite."""
    model.eval()
    with torch.no_grad():
        results = model.test_step(batch_of(model, cfg, side, False))
    assert results, 'no results'
    for result in results:
        for sample in getattr(result, 'video_data_samples', [result]):
            instances = [value for key, value in sample.all_items() if key.startswith('pred')]
            assert instances, 'no predictions'
            for found in instances:
                numbers = [value for value in getattr(found, 'values', list)() if isinstance(value, torch.Tensor)]
                assert all(value.isfinite().all() for value in numbers if value.is_floating_point()), 'not finite'


def reason(error: Exception) -> str:
    return f'no: {type(error).__name__}: {" ".join(str(error).split())[:100]}'.replace('|', '/')


def examine(family: str) -> str:
    """Return a row of the table."""
    path, called, verdicts = config_of(family), set(), []
    record_operators(called)
    torch.manual_seed(0)
    np.random.seed(0)
    try:
        cfg = ConfigDict(adapt(Config.fromfile(path).model.to_dict()))
        model = MODELS.build(copy.deepcopy(cfg))
        model.init_weights()
    except Exception as error:
        return f'| {family} | {path.stem} | {reason(error)} | | |'
    side = next((side for name, side in SIDES.items() if path.stem.startswith(name)), SIDE)
    for run in (train_a_step, predict):
        try:
            run(model, cfg, side)
            verdicts.append('yes')
        except Exception as error:
            verdicts.append(reason(error))
    operators = sorted(name.removesuffix('_forward') for name in called if 'backward' not in name)
    return f'| {family} | {path.stem} | {verdicts[0]} | {verdicts[1]} | {", ".join(operators)} |'


def rows(names) -> list[str]:
    lines = []
    for name in names:
        began = time.time()
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            lines.append(examine(name))
        gc.collect()
        print(lines[-1], f'{time.time() - began:.1f} s', flush=True)
    return lines


if __name__ == '__main__':
    register_all_modules()
    MMLogger.get_current_instance().setLevel('ERROR')
    asked = sys.argv[1:]
    lines = rows(asked or families())
    if not asked:
        with TABLE.open('w', newline='') as file:
            csv.writer(file, lineterminator='\n').writerows(line[2:-2].split(' | ') for line in (HEADING, *lines))
