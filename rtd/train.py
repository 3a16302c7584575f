"""Supervised training from a given encoder, as both label-needing experiments do it (paper section 6, App. E.5).

A fresh linear classifier ``fc`` goes on top of the encoder, and both are trained with SGD: momentum 0.9 (no Nesterov),
weight decay 1e-4 on all parameters, learning rate 0.1, a tenth of it after half of the epochs and a hundredth after three
quarters (80 and 120 of the paper's 160), batches of 256, random flips and 4-pixel padded crops.

Three named random streams feed a run: the start of ``fc``, and for each epoch its batch order and its augmentation. Runs
that share the first and differ in the others have the same start and nothing else in common.
"""

import time

import torch
import torch.nn.functional as F

from rtd import distributed, stopping
from rtd.augmentation import augment, draw_augmentation
from rtd.data import normalize
from rtd.device import autocast, tf32
from rtd.errors import Diverged, InputError
from rtd.init import random_stream
from rtd.progress import progress

MOMENTUM, WEIGHT_DECAY = 0.9, 1e-4


def learning_rate(epoch, epochs, lr=0.1):
    """Of the epoch after the first ``epoch`` of ``epochs``: lr, lr / 10 from a half on, lr / 100 from three quarters on."""
    return lr * 0.1 ** ((2 * epoch >= epochs) + (4 * epoch >= 3 * epochs))


@torch.no_grad()
def evaluate(classifier, split, mean, std, precision="fp32", batch_size=1000):
    """(accuracy in percent, mean cross-entropy) on a ``Split``, in eval mode; the classifier's mode is restored.

    Under torchrun the images are shared among the processes, and each gets the result.
    """

    def answer(part):
        with autocast(part.device, precision):
            return torch.cat([classifier(normalize(x, mean, std)) for x in part.split(batch_size)])

    was_training = classifier.training
    classifier.eval()
    logits = distributed.map_rows(answer, split.images)  # (N, classes)
    classifier.train(was_training)
    accuracy = 100 * (logits.argmax(1) == split.labels).sum().item() / len(split)
    return accuracy, F.cross_entropy(logits, split.labels).item()


