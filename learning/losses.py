"""What a network is trained to make small."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.nn.functional import binary_cross_entropy_with_logits

from learning.processes import AddUp
from tissue.depth import NOT_ANNOTATED


def bce_dice(
    logits: torch.Tensor, masks: torch.Tensor, known: torch.Tensor | None = None
) -> torch.Tensor:
    """Binary cross-entropy plus 1 - soft Dice, a scalar (Milletari et al. 2016, 3DV).

    `logits`, `masks` (0 or 1) and `known` (1, or 0 where a pixel does not count) are float32
    (N, 1, H, W). The soft Dice takes probabilities for pixels, 2 sum(p m) / (sum(p) + sum(m)), over
    the whole batch, that of all processes if there are several: patches without nuclei have no Dice
    of their own.
    """
    probability = logits.sigmoid()
    if known is not None:
        probability, masks = probability * known, masks * known
    sums = torch.stack([(probability * masks).sum(), probability.sum() + masks.sum()])
    if dist.is_available() and dist.is_initialized():
        sums = AddUp.apply(sums)
    soft_dice = (2 * sums[0] + 1) / (sums[1] + 1)  # 1 where both are empty
    return binary_cross_entropy_with_logits(logits, masks, known) + 1 - soft_dice


def depth_loss(logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Cross-entropy with the depth in the nucleus as probability, a scalar.

    `logits` and `masks` are float32 (N, 1, H, W), the latter as patches.PatchDataset has them:
    nuclei of unknown depth, -1, and what is not annotated do not count. Nor does a patch without a
    nucleus of known depth: the background of masks alone would teach that there is no depth in
    tissue like theirs.
    """
    tells = (masks > 0).flatten(1).any(1).view(-1, 1, 1, 1)
    known = ((masks >= 0) & tells).float()
    return binary_cross_entropy_with_logits(logits, masks.clamp(min=0), weight=known)


def total_loss(mask_loss: Callable, logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """The loss of the mask and, of a network that has that output, of the depth in nuclei.

    `logits` are float32 (N, 1 or 2, H, W), `masks` (N, 1, H, W) as patches.PatchDataset has them.
    Pixels that are not annotated add nothing; all others weigh the same, in whatever patch.
    """
    known = (masks != NOT_ANNOTATED).float()
    loss = mask_loss(logits[:, :1], (masks != 0).float(), known)
    return loss + depth_loss(logits[:, 1:], masks) if logits.shape[1] > 1 else loss


LOSSES = {"bce": binary_cross_entropy_with_logits, "bce_dice": bce_dice}  # by --loss
