"""bench.py starts and prints its tables; what they say is for a quiet machine and a reader."""

import sys

import bench


def test_every_table_is_printed(monkeypatch, capsys):
    flags = ["--encoder", "resnet20", "--batch-size", "8", "--out-dim", "64", "--rounds", "1", "--device", "cpu"]
    flags += ["--probe-images", "40", "20", "--images", "16", "--only", "step", "probe", "imp", "landscape", "precision"]
    monkeypatch.setattr(sys, "argv", ["bench.py", *flags])
    monkeypatch.setattr(bench, "lacks_bf16", lambda device: False)
    bench.main()
    said = capsys.readouterr().out
    assert said.count("###") == 5
    for row in ("step, bf16", "20-NN probe", "supervised step, masked", "point"):
        assert f"| {row} | " in said
