"""Two reconstructions that a metric must be able to tell from a good one: no x-ray read, and no volume made.

:class:`MeanVolume` answers every patient with the mean of the training volumes; :class:`NearestPatient` with the whole
CT of the training patient whose x-rays are most alike. A method that does not beat both has learned nothing.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..datasets import Patients
from ..files import InputError


class MeanVolume:
    """The mean training volume.

    Args:
        train: training patients.
    """

    def __init__(self, train: Patients) -> None:
        total = torch.zeros(train.volume.shape, dtype=torch.float64)
        for rows in torch.arange(len(train)).split(32):
            total += train.unit(rows).double().sum(dim=(0, 1))
        self.mean = (total / len(train)).float()

    def reconstruct(self, xrays: Float[Tensor, "b n v u"]) -> Float[Tensor, "b 1 z y x"]:
        """The same volume in [-1, 1] for every patient."""
        return self.mean.expand(len(xrays), 1, *self.mean.shape)


class NearestPatient:
    """The training patient with the most similar x-rays: least mean squared difference of the line integrals.

    Args:
        train: training patients with the x-rays of one set of views.
    """

    def __init__(self, train: Patients) -> None:
        self.train = train

    def nearest(self, xrays: Float[Tensor, "b n v u"]) -> Int[Tensor, " b"]:
        """Rows of the training patients.

        Raises:
            InputError: x-rays of other views or another size than those of the training patients.
        """
        if xrays.ndim != 4 or xrays.shape[1:] != self.train.xrays.shape[1:]:
            raise InputError(
                f"xrays: found shape {tuple(xrays.shape)}, expected (patient, *{tuple(self.train.xrays.shape[1:])}), "
                "the views of the training patients."
            )
        known = self.train.xrays.flatten(1)
        return torch.stack([(known - images.flatten().to(known)).square().mean(1).argmin() for images in xrays])

    def reconstruct(self, xrays: Float[Tensor, "b n v u"]) -> Float[Tensor, "b 1 z y x"]:
        """Their volumes in [-1, 1]."""
        return self.train.unit(self.nearest(xrays))
