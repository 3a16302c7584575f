"""Supervised training against independent formulas: augmentation, schedule, SGD, state that comes back bit for bit."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import functional as TF

from rtd import checkpoint, distributed
from rtd.augmentation import augment, draw_augmentation
from rtd.classifier import Classifier, build_classifier, empty_classifier, load_starts
from rtd.data import Dataset, Split, normalize
from rtd.datasets import load_digits
from rtd.errors import Diverged, InputError
from rtd.init import init_encoder_, random_stream
from rtd.models import materialize
from rtd.train import Trainer, evaluate, learning_rate


def small_data(generator, n=20):
    images = torch.randint(256, (n, 3, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.arange(n) % 4
    return Dataset("made-up", Split(images, labels), Split(images[:7], labels[:7]), 4, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))


def linear_model(generator):
    encoder = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.BatchNorm1d(48))
    return Classifier(encoder, init_encoder_(nn.Linear(48, 4, device="meta").to_empty(device="cpu"), generator))


def test_augmentation_is_torchvisions_pad_crop_and_flip(generator):
    images = torch.randint(256, (30, 3, 32, 24), generator=generator, dtype=torch.uint8)
    draws = draw_augmentation(30, generator)
    result = augment(images, draws)
    for image, (top, left, flip), got in zip(images, draws.tolist(), result, strict=True):
        expected = TF.crop(TF.pad(image, [4, 4, 4, 4]), top, left, 32, 24)
        assert torch.equal(got, TF.hflip(expected) if flip else expected)
    assert result.dtype == torch.uint8 and result.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(augment(images, torch.tensor([[4, 4, 0]]).expand(30, 3)), images)


def test_augmentation_draws_all_offsets_evenly(generator):
    draws = draw_augmentation(9000, generator).numpy()
    for column, values in ((0, 9), (1, 9), (2, 2)):
        counts = np.bincount(draws[:, column])
        assert len(counts) == values and abs(counts - 9000 / values).max() < 5 * math.sqrt(9000 / values)


@pytest.mark.parametrize("epochs", [160, 8, 3, 1])
def test_learning_rate_falls_after_a_half_and_three_quarters(epochs):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1)
    milestones = [math.ceil(epochs / 2), math.ceil(3 * epochs / 4)]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones)
    for epoch in range(epochs):
        assert learning_rate(epoch, epochs, 0.1) == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert [learning_rate(e, 160) for e in (0, 79, 80, 119, 120, 159)] == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_an_epoch_is_sgd_by_hand(generator):
    """v <- 0.9 v + g + 1e-4 w, w <- w - lr v, over augmented batches in the stream's order; the last batch is smaller."""
    data, model = small_data(generator), linear_model(generator)
    weights = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    velocity = {name: torch.zeros_like(p) for name, p in weights.items()}
    trainer = Trainer(model, data, epochs=4, stream=(7, 2), lr=0.05, batch_size=8)
    for epoch, lr in enumerate((0.05, 0.05, 0.005), 1):
        order = torch.randperm(20, generator=random_stream(7, 2, "batch-order", epoch))
        draws = draw_augmentation(20, random_stream(7, 2, "augmentation", epoch))
        losses = []
        for batch in (order[:8], order[8:16], order[16:]):
            x = normalize(augment(data.train.images[batch], draws[batch]), data.mean, data.std).double()
            x = F.avg_pool2d(x, 8).flatten(1)
            x = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt() * weights["encoder.2.weight"] + weights[
                "encoder.2.bias"
            ]
            loss = F.nll_loss(F.log_softmax(x @ weights["fc.weight"].T + weights["fc.bias"], 1), data.train.labels[batch])
            gradients = torch.autograd.grad(loss, list(weights.values()))
            for name, gradient in zip(weights, gradients, strict=True):
                velocity[name] = 0.9 * velocity[name] + gradient + 1e-4 * weights[name].detach()
                weights[name] = (weights[name] - lr * velocity[name]).detach().requires_grad_()
            losses.append(len(batch) * loss.item())
        assert trainer.train_epoch() == pytest.approx(sum(losses) / 20, rel=1e-5)
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.double(), weights[name], rtol=1e-4, atol=1e-6)
    assert trainer.epoch == 3


