"""Random flips and padded crops, for a whole batch at once and on its device (paper App. E.5)."""

import torch
import torch.nn.functional as F

PADDING = 4


def draw_augmentation(n, generator):
    """(n, 3) for n images: the crop's top and left in 0 ... 2 PADDING, and whether to flip (0 or 1)."""
    return torch.cat(
        [torch.randint(2 * PADDING + 1, (n, 2), generator=generator), torch.randint(2, (n, 1), generator=generator)], 1
    )


def augment(images, draws):
    """(B, 3, H, W) uint8 -> the same: a crop of each image padded with black, mirrored where drawn; one gather for all.

    draws: (B, 3) of ``draw_augmentation``, on the images' device. The result is laid out channels-last.
    """
    height, width = images.shape[2:]
    padded = F.pad(images, (PADDING,) * 4)
    top, left, flip = draws.unsqueeze(2).unbind(1)  # (B, 1) each
    rows = top + torch.arange(height, device=images.device)  # (B, H)
    columns = left + torch.arange(width, device=images.device)  # (B, W)
    columns = torch.where(flip == 1, columns.flip(1), columns)
    each = torch.arange(len(images), device=images.device)
    crops = padded[each[:, None, None], :, rows[:, :, None], columns[:, None, :]]  # (B, H, W, 3)
    return crops.permute(0, 3, 1, 2)
