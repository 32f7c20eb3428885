"""DIFR3CT: posterior samples of 3D chest CT from 1 to 8 planar x-rays (Sun et al. 2024)."""

from .files import InputError
from .reconstruct import Reconstruction, reconstruct

__all__ = ["InputError", "Reconstruction", "reconstruct"]
