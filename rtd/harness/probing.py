"""Probes of a data set: all processes extract its features together, the main one judges them."""

from functools import partial

from rtd.harness.console import progress
from rtd.probes import extract_features, flat_pixels, probe


def options(args):
    """The arguments of ``rtd.probes.probe`` that the flags decide."""
    return {"probes": args.probe, "k": args.k, "epochs": args.probe_epochs, "seed": args.seed}


def judge(encoder, data, args, world):
    """``rtd.probes.probe`` of an encoder's features of ``data``; {} outside the main process.

    encoder: None for the normalised pixels themselves.
    """
    constants = data.mean, data.std
    shown = partial(progress, description="features", unit="batches")

    def embed(images):
        return extract_features(
            encoder, images, *constants, precision=args.precision, progress=shown
        )

    splits = [split.images for split in (data.train, data.test)]
    if encoder:
        features = [world.map_rows(embed, images) for images in splits]
    elif world.is_main:
        features = [flat_pixels(images, *constants) for images in splits]
    return probe(*features, data, **options(args)) if world.is_main else {}
