"""The same x-rays by other programs. Each class maps our arrays to the peer's own layout once, outside the timing."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from difr3ct_core.geometry import View, view_frame


class RTK:
    """ITK-RTK's Joseph projector and its matched back-projector (rotation about RTK's y)."""

    name = "ITK-RTK Joseph"
    package = "itk-rtk"
    modes = ("parallel", "cone")

    def __init__(self, views: tuple[View, ...], shape: tuple[int, int, int], spacing: float, threads: int) -> None:
        import itk
        from itk import RTK as rtk

        self.itk = itk
        itk.MultiThreaderBase.SetGlobalDefaultNumberOfThreads(threads)
        self.kind = itk.Image[itk.F, 3]
        self.rtk = rtk
        self.spacing = spacing
        view = views[0]
        self.detector = (len(views), *view.detector_shape)
        self.pixel = view.pixel_mm
        self.geometry = rtk.ThreeDCircularProjectionGeometry.New()
        for view in views:
            self.geometry.AddProjection(view.dso_mm, view.dsd_mm if view.mode == "cone" else 0.0, view.angle_deg)
        self.zero_stack = self._image(np.zeros(self.detector, np.float32), (self.pixel[1], self.pixel[0], 1.0))
        nz, ny, nx = shape
        self.zero_volume = self._image(np.zeros((nx, nz, ny), np.float32), (spacing,) * 3)

    def _image(self, array: np.ndarray, spacing: tuple[float, ...]) -> Any:
        image = self.itk.image_from_array(np.ascontiguousarray(array))
        image.SetSpacing(spacing)
        centre = [-(n - 1) / 2 * s for n, s in zip(array.shape[::-1], spacing, strict=True)]
        if array.shape == self.detector:
            centre[2] = 0.0
        image.SetOrigin(centre)
        return image

    def volume(self, mu: np.ndarray) -> Any:
        return self._image(mu.transpose(2, 0, 1), (self.spacing,) * 3)

    def forward(self, volume: Any) -> Any:
        project = self.rtk.JosephForwardProjectionImageFilter[self.kind, self.kind].New()
        project.InPlaceOff()
        project.SetInput(0, self.zero_stack)
        project.SetInput(1, volume)
        project.SetGeometry(self.geometry)
        project.Update()
        return project.GetOutput()

    def adjoint(self, stack: Any) -> Any:
        back = self.rtk.JosephBackProjectionImageFilter[self.kind, self.kind].New()
        back.InPlaceOff()
        back.SetInput(0, self.zero_volume)
        back.SetInput(1, stack)
        back.SetGeometry(self.geometry)
        back.Update()
        return back.GetOutput()

    def array(self, stack: Any) -> np.ndarray:
        return self.itk.array_from_image(stack)

    def volume_array(self, volume: Any) -> np.ndarray:
        return self.itk.array_from_image(volume).transpose(1, 2, 0)


class Astra:
    """ASTRA's CPU projector "linear" (Joseph), slice by slice: its 3D projectors need CUDA."""

    name = "ASTRA CPU linear"
    package = "astra-toolbox"
    modes = ("parallel",)

    def __init__(self, views: tuple[View, ...], shape: tuple[int, int, int], spacing: float, threads: int) -> None:
        import astra

        self.astra = astra
        nz, ny, nx = shape
        view = views[0]
        half_x, half_y = nx * spacing / 2, ny * spacing / 2
        volume = astra.create_vol_geom(ny, nx, -half_x, half_x, -half_y, half_y)
        # ASTRA's y runs against the row index and its angles start a quarter turn earlier.
        angles = [math.radians(view.angle_deg + 90) for view in views]
        detector = astra.create_proj_geom("parallel", view.pixel_mm[1], view.detector_shape[1], angles)
        self.projector = astra.create_projector("linear", detector, volume)
        self.slice_in = np.zeros((ny, nx), np.float32)
        self.lines = np.zeros((len(views), view.detector_shape[1]), np.float32)
        ids = astra.data2d.link("-vol", volume, self.slice_in), astra.data2d.link("-sino", detector, self.lines)
        self.run = {}
        for kind, names in (
            ("FP", ("VolumeDataId", "ProjectionDataId")),
            ("BP", ("ReconstructionDataId", "ProjectionDataId")),
        ):
            setup = astra.astra_dict(kind)
            setup["ProjectorId"] = self.projector
            setup[names[0]], setup[names[1]] = ids
            self.run[kind] = astra.algorithm.create(setup)
        self.out = np.zeros((nz, len(views), view.detector_shape[1]), np.float32)
        self.back = np.zeros(shape, np.float32)

    def volume(self, mu: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(mu[:, ::-1])

    def forward(self, volume: np.ndarray) -> np.ndarray:
        for k, row in enumerate(volume):
            self.slice_in[...] = row
            self.astra.algorithm.run(self.run["FP"])
            self.out[k] = self.lines
        return self.out

    def adjoint(self, stack: np.ndarray) -> np.ndarray:
        for k, row in enumerate(stack):
            self.lines[...] = row
            self.astra.algorithm.run(self.run["BP"])
            self.back[k] = self.slice_in
        return self.back

    def array(self, stack: np.ndarray) -> np.ndarray:
        return stack.transpose(1, 0, 2)

    def volume_array(self, volume: np.ndarray) -> np.ndarray:
        return volume[:, ::-1]


class NanoDRR:
    """nanodrr's differentiable ray marching; its adjoint is the gradient with respect to the volume."""

    name = "nanodrr"
    package = "nanodrr"
    modes = ("parallel", "cone")

    def __init__(self, views: tuple[View, ...], shape: tuple[int, int, int], spacing: float, threads: int) -> None:
        from nanodrr.data import Subject
        from nanodrr.drr import render

        view = views[0]
        (n_v, n_u), (p_v, p_u) = view.detector_shape, view.pixel_mm
        extent = torch.tensor([n * spacing for n in shape[::-1]])
        world_to_grid = torch.diag(torch.cat([2 / extent, torch.ones(1)]))
        eye = torch.eye(4)

        def subject(mu: torch.Tensor) -> Any:
            return Subject(
                mu, torch.zeros(1, 1, 2, 2, 2), eye, eye, world_to_grid, torch.zeros(3), 0, convert_to_mu=False
            )

        self.subject = subject
        poses = []
        for view in views:
            frame = view_frame(view, dtype=torch.float32)
            pose = torch.eye(4)
            pose[:3, 0], pose[:3, 1], pose[:3, 2] = frame.e_u, frame.e_v, -frame.to_source
            pose[:3, 3] = frame.source
            poses.append(pose)
        d = view.dsd_mm
        k_inv = torch.tensor([[p_u / d, 0, -n_u / 2 * p_u / d], [0, p_v / d, -n_v / 2 * p_v / d], [0, 0, 1.0]])
        n = len(views)
        self.render = lambda mu: render(
            subject(mu), k_inv.expand(n, 3, 3), torch.stack(poses), torch.full((n,), d), n_v, n_u,
            n_samples=2 * max(shape), orthographic=view.mode == "parallel", backend="torch",
        )  # fmt: skip

    def volume(self, mu: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(mu)[None, None].contiguous()

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self.render(volume)

    def both(self, volume: torch.Tensor) -> torch.Tensor:
        """Forward, then the adjoint of the result."""
        volume = volume.clone().requires_grad_()
        stack = self.render(volume)
        stack.backward(stack.detach())
        return volume.grad

    def array(self, stack: torch.Tensor) -> np.ndarray:
        return stack[:, 0].numpy()


PEERS = (RTK, Astra, NanoDRR)