class Trainer:
    """Training of one classifier, an epoch at a time; between epochs, all of its state can be taken and put back."""

    def __init__(self, classifier, data, epochs, stream, lr=0.1, batch_size=256, precision="fp32", name="training"):
        """classifier: on the device of ``data`` (whose mean and std normalise). epochs: of the whole schedule. stream: seed and
        names of the run's random numbers, to which "batch-order" or "augmentation" and the epoch, from 1, are added. name: for
        messages. Under torchrun, all processes together train one classifier."""
        self.classifier, self.data, self.epochs, self.stream = classifier, data, epochs, stream
        self.lr, self.batch_size, self.precision, self.name = lr, batch_size, precision, name
        self.epoch = 0  # how many are done
        self.losses = []  # of the batches of the current epoch
        self.accuracies, self.seconds = [], 0.0  # on the test split, after each epoch; of all epochs, tests included
        self.optimizer = torch.optim.SGD(
            classifier.parameters(),
            lr,
            momentum=MOMENTUM,
            weight_decay=WEIGHT_DECAY,
            fused=data.train.images.device.type != "mps",
        )
        self.after_step = None  # called after every step: ``rtd.pruning.Masking``
        self._trained = distributed.data_parallel(classifier)

    def run_epoch(self):
        """Train for an epoch, then test: one more of ``accuracies``. Raises Diverged for a loss that is not finite.

        ``Stopped`` between steps leaves a ``state`` from which the epoch goes on where it stopped.
        """
        began = time.perf_counter()
        with tf32(self.precision):
            self.train_epoch()
        accuracy, _ = evaluate(self.classifier, self.data.test, self.data.mean, self.data.std, self.precision)
        self.accuracies.append(accuracy)
        self.seconds += time.perf_counter() - began

    def train_epoch(self):
        """One pass over the training images. Returns their mean loss."""
        data, device = self.data, self.data.train.images.device
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.epoch, self.epochs, self.lr)
        order = torch.randperm(len(data.train), generator=random_stream(*self.stream, "batch-order", self.epoch + 1))
        draws = draw_augmentation(len(data.train), random_stream(*self.stream, "augmentation", self.epoch + 1))
        draws = draws.to(device)  # row i is for image i
        batches = order.to(device).split(self.batch_size)
        done = len(self.losses)  # not 0 if the epoch goes on
        self._trained.train()
        bar = progress(batches[done:], f"{self.name}, epoch {self.epoch + 1}", "steps")
        for step, batch in enumerate(stopping.steps(bar), done):
            mine, factor = distributed.share(batch)  # all of the batch, and 1, in a single process
            images = normalize(augment(data.train.images[mine], draws[mine]), data.mean, data.std)
            with autocast(device, self.precision):
                logits = self._trained(images)
            loss = factor * F.cross_entropy(logits, data.train.labels[mine])
            whole = distributed.average(loss.detach().clone())
            if device.type == "cpu" and not torch.isfinite(whole):
                self._stop(step + 1)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            if self.after_step is not None:
                self.after_step()
            self.losses.append(whole * len(batch))  # read at the end of the epoch: on a GPU, reading waits
        total = torch.stack(self.losses).cpu().double().sum()
        self.losses = []
        self.epoch += 1
        distributed.broadcast_tensors(self.classifier.buffers())  # batch norm's statistics: the main process's for all
        if not all(torch.isfinite(value).all() for value in (total, *self.classifier.parameters())):
            self._stop()
        return total.item() / len(data.train)

    def _stop(self, step=None):
        where = f"epoch {self.epoch + 1}, step {step}" if step else f"epoch {self.epoch}"
        hint = ", or --precision fp32" if self.precision == "bf16" else ""
        raise Diverged(
            f"{self.name}: the loss or a weight is not finite in {where}; what was saved before stands. "
            f"Try a smaller --lr than {self.lr}{hint}"
        )

    def state(self):
        """A copy, in main memory, of everything that decides how training goes on: tensors and plain types."""
        return _copied(
            {
                "epoch": self.epoch,
                "accuracies": self.accuracies,
                "seconds": self.seconds,
                "classifier": self.classifier.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "losses": self.losses,
            }
        )

    def load_state(self, state):
        """Go back, or on, to a ``state``, which stays as it is."""
        self.epoch, self.accuracies, self.seconds = state["epoch"], list(state["accuracies"]), state["seconds"]
        device = next(self.classifier.parameters()).device
        self.losses = [loss.to(device) for loss in state["losses"]]
        self.classifier.load_state_dict(state["classifier"])
        self.optimizer.load_state_dict(_copied(state["optimizer"]))  # the optimizer keeps, and changes, what it is given

    def resume(self, state, path):
        """``load_state`` of what was read from the file ``path``; raises InputError if that cannot be such a state."""
        try:
            self.load_state(state)
            if not 0 <= self.epoch <= self.epochs or len(self.accuracies) != self.epoch:
                raise ValueError(f"it stands after epoch {self.epoch}, of {self.epochs}")
            momenta = [self.optimizer.state.get(p, {}).get("momentum_buffer") for p in self.classifier.parameters()]
            shapes = [None if momentum is None else momentum.shape for momentum in momenta]
            if any(shapes) and shapes != [p.shape for p in self.classifier.parameters()]:
                raise ValueError("its momentum is of another network")
            if any(loss.shape != () or not loss.is_floating_point() or not loss.isfinite() for loss in self.losses):
                raise ValueError("its losses are not numbers")
            if not all(0 <= accuracy <= 100 for accuracy in self.accuracies) or not self.seconds >= 0:
                raise ValueError("its accuracies are not percentages")
            if not all(torch.isfinite(tensor).all() for tensor in self.classifier.state_dict().values()):
                raise ValueError("a weight is not finite")
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} cannot be resumed: {' '.join(str(error).split())[:200]}") from error


def _copied(tree):
    """Nested dicts and lists with all tensors copied to main memory."""
    if isinstance(tree, torch.Tensor):
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, dict):
        return {key: _copied(value) for key, value in tree.items()}
    return [_copied(value) for value in tree] if isinstance(tree, list) else tree
