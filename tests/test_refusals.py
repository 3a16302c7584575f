"""Bad flags: one sentence on stderr that names them, exit code 2, and nothing is written."""

import itertools
import os

import pytest
import torch
from helpers import CASES, DATA, TINY, one_sentence, snapshot

# scripts, then flags or other flags, added to those of a run that works | words of the sentence: by
# default the flags. {name}: folder of a finished run; file: a file; other: a folder that holds a
# letter; !: without other flags.
REFUSED = """
distill --epochs -1; --epochs two; --epochs 1.5; --epochs-of 0; --batch-size 0; --batch-size -3
distill --weight-decay -1; --bias-decay nan; --alpha 1.5; --alpha -0.1; --alpha nan; --ema 2; --k 0
distill --out-dim 0; --out-dim 99999999999999999999; --bottleneck-dim 0; --head-hidden 0; --seed
distill --loss huber; --precision fp16; --device gpu; --device cuda; --seed -1; --probe svm
distill --probe-every 0; --probe-epochs 0; --log-every 0; --epoch 3; --subset 0; --save-every 0
distill --fp32-steps -1; --student-temperature 0; --teacher-temperature nan; --out file
distill --plot-format bmp; --encoder vgg12; --dataset imagenet; --k 41; --test-subset 451
distill,imp,lmc,landscape --resume --overwrite
imp --rounds -1; --rounds 60; --prune-fraction 0; --prune-fraction 1; --prune some; --control same
imp --rewind-epoch 3; --init student; --init random:1 random:01; --init random:x; --lr nan
imp --epochs 0; --save-every 0; --subset 5000
lmc --runs 1; --points 2; --bn-statistics none; --bn-batches 0; --line-subset 41; --epochs 0
landscape --x-range 1 0 5; --x-range 0 1 0; --x-range 0 0 2; --x-range 0 1 2.5; --x-range 0 1 1
landscape --y-range a 1 5                             | --y-range 'a' number
landscape --y-range nan 1 5                           | --y-range 'nan' number
landscape --plane curved; --k 41; --bn-statistics none; --batch-size 0; --subset 5000
probe {distill}/best.pt --probe none; {distill}/best.pt --network tutor
probe {distill}/best.pt --dataset noise; {distill}/best.pt --device cuda
distill --probe none knn                              | --probe
imp --rewind-epoch 0 0                                | --rewind-epoch once
imp,lmc --init random random                          | --init once
distill --lr 0; --lr nan; --lr inf; --lr -0.1         | --lr above 0
distill --alpha 0 0                                   | --alpha once
distill --seed 1 1                                    | --seed once
distill --subset 5000; --subset 40 5000               | --subset 5000 1347
distill --subset 40 4                                 | --k 5
distill --dataset cifar10                             | --data-dir cifar10
distill --dataset noise; --dataset digits cifar10     | --data-dir
distill --dataset cifar10 --data-dir nowhere; --dataset folder --data-dir nowhere; \
        --dataset tinyimagenet --data-dir nowhere; --dataset cifar5m --data-dir nowhere \
                                                      | --data-dir nowhere folder
distill --dataset folder --data-dir other             | --data-dir train
distill --dataset cifar10 --data-dir other            | other --download cifar-10-batches-py
distill --dataset tinyimagenet --data-dir other       | other tiny-imagenet-200
distill --download                                    | --download digits
distill --bottleneck -/l/fn                           | --bottleneck -/l/fn -/lb/fn/wn/l/-
distill --bottleneck wn/-/-/-/l/-                     | --bottleneck lin1
distill --no-weight-norm --bottleneck -/lb/fn/wn/l/fn | --no-weight-norm --bottleneck
distill --norm batch --encoder vit-tiny               | --norm batch ViT
distill --image-size 16; --image-size 100000          | --image-size 32 1024
distill --encoder vit-tiny --image-size 36            | --image-size 36 8
distill --probe-subset 5                              | --probe-subset 5 --probe-dataset
distill --probe-dataset digits --probe-subset 5000    | --probe-subset 5000 --probe-dataset
distill --probe-dataset cifar10                       | --probe-dataset cifar10 --data-dir
distill --beta 1 --out-dim 8                          | --beta 1 --out-dim
distill --beta 1 --dataset noise --probe-dataset digits | --beta 1 noise
distill --teacher nowhere.pt:student                  | nowhere.pt
distill --teacher nowhere.pt; --teacher=              | PATH:NETWORK
distill --teacher x.pt:pupil                          | --teacher supervised
distill --teacher {a}/checkpoint.pt:student --out-dim 32 --norm layer | --out-dim 64 no --norm
distill --teacher {a}/checkpoint.pt:student --head-hidden 9 | --head-hidden
distill --teacher {lmc}/runs/init0-run1.pt:supervised --encoder resnet56 | encoder resnet20
distill --teacher {lmc}/runs/init0-run1.pt:student    | init0-run1.pt
distill --out file/run                                | --out file/run
distill --out locked                                  | --out written
distill --out other --resume                          | --resume config.json
distill --out {distill}; --lr 0.1 0.2 --out {sweep}   | --out --resume --overwrite
distill --out {distill} --resume --lr 0.5             | --lr was 0.001, is 0.5
distill --out {distill} --resume --seed 3             | --seed was 0, is 3
distill --out {distill} --resume --encoder vgg11      | --encoder was resnet20, is vgg11
distill --out {distill} --resume --epochs 2           | --epochs 2
probe!                                                | CHECKPOINT
probe {distill}/missing.pt                            | missing.pt
probe {distill}                                       | distill
probe {distill}/log.csv                               | log.csv
probe {distill}/best.pt file                          | file
probe {imp}/chains/init0-rewind0.pt                   | init0-rewind0.pt run_distill.py
probe {distill}/best.pt --k 41                        | --k 41 40
probe {distill}/best.pt --out file                    | file --overwrite
probe {distill}/best.pt --out {distill}/log.csv --overwrite | log.csv probes
probe {distill}/best.pt --out {a}/checkpoint.pt --overwrite | checkpoint.pt CSV
probe {distill}/best.pt --out other --overwrite       | other folder
probe {distill}/best.pt --out nowhere/probe.csv       | nowhere
probe {distill}/best.pt --dataset cifar10             | --data-dir
probe {distill}/best.pt --seed x                      | --seed 'x'
probe {distill}/best.pt --image-size 64               | --image-size 32
imp --init nowhere.pt:student                         | nowhere.pt
imp --init {layer}/best.pt:student                    | best.pt
imp --init {layer}/checkpoint.pt:student {a}/checkpoint.pt:student | --init norm
imp --init {a}/checkpoint.pt:student --encoder resnet56 | --encoder
imp,lmc --init {a}/checkpoint.pt:student --image-size 64 | --image-size 32
imp --out {imp}                                       | --out --resume --overwrite
imp --out {imp} --resume --epochs 4                   | --epochs was 3, is 4
imp --out {imp} --resume --rounds 1                   | --rounds 1
lmc --out {lmc} --resume --lr 1                       | --lr was 0.1, is 1
imp --out {lmc} --resume; --out {lmc} --overwrite     | --out one run of run_lmc.py
distill --out {sweep} --resume; --out {sweep} --overwrite | --out several runs
distill --out {distill} --alpha 0 .5 --overwrite      | --out one run
distill --out {sweep} --resume --probe knn --alpha 1 0 --seed 2 1 --lr 1| --lr was [0.001], is [1.0]
distill --out {sweep} --resume --probe knn --epochs 2 --alpha 0 .5 | vary alpha seed
landscape!                                            | missing
landscape --image-size 64                             | --image-size 32
landscape --out {landscape} --resume --x-range 0 1 5  | --x-range
landscape --x-axis {a}/checkpoint.pt:tutor            | --x-axis tutor student-init
landscape --x-axis {a}/checkpoint.pt                  | --x-axis PATH:NETWORK
landscape! --x-axis {a}/checkpoint.pt --y-axis {b}/checkpoint.pt:student | --x-axis PATH:NETWORK
landscape --x-axis nowhere.pt:student                 | nowhere.pt
landscape --y-axis {a}/checkpoint.pt:student          | --y-axis line
landscape --y-axis {seed1}/checkpoint.pt:student      | --y-axis {seed1} teachers
landscape --y-axis {narrow}/checkpoint.pt:student     | --y-axis {narrow} --out-dim 32
landscape --y-axis {elsewhere}/checkpoint.pt:student  | --y-axis {elsewhere} normalised
landscape! --plot-only file --out x.png               | file
landscape! --plot-only nowhere --out x.png            | nowhere
landscape! --plot-only {landscape} --k 3 --out x.png  | --plot-only --k
landscape! --plot-only {landscape} --out file         | file --overwrite
landscape! --plot-only {landscape} --out no/x.png     | no/x.png folder
landscape! --plot-only {landscape} --out /proc/x.png  | /proc/x.png
landscape! --x-axis {noise}/best.pt:student --y-axis {noise}/best.pt:teacher --dataset digits \
                                                      | --origin noise test
landscape --dataset cifar10 --data-dir other          | --dataset
"""
BASE = {name: case.flags for name, case in CASES.items()} | {"probe": f"{DATA} --k 5"}


