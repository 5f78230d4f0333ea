"""Test the small systems: the same start in all arms, the tasks, and resuming from logs."""

import dataclasses
import json
from functools import partial

import numpy as np
import pytest
import torch
from conftest import error_line, run_tool

from research.systems import SYSTEMS, __main__
from research.systems.bert import Bert, read_text
from research.systems.listops import ListOps
from research.systems.runs import ARMS, IGNORED, LARGER, build_initial_model, compute_kappa, train
from research.systems.vit import ViT
from spec_mmdet.conditioning import find_projections

COMMAND = __main__.__name__


@pytest.mark.parametrize('name', SYSTEMS)
def test_all_arms_start_from_the_same_weights(name):
    system = SYSTEMS[name]()
    plain = build_initial_model(system, 'plain', 1)[0].state_dict()
    other = build_initial_model(system, 'plain', 2)[0].state_dict()
    for arm in list(ARMS)[1:-1]:
        model, corrections, lam = build_initial_model(system, arm, 1)
        corrected = {id(entry.weight): entry.C for entry in corrections.values()}
        assert len(corrected) == system.layers * (1 if name == 'vit' else 3)
        for key, weight in model.named_parameters():
            if id(weight) not in corrected:
                assert torch.equal(weight, plain[key]), key
                continue
            torch.testing.assert_close(weight - corrected[id(weight)], plain[key], atol=2e-6, rtol=0)
            assert not torch.allclose(plain[key], other[key])
            if arm.startswith('lambda 2 sigma'):
                blocks = plain[key].split(system.width)
                assert all(lam >= 2 * torch.linalg.matrix_norm(W, 2) * (1 - 1e-5) for W in blocks)
                assert lam < 3 * max(torch.linalg.matrix_norm(W, 2) for W in blocks)


@pytest.mark.parametrize('name', SYSTEMS)
def test_larger_weights_have_the_conditioned_norm_and_the_plain_kappa(name):
    system = SYSTEMS[name]()
    (model, none, _), (of_plain, _, _), (_, corrections, _) = (
        build_initial_model(system, arm, 1) for arm in (LARGER, 'plain', 'lambda 2 sigma')
    )
    assert not none and len(list(find_projections(model))) == len(corrections)
    for ours, plain, conditioned in zip(find_projections(model), find_projections(of_plain), corrections.values()):
        factor = conditioned.weight.norm() / plain.weight.norm()
        torch.testing.assert_close(ours.weight, factor * plain.weight, atol=2e-6, rtol=0)
        assert factor > 1.5
    assert compute_kappa(model) == pytest.approx(compute_kappa(of_plain), rel=1e-3)


def test_weight_decay_leaves_the_correction():
    """One step that decays W to nothing leaves W + C = C, whose condition number is 1."""
    system = dataclasses.replace(Bert(), steps=1, lr=1e-6, weight_decay=1e6, tests=2)
    for arm, of in (('lambda 10', 'whole'), ('lambda 10, per head', 'head')):
        assert train(system, arm, 0).kappa[of][1] == pytest.approx(1, abs=1e-4)
    assert train(system, 'plain', 0).kappa['whole'][1] > 10


def test_each_side_of_a_picture_has_its_texture():
    """Classify by the strongest frequency of the outer thirds, which no edge crosses."""
    images, classes = ViT(size=48, noise=0.0).draw(32, torch.Generator().manual_seed(0))
    assert images.shape == (32, 1, 48, 48) and len(classes.unique()) > 8
    for image, target in zip(images[:, 0].numpy(), classes.tolist()):
        for side, direction in ((image[:, :16], target // 4), (image[:, 32:], target % 4)):
            window = np.outer(np.hanning(48), np.hanning(16))
            power = np.abs(np.fft.rfft2(side * window, (256, 256)))
            row, column = np.unravel_index(power.argmax(), power.shape)
            angle = np.degrees(np.arctan2(np.fft.fftfreq(256)[row], column / 256)) % 180
            assert abs((angle - 45 * direction + 90) % 180 - 90) < 10


def test_masked_characters_are_those_of_the_text():
    system = Bert()
    for held_out in (False, True):
        inputs, targets = system.draw(20, torch.Generator().manual_seed(0), held_out)
        masked = targets != IGNORED
        assert (inputs[masked] == 0).all() and (inputs[~masked] > 0).all()
        assert masked.double().mean().item() == pytest.approx(0.15, abs=0.03)
        lines = torch.where(masked, targets, inputs).to(torch.uint8)
        assert all(bytes(line.tolist()) in read_text(held_out) for line in lines)
    assert len(read_text(False)) > 200_000 and b'  ' not in read_text(False) + read_text(True)


def test_a_finished_run_is_not_run_again(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(SYSTEMS, 'listops', partial(ListOps, tests=40))
    arguments = ['listops', '--seeds', '2', '--steps', '2', '--out', tmp_path]
    ran = []
    monkeypatch.setattr(__main__, 'train', lambda *which, **device: ran.append(which[1:]) or train(*which, **device))
    run_tool(monkeypatch, COMMAND, *arguments[:2], 1, *arguments[3:])
    assert ran == [(arm, 0) for arm in ARMS]
    (tmp_path / 'listops/svd_0.json').unlink()
    ran.clear()
    run_tool(monkeypatch, COMMAND, *arguments)
    assert ran == [('svd', 0), *((arm, 1) for arm in ARMS)]
    ran.clear()
    capsys.readouterr()
    run_tool(monkeypatch, COMMAND, *arguments)
    table = capsys.readouterr().out
    assert not ran and '16 of 16 runs finished' in table

    right = {
        arm: [json.loads((tmp_path / f'listops/{file}_{seed}.json').read_text())['accuracy'] for seed in range(2)]
        for arm, file in (('plain', 'plain'), ('lambda 10, per head', 'lambda_10_per_head'))
    }
    for arm, own in right.items():
        (line,) = (line for line in table.splitlines() if line.startswith(f'{arm}  '))
        figures = line.removeprefix(arm).split()
        assert figures[0] == f'{100 * np.mean(own):.2f}' and figures[1] == f'{100 * np.std(own, ddof=1):.2f}'
        if arm != 'plain':
            assert figures[2] == f'{100 * np.mean(np.subtract(own, right["plain"])):+.2f}'

    monkeypatch.setattr(__main__, 'train', lambda *_, **__: pytest.fail('must not start'))
    assert 'steps 2, not 3' in error_line(monkeypatch, COMMAND, *arguments[:4], 3, *arguments[5:])
    (tmp_path / 'listops/plain_1.json').write_text('{}')
    assert 'plain_1.json is not the log' in error_line(monkeypatch, COMMAND, *arguments)


def test_wrong_input_is_one_line(monkeypatch, tmp_path):
    assert 'at least 1' in error_line(monkeypatch, COMMAND, 'bert', '--seeds', 0)
    assert 'at least 1' in error_line(monkeypatch, COMMAND, 'bert', '--steps', 0)
    (tmp_path / 'file').touch()
    assert 'could not be written' in error_line(monkeypatch, COMMAND, 'vit', '--out', tmp_path / 'file')
    monkeypatch.setattr(__main__, 'find_spec', lambda name: None)
    assert 'needs timm: pip install timm' in error_line(monkeypatch, COMMAND, 'vit', '--out', tmp_path)
