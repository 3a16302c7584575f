"""run_imp.py through its command line: what it writes, the masks' promises, killing and resuming, refusing."""

import csv
import json
import os
import signal

import pytest
import torch
from conftest import SUPERVISED
from processes import finish, kill_when, start, start_two
from test_run_distill import assert_same_tree

import run_imp
from rtd import checkpoint, logs, plots, pruning
from rtd.logs import read_csv
from rtd.train import Trainer

COLUMNS = "init,rewind_epoch,round,sparsity,remaining_parameters,test_accuracy,test_accuracy_best,epochs,seconds"
FLAGS = [*SUPERVISED, "--epochs", "3", "--rounds", "2", "--rewind-epoch", "0", "1"]
WEIGHTS = 270_896  # of ResNet20's convolutions and its classifier


@pytest.fixture(scope="session")
def imp_run(tmp_path_factory):
    """The folder of a finished run of two chains, not to be changed by tests."""
    folder = tmp_path_factory.mktemp("imp") / "run"
    finish(start("run_imp", *FLAGS, "--out", folder))
    return folder


def assert_same_run(a, b):
    """The same rows, timings aside, and in each chain the same weights, momentum, streams, masks and rewind point."""
    for name in ("imp.csv", "chains/init0-rewind0.csv", "chains/init0-rewind1.csv"):
        rows = []
        for folder in (a, b):
            with open(folder / name) as file:
                rows.append([{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)])
        assert rows[0] == rows[1]
    for name in ("init0-rewind0.pt", "init0-rewind1.pt"):
        assert_same_tree(*(torch.load(folder / "chains" / name, weights_only=True) for folder in (a, b)))


def test_imp_csv_holds_a_row_for_each_round_of_each_chain(imp_run):
    assert (imp_run / "imp.csv").read_text().split("\n")[0] == COLUMNS
    rows = read_csv(imp_run / "imp.csv")
    assert [(row["init"], row["rewind_epoch"], row["round"]) for row in rows] == [
        ("random", rewind, r) for rewind in (0, 1) for r in range(3)
    ]
    for row in rows:
        pruned = sum(0.8**i * 0.2 for i in range(row["round"]))
        assert abs(WEIGHTS - row["remaining_parameters"] - pruned * WEIGHTS) <= 1
        assert row["sparsity"] == pytest.approx(1 - row["remaining_parameters"] / WEIGHTS, abs=1e-8)
        assert row["epochs"] == (3 if row["round"] == 0 else 3 - row["rewind_epoch"])
        assert 0 <= row["test_accuracy"] <= row["test_accuracy_best"] <= 100
        assert row["seconds"] > 0
    for rewind in (0, 1):  # of the last round, the checkpoint has the accuracies of each epoch
        training = torch.load(imp_run / "chains" / f"init0-rewind{rewind}.pt", weights_only=True)["training"]
        row = rows[2 + 3 * rewind]
        assert row["test_accuracy"] == pytest.approx(training["accuracies"][-1])
        assert row["test_accuracy_best"] == pytest.approx(max(training["accuracies"][rewind:]))
        assert row["seconds"] < training["seconds"] + 1e-6
    config = json.loads((imp_run / "config.json").read_text())
    assert config["flags"]["rounds"] == 2 and "run_imp.py" in config["command"]


def test_masks_are_in_the_checkpoint_and_cover_the_weights(imp_run):
    for chain in ("init0-rewind0", "init0-rewind1"):
        contents = torch.load(imp_run / "chains" / f"{chain}.pt", weights_only=True)
        assert sum(int(mask.sum()) for mask in contents["masks"].values()) == round(WEIGHTS * 0.64)
        weights = contents["training"]["classifier"]
        assert all((weights[name][~mask] == 0).all() for name, mask in contents["masks"].items())
        assert sum(int((weights[name] == 0).sum()) for name in contents["masks"]) == WEIGHTS - round(WEIGHTS * 0.64)
        assert contents["rewind"]["epoch"] == int(chain[-1]) == len(contents["rewind"]["accuracies"])


