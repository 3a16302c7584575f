"""Probes of a data set: all processes extract its features together, the main one judges them."""

from functools import partial

from rtd.harness.console import progress
from rtd.probes import extract_features, flat_pixels, probe


def options(args):
    """The arguments of ``rtd.probes.probe`` that the flags decide."""
    return {"probes": args.probe, "k": args.k, "epochs": args.probe_epochs, "seed": args.seed}


def judge(encoder, data, args, world):
    """``rtd.probes.probe`` of an encoder's features, or of the pixels (None); {} outside main."""
    source = {"mean": data.mean, "std": data.std}
    splits = data.train.images, data.test.images
    if encoder:
        shown = partial(progress, description="features", unit="batches")
        embed = partial(extract_features, encoder, precision=args.precision, progress=shown)
        features = [world.map_rows(partial(embed, **source), images) for images in splits]
    elif world.is_main:
        features = [flat_pixels(images, **source) for images in splits]
    return probe(*features, data, **options(args)) if world.is_main else {}
