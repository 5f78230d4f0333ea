"""Forged checkpoints neither run code nor crash in any command. Intact ones are also read from addresses."""

import contextlib
import functools
import http.server
import shutil
import threading

import pytest
import torch
from conftest import CONFIG, run_tool
from entries import entries, try_entry
from forged import is_harmless, write_forged
from fuzzing import good_checkpoint
from mmdet.apis import DetInferencer, init_detector
from mmengine.runner import CheckpointLoader

from spec_mmdet import InputError
from spec_mmdet.checkpoints.reading import load
from spec_mmdet.checkpoints.safe_loading import load_weights_only


def test_forged_files_are_rejected_or_harmless(tmp_path):
    trace = tmp_path / 'trace'
    forged = write_forged(tmp_path, good_checkpoint(), trace)
    harmless = []
    for name, path in forged.items():
        for read in (load, functools.partial(load, mmap=True)):
            try:
                content = read(str(path))
            except InputError as error:
                assert str(path) in str(error) and '\n' not in str(error), name
            else:
                harmless.append(name)
                assert name == 'doubled without end' or str(trace) not in repr(content), name
        assert not trace.exists(), name
    assert len(forged) >= 60
    assert {name for name in harmless if not is_harmless(name)} == {  # must not affect the next command
        *('weights that are not finite', 'numbers for names', 'text for weights'),
        *('a list for weights', 'nothing', 'a number', 'no block and many'),
    }


@pytest.fixture(scope='module')
def forged_detectors(trained, tmp_path_factory):
    """Forged checkpoints of the shapes' detector, and the file that their code would create."""
    folder = tmp_path_factory.mktemp('forged')
    yield write_forged(folder, load(trained / 'epoch_1.pth'), folder / 'trace'), folder / 'trace'
    shutil.rmtree(folder)  # 1.2 GB


# `make torture` tests all files with all commands, and test_forged_files_are_rejected_or_harmless the reader.
OF_TRAINING = [
    'a place within the epoch that lies',
    'a place without end',
    'an optimiser that lies',
    'schedules that lie',
]
CONFIGS = {'train --resume': ['config of the resumed run', 'config in the message hub']}


def test_no_entry_runs_code(monkeypatch, shapes, forged_detectors, tmp_path):
    forged, trace = forged_detectors
    monkeypatch.delenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD', raising=False)
    for name, enter in entries(monkeypatch, shapes, tmp_path).items():
        for what in ['os.system', *(OF_TRAINING if name == 'train --resume' else [])]:
            assert try_entry(enter, forged[what]), (name, what)
            assert not trace.exists(), (name, what)
        for what in CONFIGS.get(name, ()):
            assert not try_entry(enter, forged[what]), (name, what)
            assert not trace.exists(), (name, what)


# They use much memory or time, as PyTorch's own weights-only loading allows.
EXHAUSTING = ('without end', 'slow coding', 'many times', 'zip bomb', 'TorchScript', 'bare pickle')


def test_mmengine_runs_no_code(monkeypatch, forged_detectors):
    forged, trace = forged_detectors
    monkeypatch.delenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD', raising=False)
    unsafe = load_weights_only(lambda filename, map_location: torch.load(filename, map_location, weights_only=False))
    unsafe_globals = torch.serialization.safe_globals([getattr, exec, eval])  # another library may allow this class
    for name, path in forged.items():
        if not any(part in name for part in EXHAUSTING):
            for read in (CheckpointLoader.load_checkpoint, unsafe):
                with contextlib.suppress(Exception), unsafe_globals:
                    read(str(path), 'cpu')
                assert not trace.exists(), name
    for enter in (DetInferencer, init_detector):
        with pytest.raises(InputError, match='it was not run'):
            enter(str(CONFIG), str(forged['os.system']), device='cpu')
        assert not trace.exists()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serve a folder at an address; return it with the download cache."""
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    (tmp_path / 'served' / 'other').mkdir(parents=True)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / 'served')
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as serving:
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        yield tmp_path / 'served', f'http://127.0.0.1:{serving.server_port}'
        serving.shutdown()
        thread.join()


def test_addresses_follow_the_same_rules_as_files(server, tmp_path):
    folder, address = server
    trace = tmp_path / 'trace'
    good = good_checkpoint()
    torch.save(good, folder / 'epoch_1.pth')
    torch.save(dict(w=torch.ones(1)), folder / 'other' / 'epoch_1.pth')
    content = load(f'{address}/epoch_1.pth')
    assert torch.equal(content['state_dict']['weight'], good['state_dict']['weight'])
    assert list(load(f'{address}/other/epoch_1.pth')) == ['w']  # differs from the file of the same name
    with pytest.raises(InputError, match=r'absent.pth: could not be downloaded \(HTTP Error 404'):
        load(f'{address}/absent.pth')
    with pytest.raises(InputError, match='could not be downloaded'):
        load('http://127.0.0.1:1/epoch_1.pth')
    content = CheckpointLoader.load_checkpoint(f'{address}/epoch_1.pth')
    assert torch.equal(content['state_dict']['weight'], good['state_dict']['weight'])
    for name, path in write_forged(folder, good, trace).items():
        with contextlib.suppress(InputError):
            load(f'{address}/{path.name}')
        if not any(part in name for part in EXHAUSTING):
            with contextlib.suppress(Exception):
                CheckpointLoader.load_checkpoint(f'{address}/{path.name}')
        assert not trace.exists(), name


def test_an_interrupted_download_leaves_no_file(server, tmp_path, monkeypatch):
    folder, address = server
    (folder / 'long.pth').write_bytes(bytes(1000))
    send = http.server.SimpleHTTPRequestHandler.copyfile
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, 'copyfile', lambda self, source, out: out.write(b'short'))
    with pytest.raises(InputError, match='too early'):
        load(f'{address}/long.pth')
    assert not list((tmp_path / 'hub' / 'checkpoints').iterdir())
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, 'copyfile', send)
    with pytest.raises(InputError, match='not a checkpoint'):
        load(f'{address}/long.pth')


def test_commands_take_addresses(monkeypatch, server, shapes, trained, tmp_path):
    folder, address = server
    (folder / 'epoch_1.pth').write_bytes((trained / 'epoch_1.pth').read_bytes())
    path = f'{address}/epoch_1.pth'
    out = tmp_path / 'out'
    args = [shapes / 'val' / '000001.png', '--out', out, '--no-pictures', '--device', 'cpu']
    run_tool(monkeypatch, 'predict', CONFIG, path, *args)
    assert (out / 'predictions.json').is_file()
    run_tool(monkeypatch, 'convert', path, tmp_path / 'converted.pth')
    assert load(tmp_path / 'converted.pth')['meta']['converted']['source'] == path


def test_every_loader_of_mmengine_is_replaced():
    assert all(loader.__module__ == 'mmengine.runner.checkpoint' for loader in CheckpointLoader._schemes.values())
    assert all(hasattr(loader, '__wrapped__') for loader in CheckpointLoader._schemes.values())
    assert set(CheckpointLoader._schemes) == {
        *('', 'http://', 'https://', 'pavi://', r'(\S+\:)?s3://', r'(\S+\:)?petrel://', 'modelzoo://'),
        *('torchvision://', 'open-mmlab://', 'openmmlab://', 'mmcls://'),
    }
