"""A convolution that carries atom adapters."""

import warnings

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from torch.nn import functional as F

from sd_atoms.atoms import ConvGeometry, atoms_conv2d, mix_filters, svd_atoms, taps
from sd_atoms.tuner.config import AtomsConfig


class AtomsLayer(BaseTunerLayer):
    """What every adapted layer has: per adapter the initial atoms D and their change ΔD, both (m, K), and a scale."""

    adapter_layer_names = ("atoms_delta",)
    other_param_names = ("atoms_initial", "scaling", "form", "moved")

    def __init__(self, base_layer: nn.Module) -> None:
        self.base_layer = base_layer
        self.atoms_delta = nn.ParameterDict()  # ΔD, trained
        self.atoms_initial = (
            nn.ParameterDict()
        )  # D, frozen; kept so that a file never depends on a solver run elsewhere
        self.scaling: dict[str, float] = {}
        self.form: dict[str, str] = {}
        self.moved: dict[str, bool] = {}  # False while ΔD is known to be zero
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._original_weight: torch.Tensor | None = None  # while merged: the base weight, to be put back bit for bit

    def update_layer(self, adapter_name: str, config: AtomsConfig) -> None:
        """Adds an adapter of that name, or starts it anew: atoms from the base weight, ΔD = 0.

        With `config.inference_mode` nothing is decomposed: the atoms are about to be loaded.
        """
        weight = self.base_weight
        if config.inference_mode:
            atoms = torch.zeros(config.m, taps(weight), device=weight.device)
        else:
            atoms = svd_atoms(weight, config.m).float()
        self.atoms_initial[adapter_name] = nn.Parameter(atoms, requires_grad=False)
        self.atoms_delta[adapter_name] = nn.Parameter(torch.zeros_like(atoms))
        self.scaling[adapter_name] = 1.0
        self.form[adapter_name] = config.form
        self.moved[adapter_name] = False
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @property
    def base_weight(self) -> torch.Tensor:
        """The weight without any adapter, also while adapters are merged."""
        return self.get_base_layer().weight if self._original_weight is None else self._original_weight

    def mixing(self, adapter_names: list[str]) -> torch.Tensor:
        """A = I + Σ scale·Dᵀ·ΔD over the adapters that this layer has, (K, K), float32."""
        device_type = self.base_weight.device.type
        with torch.autocast(device_type, enabled=False):  # autocast would round ΔD to half precision
            present = [name for name in adapter_names if name in self.atoms_delta]
            k = taps(self.base_weight)
            mixing = torch.eye(k, device=self.base_weight.device)
            for name in present:
                # (K, m) @ (m, K) -> (K, K)
                change = self.atoms_initial[name].float().T @ self.atoms_delta[name].float()
                mixing = mixing + self.scaling[name] * change
        return mixing

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """scale·C·ΔD = scale·F·Dᵀ·ΔD in the shape and dtype of the base weight F: what the adapter adds to it."""
        change = self.atoms_initial[adapter].float().T @ self.atoms_delta[adapter].float()
        return mix_filters(self.base_weight, self.scaling[adapter] * change)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Puts the adapters into the base weight: F becomes F·A, taken in float32 and rounded once.

        The original weight is kept until `unmerge`, so that it comes back bit for bit.

        Raises:
            ValueError: with `safe_merge`, when the merged weight is not finite; the weight is then left as it was.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.atoms_delta]
        if not names:
            return
        with torch.no_grad():
            merged = mix_filters(self.base_weight.data, self.mixing(self.merged_adapters + names))
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(f"the merged weight is not finite; adapters {', '.join(names)} seem to be broken")
        if self._original_weight is None:
            self._original_weight = self.get_base_layer().weight.data
        self.get_base_layer().weight.data = merged
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Puts the original base weight back."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        weight = self.get_base_layer().weight
        weight.data = self._original_weight.to(weight.device)
        self._original_weight = None
        self.merged_adapters.clear()

    def set_scale(self, adapter: str, scale: float) -> None:
        """Sets the strength of one adapter; an adapter that this layer lacks is passed over, as PEFT does."""
        if adapter in self.scaling:
            self.scaling[adapter] = float(scale)

    def scale_layer(self, scale: float) -> None:
        """Multiplies the strength of the active adapters."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undoes `scale_layer(scale)`; without a scale the active adapters go back to strength 1."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] = 1.0 if scale is None else self.scaling[name] / scale

    def _any_moved(self, adapter_names: list[str]) -> bool:
        """Whether any ΔD differs from zero. Looked up on the device only until it is first seen to be so."""
        if torch.compiler.is_compiling():
            return True  # a look-up would break the graph
        for name in adapter_names:
            if not self.moved[name]:
                self.moved[name] = bool(self.atoms_delta[name].detach().any())
        return any(self.moved[name] for name in adapter_names)

    def _move_adapter_to_device_of_base_layer(self, adapter_name, device=None) -> None:
        # PEFT would also cast to the base's dtype; atoms stay float32 whatever the base is
        device = self.base_weight.device if device is None else device
        for parameters in (self.atoms_delta, self.atoms_initial):
            if adapter_name in parameters and parameters[adapter_name].device.type != "meta":
                parameters[adapter_name].data = parameters[adapter_name].data.to(device)


class AtomsConv2d(nn.Module, AtomsLayer):
    """Conv2d with atom adapters, right under stride, dilation, groups, any kernel shape and any padding mode."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: AtomsConfig) -> None:
        super().__init__()
        AtomsLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """(N, i, H, W) -> (N, o, H', W')."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [name for name in self.active_adapters if name in self.atoms_delta]
        if self.disable_adapters or self.merged or not active:
            return self.base_layer(x, *args, **kwargs)
        moved = self._any_moved(active)
        if not moved and not torch.is_grad_enabled():
            return self.base_layer(x, *args, **kwargs)
        conv = self.get_base_layer()
        weight, bias = conv.weight, conv.bias
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        x, padding = _pad(x, conv)
        geometry = ConvGeometry(conv.stride, padding, conv.dilation, conv.groups)
        return atoms_conv2d(x, weight, self.mixing(active), bias, geometry, self.form[active[0]], not moved)

    def __repr__(self) -> str:
        return "atoms." + super().__repr__()


def _pad(x: torch.Tensor, conv: nn.Conv2d) -> tuple[torch.Tensor, tuple[int, int]]:
    """Pads x where a plain convolution cannot (other modes than zeros, uneven 'same'); returns x and what is left."""
    if conv.padding == "valid":
        return x, (0, 0)
    sides = conv._reversed_padding_repeated_twice  # left, right, top, bottom
    if conv.padding_mode != "zeros":
        return F.pad(x, sides, mode=conv.padding_mode), (0, 0)
    left, right, top, bottom = sides
    if (left, top) != (right, bottom):
        return F.pad(x, sides), (0, 0)
    return x, (top, left)