@pytest.mark.parametrize("rewind_epoch", [0, 1])
def test_each_round_starts_at_mask_times_rewind_weights_and_stays_masked(script, tmp_path, monkeypatch, rewind_epoch):
    """Bit for bit at the start; exactly 0 in every forward pass, which the one after the last step, for testing, belongs to."""
    passes = []  # (round's name, weights) in each forward pass
    epochs, run_epoch = [], Trainer.run_epoch

    def watched(trainer):
        def look(model, _):
            passes.append((trainer.name[-1], {name: weight.detach().clone() for name, weight in model.named_parameters()}))

        hook = trainer.classifier.register_forward_pre_hook(look)
        epochs.append((trainer.name[-1], trainer.state()))
        run_epoch(trainer)
        hook.remove()

    monkeypatch.setattr(Trainer, "run_epoch", watched)
    flags = (*SUPERVISED, "--epochs", 3, "--rounds", 2, "--rewind-epoch", rewind_epoch, "--out", tmp_path / "run")
    assert script("run_imp", *flags).code == 0
    contents = torch.load(tmp_path / "run" / "chains" / f"init0-rewind{rewind_epoch}.pt", weights_only=True)
    rewind, masks = contents["rewind"], contents["masks"]
    original = epochs[rewind_epoch][1]
    assert_same_tree(rewind, original)
    previous = None
    for round_ in ("1", "2"):
        begin = next(state for name, state in epochs if name == round_)
        kept = {name: begin["classifier"][name] != 0 for name in masks}
        assert all(torch.equal(begin["classifier"][name], rewind["classifier"][name] * mask) for name, mask in kept.items())
        others = [name for name in rewind["classifier"] if name not in masks]
        assert all(torch.equal(begin["classifier"][name], rewind["classifier"][name]) for name in others)
        assert_same_tree(begin["optimizer"]["state"], rewind["optimizer"]["state"])  # momentum
        assert begin["epoch"] == rewind_epoch
        if previous is not None:
            assert not any((mask & ~previous[name]).any() for name, mask in kept.items())  # a mask only shrinks
            assert_same_tree(kept, masks)
        previous = kept
        seen = [weights for name, weights in passes if name == round_]
        assert len(seen) == (3 - rewind_epoch) * 4  # 3 steps and a test an epoch
        assert all((weights[name][~mask] == 0).all() for weights in seen for name, mask in kept.items())
        assert any((seen[-1][name] != seen[0][name]).any() for name in kept)


def test_pruned_are_the_smallest_of_the_trained_weights(script, tmp_path, monkeypatch):
    calls, ends, prune, run_epoch = [], [], pruning.prune_smallest, Trainer.run_epoch

    def watched(masks, weights, count):
        result = prune(masks, weights, count)
        calls.append((count, result))
        return result

    def remembered(trainer):
        run_epoch(trainer)
        ends.append(torch.cat([p.detach().flatten() for p in trainer.classifier.parameters()]).abs())

    monkeypatch.setattr(pruning, "prune_smallest", watched)
    monkeypatch.setattr(Trainer, "run_epoch", remembered)
    flags = (*SUPERVISED, "--epochs", 1, "--rounds", 1, "--prune", "all", "--prune-fraction", 0.5, "--out", tmp_path / "run")
    assert script("run_imp", *flags).code == 0
    ((count, masks),), trained = calls, ends[0]  # as the first round ends, before it is rewound
    kept = torch.cat([mask.flatten() for mask in masks.values()])
    assert trained[kept].min() >= trained[~kept].max()
    assert len(trained) == 272_474 and (~kept).sum() == count == 272_474 // 2
    assert "encoder.1.weight" in masks and "fc.bias" in masks
    assert read_csv(tmp_path / "run" / "imp.csv")[-1]["remaining_parameters"] == 272_474 // 2


