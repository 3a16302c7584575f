"""Every number in the README's account of the paper is the one in its CSV, and what it names is there."""

import re
from pathlib import Path

import pytest

from rtd.head import PAPERS
from rtd.logs import read_csv

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
README = (ROOT / "README.md").read_text()
PROSE = " ".join(README.split())
SECTION = README.partition("## The paper, reproduced")[2].partition("\n## ")[0]
TABLE = [[cell.strip() for cell in line.strip("|").split("|")] for line in SECTION.splitlines() if line.startswith("|")]
ROWS = {cells[0]: cells for cells in TABLE}
HERE = 4  # the column of what was measured here


def summary(folder, quantity, epoch="best", **setting):
    """The row of results/``folder``/summary.csv for ``quantity`` under the flags ``setting``."""
    rows = read_csv(RESULTS / folder / "summary.csv")
    wanted = {"quantity": quantity, "epoch": epoch, **setting}
    [row] = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    return row


def mean(*args, **setting):
    return f"{summary(*args, **setting)['mean']:.1f}"


def spread(*args, **setting):
    row = summary(*args, **setting)
    return f"{row['mean']:.1f} +- {row['std']:.1f}"


def last(path, column):
    return read_csv(RESULTS / path)[-1][column]


def best(path, column):
    return max(row[column] for row in read_csv(RESULTS / path)[1:] if row[column] is not None)


def both(folder, who, spread_too=True, **setting):
    """Best linear / 20-NN probe, in percent."""
    return " / ".join((spread if spread_too else mean)(folder, f"{who}_{probe}", **setting) for probe in ("linear", "knn"))


def along(folder, flag, names, **setting):
    """The student's best linear / 20-NN probe for each value of ``flag``, under the names of it that the README uses."""
    cells = [f"{name}: {both(folder, 'student', False, **{flag: value}, **setting)}" for value, name in names.items()]
    return ", ".join(cells)


def teacher(folder, **setting):
    return f"teacher {both(folder, 'teacher', False, **setting)}"


def probe(path, kind, network):
    """Mean of one of the probes of ``network`` over the rows of a probe.csv."""
    values = [row[kind] for row in read_csv(RESULTS / path) if row["network"] == network]
    return f"{sum(values) / len(values):.1f}"


def table(kind):
    who = [f"{mean('fig1', f'teacher_{kind}')} -> {spread('fig1', f'student_{kind}')}", f"pixels {mean('fig1', f'input_{kind}')}"]
    untrained = [last(f"cifar10-untrained/{name}.csv", f"teacher_{kind}") for name in ("vgg11", "resnet18")]
    return f"VGG11 {', '.join(who)}; untrained, all images: VGG11 {untrained[0]:.1f}, ResNet18 {untrained[1]:.1f}"


def transfer(kind):
    names = {"CIFAR-10 to digits": "cifar10-to-digits", "digits to CIFAR-10": "digits-to-cifar10"}
    cells = []
    for name, file in names.items():
        before, after = (probe(f"transfer/{file}.csv", kind, network) for network in ("teacher", "student"))
        cells.append(f"{name} {before} -> {after}")
    pixels = probe("transfer/cifar10-to-digits.csv", kind, "input")
    return f"{cells[0]}, pixels {pixels}; {cells[1]}, pixels {mean('fig1', f'input_{kind}')}"


def full_size():
    path = "cifar10-full/log.csv"
    reached = f"{last(path, 'teacher_linear'):.1f} -> {last(path, 'student_linear'):.1f}"
    return f"all images, the paper's protocol, epoch {last(path, 'epoch')} of 100: {reached}"


def fig_1():
    reached = f"{spread('fig1', 'student_linear')}, final {spread('fig1', 'student_linear', 'final')}"
    large = f"{last('cifar10-10k/log.csv', 'teacher_linear'):.1f} -> {best('cifar10-10k/log.csv', 'student_linear'):.1f}"
    resnet = f"{last('fig1/resnet18.csv', 'teacher_linear'):.1f} -> {best('fig1/resnet18.csv', 'student_linear'):.1f}"
    return (
        f"{mean('fig1', 'teacher_linear')} -> {reached}; 10,000 images: {large}; ResNet18, 2,000 images: {resnet}; {full_size()}"
    )