def test_batch_order_does_not_move_the_augmentation_of_an_image(generator):
    """Row i of the draws is for image i, whenever its turn comes; another run, or epoch, has others."""
    data, seen = small_data(generator), []

    class Spy(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, images):
            seen.extend(image for image in images.clone())
            return self.model(images)

    for run in (0, 1):
        trainer = Trainer(Spy(linear_model(generator)), data, 2, (0, run), batch_size=8)
        trainer.train_epoch()
        trainer.train_epoch()
    for i, stream in enumerate([(0, 0, 1), (0, 0, 2), (0, 1, 1), (0, 1, 2)]):
        draws = draw_augmentation(20, random_stream(*stream[:2], "augmentation", stream[2]))
        expected = normalize(augment(data.train.images, draws), data.mean, data.std)
        assert {x.numpy().tobytes() for x in seen[20 * i : 20 * i + 20]} == {x.numpy().tobytes() for x in expected}


def states_equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(states_equal(a[k], b[k]) for k in a if k != "seconds")
    if isinstance(a, list):
        return len(a) == len(b) and all(map(states_equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_state_comes_back_bit_for_bit_more_than_once(generator, tmp_path):
    """What rewinding needs: weights, buffers, momentum and streams, and a state that training on does not change."""
    data = small_data(generator)
    trainer = Trainer(linear_model(generator), data, 6, (0,), batch_size=8)
    trainer.run_epoch()
    start = trainer.state()
    torch.save(start, tmp_path / "state.pt")
    assert start["optimizer"]["state"]

    def two_more(state):
        trainer.load_state(state)
        trainer.run_epoch()
        trainer.run_epoch()
        return trainer.state()

    first, again = two_more(start), two_more(start)
    from_file = two_more(torch.load(tmp_path / "state.pt", weights_only=True))
    assert states_equal(first, again) and states_equal(first, from_file)
    assert states_equal(start, torch.load(tmp_path / "state.pt", weights_only=True))
    assert len(first["accuracies"]) == first["epoch"] == 3
    other_order = start | {"epoch": 2, "accuracies": start["accuracies"] * 2}
    assert not states_equal(first["classifier"], two_more(other_order)["classifier"])
    no_momentum = start | {"optimizer": start["optimizer"] | {"state": {}}}
    assert not states_equal(first, two_more(no_momentum))


def test_a_state_that_does_not_fit_is_refused(generator):
    data = small_data(generator)
    trainer = Trainer(linear_model(generator), data, 2, (0,), batch_size=8)
    trainer.run_epoch()
    state = trainer.state()
    weights = state["classifier"]
    for wrong in (
        {},
        state | {"epoch": 3},
        state | {"epoch": "1"},
        state | {"accuracies": [200.0]},
        state | {"classifier": weights | {"fc.bias": torch.zeros(5)}},
        state | {"classifier": weights | {"fc.bias": torch.full((4,), math.nan)}},
        state | {"optimizer": []},
        [],
    ):
        with pytest.raises(InputError, match="some.pt cannot be resumed"):
            trainer.resume(wrong, "some.pt")
    trainer.resume(state, "some.pt")


def test_evaluation_is_the_mean_over_all_images_in_eval_mode(generator):
    data = small_data(generator)
    model = linear_model(generator).train()
    model.encoder[2].running_mean.normal_(generator=generator)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    accuracy, loss = evaluate(model, data.train, data.mean, data.std, batch_size=6)
    assert model.training and states_equal(before, model.state_dict())
    logits = model.eval()(normalize(data.train.images, data.mean, data.std)).detach().double().numpy()
    labels = data.train.labels.numpy()
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert loss == pytest.approx(-np.log(p[np.arange(20), labels]).mean(), rel=1e-5)
    assert accuracy == pytest.approx(100 * (logits.argmax(1) == labels).mean())


def test_a_loss_that_is_not_finite_stops_before_the_step(generator):
    data, model = small_data(generator), linear_model(generator)
    with torch.no_grad():
        model.fc.bias.fill_(math.inf)
    before = model.state_dict()["fc.weight"].clone()
    trainer = Trainer(model, data, 2, (0,), batch_size=8, lr=0.2, precision="bf16")
    trainer.name = "this run"
    with pytest.raises(Diverged, match="this run.*epoch 1, step 1.*--lr than 0.2, or --precision fp32"):
        trainer.run_epoch()
    assert torch.equal(model.fc.weight, before) and not trainer.accuracies


def test_weights_that_are_not_finite_after_the_last_step_stop_too(generator):
    trainer = Trainer(linear_model(generator), small_data(generator), 2, (0,), batch_size=20)
    trainer.after_step = lambda: trainer.classifier.fc.bias.data.fill_(math.inf)
    with pytest.raises(Diverged, match="epoch 1"):
        trainer.run_epoch()


def test_bf16_stays_near_fp32(generator):
    data = small_data(generator)
    results = []
    for precision in ("fp32", "bf16"):
        model = linear_model(torch.Generator().manual_seed(1))
        results.append(Trainer(model, data, 2, (0,), batch_size=8, precision=precision).train_epoch())
        assert all(p.dtype == torch.float32 for p in model.parameters())
    assert results[0] != results[1] == pytest.approx(results[0], rel=0.02)


def test_starts(tiny_run):
    data = load_digits(32)
    path = tiny_run / "checkpoint.pt"
    specs = ["random", "random:1", f"{path}:student", f"{path}:teacher", f"{path}:student-init"]
    starts = load_starts(specs, None, data, seed=3)
    assert [start.kind for start in starts] == ["random", "random", "student", "teacher", "student-init"]
    assert {start.architecture["encoder"] for start in starts} == {"resnet20"}  # the checkpoint's, for random starts too
    assert load_starts(["random"], None, data, 3)[0].architecture["encoder"] == "resnet18"
    contents = torch.load(path, weights_only=True)
    saved = {k.removeprefix("encoder."): v for k, v in contents["student"].items() if k.startswith("encoder.")}
    assert states_equal(saved, starts[2].state)
    assert starts[2].sha256 == checkpoint.sha256(path) and starts[0].sha256 is None
    assert starts[2].mean == pytest.approx(data.mean)
    weights = [start.state["0.weight"] for start in starts[:2]]
    assert not torch.equal(*weights)
    assert torch.equal(weights[1], load_starts(["random:1"], "resnet20", data, 3)[0].state["0.weight"])

    classifiers = [build_classifier(start, 10, random_stream(3, "fc-init")) for start in starts[1:3]]
    assert states_equal(dict(classifiers[1].encoder.state_dict()), starts[2].state)
    assert states_equal(*(dict(c.fc.state_dict()) for c in classifiers))
    fc = classifiers[0].fc.weight.detach().flatten()
    assert fc.abs().max() <= 1 / 8 and fc.std().item() == pytest.approx(1 / 8 / 3**0.5, rel=0.1)  # U(-1/8, 1/8): 64 inputs


@pytest.mark.parametrize(
    "specs", [["PATH"], ["PATH:best"], ["random:x"], ["random:-1"], ["nowhere.pt:student"], ["PATH:student"]]
)
def test_starts_that_are_none(tiny_run, specs):
    specs = [spec.replace("PATH", str(tiny_run / "checkpoint.pt")) for spec in specs]
    encoder = "vgg11" if specs[0].endswith(":student") else None
    with pytest.raises(InputError, match="--init|nowhere.pt"):
        load_starts(specs, encoder, load_digits(32), 0)


def test_classifier_is_drawn_from_its_generator_alone(generator):
    start = load_starts(["random"], "resnet20", load_digits(32), 0)[0]
    a, b = (build_classifier(start, 10, torch.Generator().manual_seed(4)).state_dict() for _ in range(2))
    assert states_equal(dict(a), dict(b))
    assert states_equal(start.state, {k.removeprefix("encoder."): v for k, v in a.items() if k.startswith("encoder.")})
    assert materialize(empty_classifier({"encoder": "vgg11"}, 7)).fc.weight.shape == (7, 512)


def test_units_are_shared_as_wholes_where_there_are_enough(monkeypatch):
    group = {"rank": 0, "size": 3, "waits": 0}
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed.dist, "get_rank", lambda: group["rank"])
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: group["size"])
    monkeypatch.setattr(distributed.dist, "barrier", lambda: group.update(waits=group["waits"] + 1))
    done = []
    for group["rank"] in range(3):
        for unit in distributed.units(list(range(7))):
            done.append(unit)
            assert distributed.world_size() == 1 and distributed.is_main()
        assert distributed.world_size() == 3 and distributed.rank() == group["rank"]
    assert sorted(done) == list(range(7)) and group["waits"] == 3
    for group["rank"] in range(3):
        for unit in distributed.units(["a", "b"]):
            assert distributed.world_size() == 3 and unit in ("a", "b")
    with pytest.raises(KeyError):
        for unit in distributed.units(list(range(3))):
            raise KeyError(unit)
    assert distributed.world_size() == 3
