"""The layer of our tuners that add something to a weight."""

import torch

from sd_atoms.atoms import mixing_dtype
from sd_atoms.tuner.tuned import TunedLayer, full_precision


class DeltaLayer(TunedLayer):
    """A layer whose adapters each add something to its weight: a subclass says what, in `delta`."""

    def delta(self, adapter: str) -> torch.Tensor:
        """The change of the weight at a scale of 1: shape of the weight, in float32 at least."""
        raise NotImplementedError

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        with full_precision(self.original("weight")):
            return self.delta(adapter) * self.scaling[adapter]

    def values(self, adapters):
        weight = self.original("weight")
        total = weight.to(mixing_dtype(weight.dtype))
        for adapter in adapters:
            total = total + self.get_delta_weight(adapter)
        return {"weight": total}
