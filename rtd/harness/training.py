"""One loop for distillation and supervised training, which can stop and go on at any step."""

import contextlib
import copy
import time
from functools import partial

import torch
import torch.nn.functional as F

from rtd.errors import Diverged
from rtd.harness.console import progress
from rtd.harness.device import tf32
from rtd.harness.signals import Stopped, deferred
from rtd.init import random_stream
from rtd.probes import extract_features, probe
from rtd.supervised import SupervisedLoss, build_classifier, learning_rate, sgd


class Training:
    """Trains a module whose forward pass is its loss, one epoch after the other.

    loss: a module with loss(index, observe, precision) -> (loss, more to log where ``observe``),
    ``begin_epoch(epoch)``, ``after_step()`` and ``data``, the ``Dataset`` it is trained on. stream:
    seed and names of the run's random numbers: epoch e, from 1, has the order of
    random_stream(*stream, "batch-order", e). run: a ``Run`` with the flags batch_size, precision,
    and perhaps fp32_steps, how many of the first steps are fp32, and log_every: every so many steps
    one is observed, at least 5 an epoch, first and last among them. name: for messages.
    """

    def __init__(self, loss, optimizer, stream, run, name):
        self.loss, self.optimizer, self.run, self.name = loss, optimizer, run, name
        self.args, self.world, self.device = run.args, run.world, run.device
        self.count, self.stream = len(loss.data.train), stream
        self.steps = -(-self.count // self.args.batch_size)  # per epoch
        self.epoch, self.losses, self.observed = 0, [], []  # of the epoch being worked on, or done
        # of the last epoch, over all processes; only the steps of this session count
        self.images_per_second = None
        self.observed_steps = []
        if every := getattr(self.args, "log_every", None):
            every = min(every, max(1, (self.steps - 1) // 4))
            self.observed_steps = sorted({*range(0, self.steps, every), self.steps - 1})
        self._trained = self.world.data_parallel(loss)

    @property
    def step(self):
        """How many steps are done."""
        return max(0, self.epoch - 1) * self.steps + len(self.losses)

    @contextlib.contextmanager
    def saving(self, save):
        """Where a signal stops the block, ``save()`` is called, after the last whole step.

        In a single process only: several would stop after different steps.
        """
        try:
            yield
        except Stopped:
            if self.world.size == 1:
                with deferred():
                    save()
            raise

    def run_epoch(self, epoch):
        """Train for ``epoch``, or what is left of it; returns the mean of each value of the loss.

        A signal stops it after a whole step. Raises Diverged.
        """
        if epoch != self.epoch:
            self.epoch, self.losses, self.observed = epoch, [], []
        generator = random_stream(*self.stream, "batch-order", epoch)
        order = torch.randperm(self.count, generator=generator).to(self.device)
        batches = order.split(self.args.batch_size)
        left = batches[len(self.losses) :]
        self.loss.begin_epoch(epoch)
        self._trained.train()
        began = time.perf_counter()
        for batch in progress(left, f"{self.name} epoch {epoch}"):
            with deferred():
                self._step(batch)
        self.world.broadcast(self.loss.buffers())  # batch norm's statistics: the main process's
        if left:  # all processes' means: what the main one saves
            self.losses, self.observed = map(self._averaged, (self.losses, self.observed))
        means = [self._mean(self.losses, batches)]
        if self.observed:  # KL and entropies
            means += self._mean(self.observed, [batches[i] for i in self.observed_steps])
        finite = [x.isfinite().all() for x in (means[0], *self.loss.parameters())]
        if not torch.stack(finite).all():  # one wait for a GPU, not one for each parameter
            self._diverged()  # in all processes
        means = [mean.item() for mean in means]  # on a GPU, this waits for the steps
        if left:
            self.images_per_second = sum(map(len, left)) / (time.perf_counter() - began)
        return means

    @torch.no_grad()
    def evaluate_start(self):
        """The means of ``run_epoch`` before any step: epoch 0.

        Batch norm sees batch statistics as in training, and its running ones do not move.
        """
        buffers = copy.deepcopy(dict(self.loss.named_buffers()))
        batches = torch.arange(self.count, device=self.device).split(self.args.batch_size)
        # as in a step, each process sees its part of a batch: SyncBatchNorm waits for all of them
        shares = map(self.world.share, batches)
        self.loss.train()
        values = [factor * torch.stack(self.loss(x, observe=True)) for x, factor in shares]
        self.loss.load_state_dict(buffers, strict=False)
        return self._mean(self._averaged(values), batches).tolist()

    def _step(self, batch):
        mine, factor = self.world.share(batch)  # all of the batch, and 1, in a single process
        observe = len(self.losses) in self.observed_steps
        early = self.step < getattr(self.args, "fp32_steps", 0)
        precision = "fp32" if early else self.args.precision
        with tf32(precision):
            loss, *more = self._trained(mine, observe, precision)
            loss = factor * loss
            # on a GPU, reading the loss would wait for the step: there the epoch's end finds out
            if self.device.type == "cpu" and self.world.size == 1 and not loss.isfinite():
                self._diverged()
            # Distillation has dropped its gradients in after_step. Supervised training keeps them
            # until here, as their memory would go back to the system.
            self.optimizer.zero_grad()
            loss.backward()
        self.optimizer.step()
        self.loss.after_step()
        self.losses.append(loss.detach())
        if observe:
            self.observed.append(factor * torch.stack(more))

    def _mean(self, values, batches):
        """Mean of ``values``, a tensor for each of ``batches``, over their images."""
        weights = torch.tensor([float(len(batch)) for batch in batches], device=self.device)
        return torch.tensordot(weights / weights.sum(), torch.stack(values), dims=1)

    def _averaged(self, values):
        """``values``, a list of tensors, as means over all processes."""
        return list(self.world.average(torch.stack(values))) if values else []

    def _diverged(self):
        bad = [step for step, loss in enumerate(self.losses, 1) if not loss.isfinite()]
        step = bad[0] if bad else min(len(self.losses) + 1, self.steps)
        hint = ", or --precision fp32" if self.args.precision == "bf16" else ""
        error = Diverged(
            f"{self.name}: the loss or a weight is not finite in epoch {self.epoch}, step {step}; "
            f"try a smaller --lr than {self.args.lr:g}{hint}"
        )
        error.everywhere = self.world.size > 1
        raise error

    def state(self):
        """What decides how training goes on, but for the module's own state; not a copy."""
        state = {"epoch": self.epoch, "losses": self.losses, "observed": self.observed}
        return state | {"optimizer": self.optimizer.state_dict()["state"]}

    def load_state(self, state):
        """Continue from ``state``, which is not changed."""
        self.epoch = state["epoch"]
        self.losses = [loss.to(self.device) for loss in state["losses"]]
        self.observed = [values.to(self.device) for values in state["observed"]]
        # the optimizer keeps, and changes, the tensors that it is given
        optimizer = self.optimizer.state_dict() | {"state": copy.deepcopy(state["optimizer"])}
        self.optimizer.load_state_dict(optimizer)


def probe_options(args):
    """The arguments of ``rtd.probes.probe`` that the flags decide."""
    return {"probes": args.probe, "k": args.k, "epochs": args.probe_epochs, "seed": args.seed}


def probe_encoder(encoder, data, args, world):
    """``rtd.probes.probe`` of an encoder's features, or of the pixels (None); {} outside main.

    All processes extract the features together.
    """
    splits = data.train.images, data.test.images
    if encoder is not None:
        shown = partial(progress, description="features", unit="batches")
        options = {"mean": data.mean, "std": data.std, "precision": args.precision}
        embed = partial(extract_features, encoder, **options, progress=shown)
        features = [world.map_rows(embed, images) for images in splits]
    elif world.is_main:
        features = [data.normalize(images).flatten(1) for images in splits]
    return probe(*features, data, **probe_options(args)) if world.is_main else {}


def evaluate(classifier, split, data, precision, world):
    """(accuracy in percent, mean cross-entropy) on a ``Split``, normalised as ``data`` is."""

    def answer(images):  # a classifier's features are its logits
        return extract_features(classifier, images, data.mean, data.std, 1000, precision)

    logits = world.map_rows(answer, split.images)
    accuracy = 100 * (logits.argmax(1) == split.labels).sum().item() / len(split)
    return accuracy, F.cross_entropy(logits, split.labels).item()


class SupervisedTraining(Training):
    """Training of a classifier with labels to the end of its schedule, tested after each epoch."""

    def __init__(self, start, data, stream, run, name):
        """As for ``Training``; start: ``rtd.harness.checkpoint.Start``; data lies on the device."""
        self.data = data.with_normalization(start.source)
        generator = random_stream(run.args.seed, "fc-init")
        classifier = build_classifier(start.architecture, start.state, data.num_classes, generator)
        self.classifier = classifier.to(run.device)
        loss = SupervisedLoss(classifier, self.data, stream)
        super().__init__(loss, sgd(classifier, run.args.lr), stream, run, name)
        self.accuracies, self.seconds = [], 0.0  # test accuracy after each epoch; time of them all

    def epochs(self, save):
        """Train to the end of the schedule, test after each epoch, ``save()`` where it is due.

        Yields the number of finished epochs: first before any training, then after each epoch and
        before it is saved, so that what the caller changes at a yield is saved with it.
        """
        args, data = self.args, self.data
        yield len(self.accuracies)
        for done in range(len(self.accuracies) + 1, args.epochs + 1):
            began = time.perf_counter()
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(done - 1, args.epochs, args.lr)
            with self.saving(save):
                try:
                    self.run_epoch(done)
                    accuracy, _ = evaluate(
                        self.classifier, data.test, data, args.precision, self.world
                    )
                finally:  # also of an epoch that is stopped
                    self.seconds += time.perf_counter() - began
            self.accuracies.append(accuracy)
            yield done
            if self.run.save_is_due(done, args.epochs):
                save()

    def state(self):
        """A copy of everything that decides how training goes on, to rewind to it."""
        state = super().state() | {"accuracies": self.accuracies, "seconds": self.seconds}
        return copy.deepcopy(state | {"classifier": self.classifier.state_dict()})

    def load_state(self, state):
        """Continue from ``state``, which is not changed."""
        self.classifier.load_state_dict(state["classifier"])
        super().load_state(state)
        self.accuracies, self.seconds = list(state["accuracies"]), state["seconds"]