def fig_4():
    names = {500: "500", 1500: "1,500", 5000: "5,000"}
    lines = [f"{name}: {along('fig4', 'subset', names, dataset=name)}" for name in ("cifar10", "noise")]
    return "; ".join([*lines, teacher("fig4", dataset="cifar10", subset=5000)])


def fig_10():
    names = {16: "16", 256: "256", 4096: "4,096", 65536: "65,536"}
    return f"{along('fig10', 'out_dim', names)}; {teacher('fig10', out_dim=4096)}"


def fig_11():
    names = dict(none="none", batch="batch", instance="instance", group8="group8", layer="layer")
    cells = []
    for norm, name in names.items():
        cells.append(f"{name} {mean('fig11', 'teacher_linear', norm=norm)} -> {mean('fig11', 'student_linear', norm=norm)}")
    return ", ".join(cells)


def fig_12():
    slots = {row["bottleneck"]: f"`{row['bottleneck']}`" for row in read_csv(RESULTS / "fig12/summary.csv")}
    return f"{along('fig12', 'bottleneck', slots)}; {teacher('fig12', bottleneck=PAPERS)}"


def fig_17():
    cells = []
    for alpha in (0, 1):
        of = {name: summary("fig3", name, "final", alpha=alpha)["mean"] for name in ("kl", "distance_encoder", "distance_head")}
        cells.append("alpha {}: KL {:.1e}, moved {:.1f} + {:.1f} (encoder + head)".format(alpha, *of.values()))
    return "; ".join(cells)


def fig_18():
    log = "fig18.csv"
    rounds = f"round 1: {last('fig1/seed0.csv', 'teacher_linear'):.1f} -> {last('fig1/seed0.csv', 'student_linear'):.1f} (final)"
    return f"{rounds}; round 2: {last(log, 'teacher_linear'):.1f} -> {last(log, 'student_linear'):.1f} (final)"


def table_5():
    names = dict(vgg11="VGG11", vgg13="VGG13", vgg16="VGG16", vgg19="VGG19", resnet20="ResNet20", resnet56="ResNet56")
    names |= {"resnet18": "ResNet18", "resnet34": "ResNet34", "resnet50": "ResNet50", "vit-tiny": "ViT-Tiny"}
    names |= {"vit-small": "ViT-Small", "vit-medium": "ViT-Medium", "vit-base": "ViT-Base"}
    cells = [f"{name} {mean('table5', 'teacher_linear', encoder=encoder)}" for encoder, name in names.items()]
    log = "table5/resnet20-student.csv"
    student = f"{last(log, 'teacher_linear'):.1f} -> {best(log, 'student_linear'):.1f}"
    return f"untrained: {', '.join(cells)}; ResNet20, 10,000 images: {student}"


def grid(folder, column, x, y):
    """``column`` of results/landscapes/``folder`` at the grid point nearest to (x, y)."""
    rows = read_csv(RESULTS / "landscapes" / folder / "landscape.csv")
    return min(rows, key=lambda row: (row["x"] - x) ** 2 + (row["y"] - y) ** 2)[column]


def place(folder, point):
    [row] = [row for row in read_csv(RESULTS / "landscapes" / folder / "points.csv") if row["name"] == point]
    return complex(row["x"], row["y"])


def fig_5():
    half, near, far = (grid("shared", "train_kl", x, y) for x, y in ((0.5, 0.5), (1, 0), (0, 1)))
    return f"train KL at the grid points next to half-way between the students {half:.1e}, next to them {near:.1e} and {far:.1e}"