@pytest.mark.parametrize("chain, rows", [("init0-rewind0", 1), pytest.param("init0-rewind1", 0, marks=pytest.mark.slow)])
def test_killed_and_resumed_equals_unbroken(imp_run, tmp_path, chain, rows):
    """SIGKILL when a chain has so many rows and a checkpoint: between rounds, or inside the first."""
    out = tmp_path / "run"
    log, saved = out / "chains" / f"{chain}.csv", out / "chains" / f"{chain}.pt"
    kill_when(start("run_imp", *FLAGS, "--out", out), lambda: saved.exists() and log.read_text().count("\n") > rows)
    stdout, _ = finish(start("run_imp", *FLAGS, "--out", out, "--resume"))
    assert f"rewind {chain[-1]}: resumed in round" in stdout
    assert_same_run(out, imp_run)


def test_sigterm_within_an_epoch_loses_no_step(imp_run, script, tmp_path, monkeypatch):
    """Rounds have three epochs of three steps; the signal comes in the second round, while the optimizer is at work."""
    calls, plain = iter(range(1, 1000)), torch.optim.SGD.step

    def signalled(optimizer, *arguments):
        plain(optimizer, *arguments)
        if next(calls) == 14:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(torch.optim.SGD, "step", signalled)
    flags = [*FLAGS, "--out", tmp_path / "run", "--resume"]
    assert script("run_imp", *flags).code == 143
    training = torch.load(tmp_path / "run" / "chains" / "init0-rewind0.pt", weights_only=True)["training"]
    assert (training["epoch"], len(training["losses"])) == (1, 2)
    assert script("run_imp", *flags).code == 0
    assert_same_run(tmp_path / "run", imp_run)


def stop_in_epoch(monkeypatch, number):
    """Ctrl-C after the training of the run's epoch ``number``, before it is saved."""
    epochs, train_epoch = iter(range(1000)), Trainer.train_epoch

    def interrupted(trainer):
        loss = train_epoch(trainer)
        if next(epochs) == number:
            signal.raise_signal(signal.SIGINT)
        return loss

    monkeypatch.setattr(Trainer, "train_epoch", interrupted)


@pytest.mark.slow
@pytest.mark.parametrize("save_every", [2, 1])
def test_interrupted_anywhere_and_resumed_equals_unbroken(imp_run, script, tmp_path, monkeypatch, save_every):
    flags = (*FLAGS, "--out", tmp_path / "run", "--resume", "--save-every", save_every)
    for number in (1, 3, 2, 4):
        with monkeypatch.context() as patch:
            stop_in_epoch(patch, number)
            assert script("run_imp", *flags).code == 130
    assert script("run_imp", *flags).code == 0
    assert_same_run(tmp_path / "run", imp_run)
    assert script("run_imp", *flags).code == 0  # of a finished run: nothing changes
    assert_same_run(tmp_path / "run", imp_run)


@pytest.mark.parametrize("part", ["masks", "momentum", "rewind"])
def test_resuming_another_state_is_caught(imp_run, script, tmp_path, part):
    """Negative control of the tests above: they do see masks, a momentum or a rewind point that was not restored."""
    flags = (*FLAGS, "--out", tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        stop_in_epoch(patch, 4)
        assert script("run_imp", *flags).code == 130
    path = tmp_path / "run" / "chains" / "init0-rewind0.pt"
    contents = torch.load(path, weights_only=True)
    assert (contents["round"], contents["training"]["epoch"]) == (1, 1)
    if part == "momentum":
        contents["training"]["optimizer"]["state"][0]["momentum_buffer"][0] += 1e-3
    elif part == "rewind":
        contents["rewind"]["classifier"]["fc.weight"][0, 0] += 1e-3
    else:
        mask = contents["masks"]["fc.weight"].flatten()
        contents["masks"]["fc.weight"] = mask.roll(1).view_as(contents["masks"]["fc.weight"])
    torch.save(contents, path)
    assert script("run_imp", *flags, "--resume").code == 0
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "run", imp_run)