def rows():
    for line in REFUSED.strip().split("\n"):
        flags, _, words = line.partition("|")
        scripts, _, flags = flags.partition(" ")
        for name, more in itertools.product(scripts.split(","), flags.split(";")):
            more = " ".join(more.split())
            yield pytest.param(name, more, words or more[more.index("--") :], id=f"{name} {more}")


@pytest.mark.parametrize(("name", "flags", "words"), list(rows()))
def test_is_refused_in_a_sentence(script, finished, tmp_path, monkeypatch, name, flags, words):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("a,file\n")
    (tmp_path / "other").mkdir()
    (tmp_path / "locked" / ".lock").mkdir(parents=True)
    (tmp_path / "other" / "letter.txt").write_text("dear\n")
    if not name.endswith("!"):
        flags = " ".join(("--out new" * (name != "probe"), BASE[name], flags))
    flags, words = flags.format_map(finished), words.format_map(finished).split()
    before = snapshot(tmp_path), snapshot(finished.folder), os.listdir(tmp_path)
    assert one_sentence(script(name.strip("!"), flags), *words) == ""
    assert (snapshot(tmp_path), snapshot(finished.folder), os.listdir(tmp_path)) == before


def test_overwrite_of_a_sweep_is_refused_before_anything_is_deleted(script, tmp_path):
    """And what is deleted does not come back: a sweep none of whose runs ends has no summary."""
    flags = f"{TINY} --probe none --epochs 1 --out {tmp_path}"
    assert script("distill", flags, "--lr 0.001 0.002").code == 0
    assert script("distill", flags, "--lr 0.001 --subset 40 5000 --overwrite").code == 2
    assert (tmp_path / "summary.csv").exists()
    assert script("distill", flags, "--lr 1e30 1e29 --overwrite").code == 1
    assert not (tmp_path / "summary.csv").exists()
