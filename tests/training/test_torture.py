"""A short form of `make torture`."""

import torture

PARTS = [part for part in torture.PARTS if part != 'forged']  # tested in test_forged.py


def test_nothing_is_lost(tmp_path):
    rows = torture.torture(kill_count=8, seconds=2, forged_count=0, seed=1, folder=tmp_path, only=PARTS, guided=False)
    assert {row.name: row.losses for row in rows} == {row.name: [] for row in rows}
    assert all(row.tried >= 4 for row in rows[2:]) and rows[0].tried + rows[1].tried >= 8
    assert rows[1].tried >= 2 and all(row.tried > 20 for row in rows[-3:])


def test_losses_are_detected(tmp_path, monkeypatch):
    monkeypatch.setattr(torture, 'finish', lambda work, truth: False)
    (row,) = [torture.signals(tmp_path, {}, 1, torture.random.Random(0))]
    assert row.lost == 1
    # A reader that fails on one changed byte, by an exception or a crash.
    for fault in (lambda *args: 1 / 0, lambda *args: torture.os.abort()):
        monkeypatch.setattr(torture.fuzzing, 'ENTRIES', dict(reader=(fault, torture.fuzzing.reader_seeds)))
        (reader,) = torture.Fuzzing(tmp_path, 1, guided=False).wait()
        assert reader.lost
