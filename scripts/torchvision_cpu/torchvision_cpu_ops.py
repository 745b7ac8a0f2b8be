"""Lets a torchvision that was built for CUDA be imported beside a CPU torch; for test environments only.

Its C++ part does not load there, and its Python part insists on two operators of it. Their schemas are declared here,
the first time torchvision is imported: transforms then work, `torchvision.ops.nms` does not. A `.pth` file beside this
one runs it in every process, since vLLM starts some of its own.
"""

from __future__ import annotations

import importlib.abc
import sys
from typing import Any

SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_kept: list[Any] = []  # a library's operators vanish with it


class DeclareOperators(importlib.abc.MetaPathFinder):
    """Finds nothing; sees that torchvision is looked for."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name != "torchvision":
            return
        sys.meta_path.remove(self)
        import torch

        if not hasattr(torch.ops.torchvision, "nms"):
            library = torch.library.Library("torchvision", "FRAGMENT")
            library.define("nms" + SIGNATURE)
            library.define("qnms" + SIGNATURE)
            _kept.append(library)


sys.meta_path.insert(0, DeclareOperators())