def test_more_rounds_continue_a_finished_run(imp_run, script, tmp_path):
    for rounds in (1, 2):
        assert script("run_imp", *FLAGS, "--rounds", rounds, "--out", tmp_path / "run", "--resume").code == 0
    assert_same_run(tmp_path / "run", imp_run)
    result = script("run_imp", *FLAGS, "--rounds", 1, "--out", tmp_path / "run", "--resume")
    assert result.code == 2 and "--rounds 1" in result.err


def test_starts_from_checkpoints_are_recorded_and_drawn(tiny_run, script, tmp_path):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes((tiny_run / "checkpoint.pt").read_bytes())
    inits = [f"{path}:student", f"{path}:student-init", "random", "random:1"]
    flags = [flag for flag in SUPERVISED if flag not in ("--no-plot", "--encoder", "resnet20")]
    flags += ["--init", *inits, "--epochs", 1, "--rounds", 1, "--out", tmp_path / "run"]
    result = script("run_imp", *flags)
    assert result.code == 0, result.err
    assert [row["init"] for row in read_csv(tmp_path / "run" / "imp.csv")[::2]] == inits
    assert (tmp_path / "run" / "imp.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["reads"].items() >= dict.fromkeys(inits[:2], checkpoint.sha256(path)).items()
    contents = torch.load(path, weights_only=True)
    start = torch.load(tmp_path / "run" / "chains" / "init0-rewind0.pt", weights_only=True)["rewind"]["classifier"]
    assert all(torch.equal(start[name], contents["student"][name]) for name in start if name.startswith("encoder."))

    path.write_bytes((tiny_run / "best.pt").read_bytes() + b" ")
    result = script("run_imp", *flags, "--resume")
    assert result.code == 2 and "changed since" in result.err


def test_a_file_of_another_run_is_refused(imp_run, script, tmp_path):
    assert script("run_imp", *FLAGS, "--out", tmp_path / "run").code == 0
    path = tmp_path / "run" / "chains" / "init0-rewind0.pt"
    contents = torch.load(path, weights_only=True)
    momentum = contents["rewind"]["optimizer"] | {"state": {0: {"momentum_buffer": torch.zeros(3)}}}
    for change, said in (
        ({"masks": {}}, "masks"),
        ({"masks": contents["masks"] | {"fc.weight": torch.ones(3, dtype=torch.bool)}}, "masks"),
        ({"masks": {name: torch.ones_like(mask) for name, mask in contents["masks"].items()}}, "masks"),
        ({"masks": {name: mask.float() for name, mask in contents["masks"].items()}}, "masks"),
        ({"rewind": contents["rewind"] | {"epoch": 1, "accuracies": [0.0]}}, "rewind point"),
        ({"rewind": contents["rewind"] | {"optimizer": momentum}}, "momentum"),
        ({"round": -1}, "round"),
        ({"round": 2, "rewind": None}, "rewind"),
        ({"format": "rtd-lmc-1"}, "run_imp.py"),
        ({"training": {}}, "cannot be resumed"),
    ):
        torch.save(contents | change, path)
        before = path.read_bytes()
        result = script("run_imp", *FLAGS, "--out", tmp_path / "run", "--resume")
        assert result.code == 2 and str(path) in result.err and said in result.err and result.err.count("\n") == 1
        assert path.read_bytes() == before
    torch.save(contents, path)
    log = path.with_suffix(".csv")
    log.write_text(log.read_text().replace("random,0,1", "random,0,7"))
    result = script("run_imp", *FLAGS, "--out", tmp_path / "run", "--resume")
    assert result.code == 2 and str(log) in result.err


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--rounds", "-1"], "--rounds"),
        (["--rounds", "60"], "nothing would be left"),
        (["--prune-fraction", "0"], "--prune-fraction"),
        (["--prune-fraction", "1"], "--prune-fraction"),
        (["--rewind-epoch", "3"], "--rewind-epoch 3"),
        (["--rewind-epoch", "0", "0"], "--rewind-epoch"),
        (["--init", "random", "random"], "--init"),
        (["--init", "random:1", "random:01"], "--init"),
        (["--init", "student"], "--init student"),
        (["--init", "nowhere.pt:student"], "nowhere.pt"),
        (["--prune", "some"], "--prune"),
        (["--epochs", "0"], "--epochs"),
        (["--lr", "nan"], "--lr"),
        (["--save-every", "0"], "--save-every"),
        (["--resume", "--overwrite"], "--overwrite"),
        (["--subset", "5000"], "--subset"),
    ],
)
def test_bad_flags_are_refused_before_anything_is_written(script, tmp_path, flags, said):
    result = script("run_imp", *FLAGS, "--out", tmp_path / "run", *flags)
    assert result.code == 2 and said in result.err and result.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_an_existing_run_is_not_overwritten_unasked(imp_run, script):
    before = (imp_run / "imp.csv").read_bytes()
    assert "--overwrite" in script("run_imp", *FLAGS, "--out", imp_run).err
    assert "--epochs was 3, is 4" in script("run_imp", *FLAGS, "--epochs", 4, "--out", imp_run, "--resume").err
    assert (imp_run / "imp.csv").read_bytes() == before


def test_overwrite_starts_again(script, tmp_path):
    flags = (*SUPERVISED, "--epochs", 1, "--rounds", 0, "--out", tmp_path / "run")
    assert script("run_imp", *flags, "--rewind-epoch", 0).code == 0
    assert script("run_imp", *flags, "--seed", 1, "--overwrite").code == 0
    assert len(read_csv(tmp_path / "run" / "imp.csv")) == 1


def test_a_diverging_run_stops_and_keeps_its_checkpoint(script, tmp_path, monkeypatch):
    stop_in_epoch(monkeypatch, 1)
    flags = (*FLAGS, "--out", tmp_path / "run")
    assert script("run_imp", *flags).code == 130
    monkeypatch.undo()
    path = tmp_path / "run" / "chains" / "init0-rewind0.pt"
    contents = torch.load(path, weights_only=True)
    contents["training"]["optimizer"]["state"][0]["momentum_buffer"].fill_(float("inf"))
    torch.save(contents, path)
    before = path.read_bytes()
    result = run_in_this_process(script, monkeypatch, flags)
    assert result.code == 1 and "random, rewind 0, round 0" in result.err and "--lr" in result.err
    assert path.read_bytes() == before


def test_a_chain_that_diverges_does_not_keep_the_others_from_their_end(script, tmp_path, monkeypatch):
    run_epoch = Trainer.run_epoch

    def diverging(trainer):
        if "random:1" in trainer.name:
            trainer._stop(1)
        run_epoch(trainer)

    monkeypatch.setattr(Trainer, "run_epoch", diverging)
    flags = [*SUPERVISED, "--init", "random:1", "random:2", "--epochs", 1, "--rounds", 1, "--out", tmp_path / "run"]
    result = script("run_imp", *flags)
    assert result.code == 1 and "1 of 2 chains stopped early: random:1" in result.err
    assert [row["init"] for row in read_csv(tmp_path / "run" / "imp.csv")] == ["random:2"] * 2


