"""A short form of `make torture`."""

import torture


def test_nothing_is_lost(tmp_path):
    rows = torture.torture(kill_count=8, seconds=5, seed=1, folder=tmp_path)
    assert {row.name: row.lost for row in rows} == dict.fromkeys((row.name for row in rows), 0)
    assert all(row.tried >= 4 for row in rows[2:]) and rows[0].tried + rows[1].tried >= 8


def test_what_is_lost_is_seen(tmp_path, monkeypatch):
    # With files that are written in place, as MMEngine does, kills within a write cost a checkpoint.
    monkeypatch.setattr(torture, 'finish', lambda work, truth: False)
    (row,) = [torture.signals(tmp_path, {}, 1, torture.random.Random(0))]
    assert row.lost == 1