def fig_8():
    parts = []
    for name, file, rounds in (("ResNet20", "resnet20", 7), ("VGG11", "imp", 6)):
        student, random = (kept(who, file, rounds) for who in ("student", "student-init"))
        of = " of the weights" * (not parts)
        parts.append(f"{name}, all to {remaining(file, rounds)} %{of}: student {student}, random {random}")
    return "; ".join(parts)


def fig_9():
    vgg = f"random {barrier('student-init')}, student {barrier('student')}"
    resnet = [barrier(name, "resnet18-barriers") for name in ("student-init", "student")]
    return f"test error barrier: VGG11 {vgg}, ResNet18 random {resnet[0]}, student {resnet[1]} points"


def fig_13():
    near = abs(place("shared-orthogonal", "theta*_S(0)"))
    start, end = (place("nonlocal-orthogonal", name) for name in ("theta_S(1)", "theta*_S(1)"))
    return f"moved: theta_S(0) by {near:.1f}, theta_S(1) by {abs(end - start):.1f}, {abs(end):.0f} from theta_T"


def fig_14():
    return "train KL away from the student over that towards it: {:.1f} at 0.02, {:.0f} at 0.06".format(*valley())


def encoder_kl(folder, points):
    return "KL of embeddings at " + ", ".join(f"{name} {grid(folder, 'train_kl', *at):.2g}" for name, at in points.items())


ALPHAS = {0: "0", 0.2: ".2", 0.4: ".4", 0.6: ".6", 0.8: ".8", 1: "1"}
OURS = {
    "Table 1": lambda: table("linear"),
    "Table 2": lambda: transfer("linear"),
    "Table 3": lambda: table("knn"),
    "Table 4": lambda: transfer("knn"),
    "Table 5": table_5,
    "Fig. 1": fig_1,
    "Fig. 3": lambda: f"{along('fig3', 'alpha', ALPHAS)}; {teacher('fig3', alpha=0)}",
    "Fig. 4": fig_4,
    "Fig. 5": fig_5,
    "Fig. 8": fig_8,
    "Fig. 9": fig_9,
    "Fig. 10": fig_10,
    "Fig. 11": fig_11,
    "Fig. 12": fig_12,
    "Fig. 13": fig_13,
    "Fig. 14": fig_14,
    "Fig. 15": lambda: encoder_kl("shared-encoder", {"the grid points next to theta*_S(0)": (1, 0), "theta*_S(1)": (0, 1)}),
    "Fig. 16": lambda: encoder_kl("shared-encoder-crop", {"x = -0.0208": (-0.0208, 0), "x = +0.0208": (0.0208, 0)}),
    "Fig. 17": fig_17,
    "Fig. 18": fig_18,
}


@pytest.mark.parametrize("name", OURS)
def test_a_row_says_what_its_csv_holds(name):
    assert ROWS[name][HERE].partition(" ([")[0] == OURS[name]()


def test_every_table_and_figure_has_a_row_with_a_command_and_a_verdict():
    figures = (1, 3, 4, 5, *range(8, 19))
    assert [name for name in ROWS if name[:3] in ("Tab", "Fig")] == [f"Table {i}" for i in range(1, 6)] + [
        f"Fig. {i}" for i in figures
    ]
    for name, cells in ROWS.items():
        if name.startswith(("Table", "Fig")):
            assert len(cells) == 6 and all(cells[1:]), name
            assert cells[-1].startswith(("agrees", "differs", "not run")), name


def valley():
    rows = {round(row["x"], 2): row["train_kl"] for row in read_csv(RESULTS / "valley/landscape.csv")}
    return [rows[-x] / rows[x] for x in (0.02, 0.06)]


def lottery(name, file):
    """{round: row} of results/lottery/``file``.csv."""
    return {row["round"]: row for row in read_csv(RESULTS / f"lottery/{file}.csv") if row["init"].endswith(f":{name}")}


def barrier(name, file="barriers", bn="recompute", of="test_barrier"):
    rows = read_csv(RESULTS / f"connectivity/{file}.csv")
    found = {row["statistic"]: row[of] for row in rows if row["init"].endswith(f":{name}") and row["bn"] == bn}
    return f"{found['mean']:.2f} +- {found['std']:.2f}"