@pytest.mark.slow
def test_flags_of_training_reach_it(script, tmp_path, tiny_run, monkeypatch):
    """--lr, --precision, --batch-size, and the normalisation that a checkpoint's weights were distilled with."""
    contents = torch.load(tiny_run / "checkpoint.pt", weights_only=True)
    contents["data"]["mean"] = [0.1, 0.2, 0.3]
    torch.save(contents, tmp_path / "moved.pt")
    made, begin = [], Trainer.__init__

    def watched(trainer, classifier, data, *arguments):
        begin(trainer, classifier, data, *arguments)
        made.append((data.mean, trainer.lr, trainer.batch_size, trainer.precision, trainer.epochs))

    monkeypatch.setattr(Trainer, "__init__", watched)
    flags = ["--subset", 40, "--test-subset", 30, "--init", f"{tmp_path / 'moved.pt'}:student", "--epochs", 1, "--no-plot"]
    flags += ["--lr", 0.03, "--precision", "bf16", "--batch-size", 20, "--device", "cpu"]
    assert script("run_imp", *flags, "--rounds", 0, "--out", tmp_path / "imp").code == 0
    assert script("run_lmc", *flags, "--runs", 2, "--points", 2, "--out", tmp_path / "lmc").code == 0
    assert made == [((0.1, 0.2, 0.3), 0.03, 20, "bf16", 1)] * 3


def test_the_figure_has_mean_and_band_of_the_starts_of_a_kind(tmp_path, monkeypatch):
    """Three starts of one kind and one of another, two rounds each, drawn on a log axis with a mark for each round."""
    accuracies = {"a:student": (50, 40), "b:student": (52, 44), "c:student": (54, 48), "random": (30, 20)}
    rows = [
        dict.fromkeys(COLUMNS.split(","), 0) | {"init": init, "round": r, "sparsity": s, "test_accuracy": values[r]}
        for init, values in accuracies.items()
        for r, s in ((0, 0.0), (1, 0.2))
    ]
    logs.CsvLog(tmp_path / "imp.csv", COLUMNS.split(",")).start(rows)
    drawn = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: drawn.append(figure))
    plots.plot_imp(tmp_path / "imp.png", tmp_path / "imp.csv", {init: init.partition(":")[2] or init for init in accuracies})
    (axis,) = drawn[0].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axis.lines}
    assert lines == {"student, l = 0": [[100, 52], [80, 44]], "random, l = 0": [[100, 30], [80, 20]]}
    (band,) = axis.collections  # one start alone has none
    assert {tuple(point) for point in band.get_paths()[0].vertices.tolist()} >= {(100, 50), (100, 54), (80, 40), (80, 48)}
    assert axis.get_xscale() == "log" and axis.xaxis_inverted()
    assert [label.get_text() for label in axis.get_xticklabels()] == ["100", "80"]


def run_in_this_process(script, monkeypatch, flags):
    return script("run_imp", *flags, "--resume")


def test_two_processes_share_chains_and_get_the_same_files(tmp_path):
    """Two chains: each process does one by itself, and the result is that of one process."""
    flags = [*FLAGS, "--epochs", 2, "--rounds", 1]
    finish(start("run_imp", *flags, "--out", tmp_path / "one", OMP_NUM_THREADS="1"))
    finish(*start_two("run_imp", *flags, "--out", tmp_path / "two"))
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert tuple(COLUMNS.split(",")) == run_imp.COLUMNS


@pytest.mark.slow
def test_two_processes_train_one_chain_together(tmp_path):
    """VGG11, without batch norm: gradients averaged over uneven parts are those of the whole batch."""
    flags = [*SUPERVISED, "--encoder", "vgg11", "--lr", 0.01, "--subset", 39, "--epochs", 2, "--rounds", 1]
    states = []
    finish(start("run_imp", *flags, "--out", tmp_path / "one", OMP_NUM_THREADS="1"))
    finish(*start_two("run_imp", *flags, "--out", tmp_path / "two"))
    for name in ("one", "two"):
        states.append(torch.load(tmp_path / name / "chains" / "init0-rewind0.pt", weights_only=True))
    one, two = (state["training"]["classifier"] for state in states)
    begin = states[0]["rewind"]["classifier"]
    assert_same_tree(begin, states[1]["rewind"]["classifier"])
    for name, weight in one.items():
        moved = (weight - begin[name]).norm()
        assert (weight - two[name]).norm() <= 0.02 * moved
