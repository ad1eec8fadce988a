"""BatchFeature: what the image processor returns."""

from __future__ import annotations

from typing import Any

import torch


class BatchFeature(dict[str, Any]):
    """A dict whose entries are attributes too: `features.pixel_values`."""

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__} has no entry {name!r}") from None

    def to(self, *args: Any, **kwargs: Any) -> BatchFeature:
        """Move the tensors in place, as `torch.Tensor.to` does, and return self.

        A dtype is applied to floating-point tensors alone: labels stay int64.
        Raises TypeError for entries that are no tensors.
        """
        for name, value in self.items():
            if not isinstance(value, torch.Tensor):
                raise TypeError(
                    f"{name}: expected a tensor, got {type(value).__name__}; "
                    'pass return_tensors="pt" to the image processor'
                )
        for name, value in self.items():
            if value.is_floating_point():
                self[name] = value.to(*args, **kwargs)
            else:
                # The device alone: whole numbers must not pass through a floating dtype.
                device = torch.empty(0, device=value.device).to(*args, **kwargs).device
                self[name] = value.to(device)
        return self