def resnet_barriers(bn, of="test_barrier"):
    random, student = (barrier(name, "resnet18-barriers", bn, of) for name in ("student-init", "student"))
    return f"{random} points from the random init, {student} from the student"


def kept(name, file, rounds, digits=2):
    rows = lottery(name, file)
    return f"{rows[0]['test_accuracy']:.{digits}f} to {rows[rounds]['test_accuracy']:.{digits}f}"


def remaining(file, rounds):
    left = 100 * (1 - lottery("student", file)[rounds]["sparsity"])
    return f"{left:.0f}" if left > 20 else f"{left:.1f}"


def lottery_row(file, rounds, digits=2):
    random, student = (kept(name, file, rounds, digits) for name in ("student-init", "student"))
    return (
        f"{rounds} rounds ([numbers](results/lottery/{file}.csv)) | 100 % to {remaining(file, rounds)} % | {random} | {student} |"
    )


def rounds_ahead():
    student, random = ([row["test_accuracy"] for row in lottery(who, "resnet20").values()] for who in ("student", "student-init"))
    return sum(s > r for s, r in zip(student, random, strict=True)), len(student)


def untrained(name, title, paper):
    row = read_csv(RESULTS / f"cifar10-untrained/{name}.csv")[0]
    who = "input" if title == "pixels" else "teacher"
    return f"| {title} | {row[f'{who}_linear']:.2f} | {paper[0]} | {row[f'{who}_knn']:.2f} | {paper[1]} |"


def digits():
    rows = {row["quantity"]: row for row in read_csv(RESULTS / "digits-summary.csv") if row["epoch"] == "final"}
    teacher, student = (rows[f"{who}_linear"] for who in ("teacher", "student"))
    return f"linear probe {teacher['mean']:.1f} -> {student['mean']:.1f} +- {student['std']:.1f}, mean of three"


def resnets():
    linear = {}
    for row in read_csv(RESULTS / "cifar10-untrained/resnet18-seeds.csv"):
        linear.setdefault(row["seed"], []).append(row["linear"])
    return "means of {:.1f}, {:.1f} and {:.1f}".format(*(sum(values) / len(values) for values in linear.values()))


LARGE = "cifar10-10k/log.csv"


@pytest.mark.parametrize(
    "claim",
    [
        lambda: f"{last(LARGE, 'student_linear'):.1f} % against {last(LARGE, 'teacher_linear'):.1f} % (linear probe)",
        lambda: f"{last(LARGE, 'student_knn'):.1f} % against {last(LARGE, 'teacher_knn'):.1f} % (20-NN)",
        lambda: lottery_row("resnet20", 7),
        lambda: lottery_row("imp", 6),
        lambda: lottery_row("resnet18", 3, digits=1),
        lambda: "ahead in {} of ResNet20's {} rounds".format(*rounds_ahead()),
        lambda: f"error barrier {barrier('student-init')} points from the random init, {barrier('student')} from the student",
        lambda: "at x = -0.02 is {:.1f} times that at +0.02, and at -0.06 {:.0f} times that at +0.06".format(*valley()),
        lambda: f"statistics recomputed, {resnet_barriers('recompute')}; interpolated, {resnet_barriers('interpolate')}",
        lambda: f"on the training images, statistics recomputed, {resnet_barriers('recompute', 'train_barrier')}",
        lambda: untrained("vgg11", "VGG11", ("36.55", "44.92")),
        lambda: untrained("resnet18", "ResNet18", ("35.50", "37.65")),
        resnets,
        digits,
        lambda: untrained("vgg11", "pixels", ("39.02", "33.61")),
    ],
)
def test_a_sentence_says_what_its_csv_holds(claim):
    assert claim() in PROSE


def test_what_the_readme_links_to_is_there():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert len([link for link in links if link.endswith(".csv")]) > 20
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []
