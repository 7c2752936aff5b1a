"""A convolution or Linear layer that carries atom adapters."""

import zlib

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn import functional as F

from sd_atoms.atoms import (
    PLAIN,
    ConvGeometry,
    Term,
    atoms_layer,
    block_rows,
    channel_change,
    filter_rows,
    filters_of,
    initial_beta,
    mixed_weight,
    mixing_dtype,
    sparse_atoms,
    sparse_coefficients,
    svd_atoms,
)
from sd_atoms.errors import UserError
from sd_atoms.tuner.cached_weight import CachedWeight, cache_weight, is_cached, is_valid
from sd_atoms.tuner.config import AtomsConfig
from sd_atoms.tuner.plan import LayerPlan, in_channels, layer_plan
from sd_atoms.tuner.shared import refuse_leaf_offload
from sd_atoms.tuner.tuned import TunedLayer

RANDOM_START = 0.1  # standard deviation of the change that init_weights=False starts with


class AtomsLayer(TunedLayer):
    """A layer with adapters; `AtomsConv` and `AtomsLinear` say how it is computed. Per adapter it has:

    Trained: `atoms_delta`, ΔD (m, K), or ΔD1 (m, m1, K) of overcomplete atoms; `atoms_beta`, β (i, m, m1);
    `atoms_block_delta`, (m_c·a·b, a·b·K) for blocks of a × b channels. Kept with them: `atoms_initial`, D (m, K), and
    `atoms_block_initial`. Not saved: β that is not trained (`beta`), and sparse coefficients (`codes`), which are
    rebuilt from the initial atoms when first needed.
    """

    adapter_layer_names = ("atoms_delta", "atoms_beta", "atoms_block_delta")
    other_param_names = (
        *TunedLayer.other_param_names,
        "atoms_initial",
        "atoms_block_initial",
        "beta",
        "codes",
        "block_codes",
        "codes_made_from",
        "plan",
        "l1",
        "form",
        "delta_is_zero",
    )

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__(base_layer, adapter_name)
        self.atoms_delta = nn.ParameterDict()
        self.atoms_beta = nn.ParameterDict()
        self.atoms_block_delta = nn.ParameterDict()
        self.atoms_initial = nn.ParameterDict()
        self.atoms_block_initial = nn.ParameterDict()
        self.beta = BufferDict()
        self.codes = BufferDict()
        self.block_codes = BufferDict()
        self.codes_made_from: dict[str, list[tuple[int, int]]] = {}
        self.plan: dict[str, LayerPlan] = {}
        self.l1: dict[str, float | None] = {}  # of the sparse solver; None for orthonormal atoms
        self.form: dict[str, str] = {}
        self.delta_is_zero: dict[str, bool] = {}  # True while the change is known to be zero
        self._cached: CachedWeight | None = None

    def update_layer(self, adapter_name: str, config: AtomsConfig, name: str) -> None:
        """Adds an adapter, whose name is not taken: atoms from the base weight, no change.

        With `config.inference_mode` nothing is decomposed: the atoms are about to be loaded.

        Args:
            adapter_name: the adapter.
            config: its settings.
            name: of this layer in its model.
        """
        self._cached = None
        plan = layer_plan(config, name, self.get_base_layer())
        seed = zlib.crc32(f"{config.seed}:{name}".encode())  # layers of one shape do not share their β
        weight = self.base_weight
        filters = filters_of(weight.detach())
        new = dict(dtype=mixing_dtype(weight.dtype), device=weight.device)
        self.plan[adapter_name] = plan
        self.l1[adapter_name] = config.l1 if config.solver == "sparse" else None
        shapes = plan.shapes(self.get_base_layer(), config.train_beta)
        if plan.m:
            self.atoms_initial[adapter_name] = self._atoms(filter_rows(filters), shapes["atoms_initial"], config, seed)
            self.atoms_delta[adapter_name] = nn.Parameter(torch.zeros(shapes["atoms_delta"], **new))
        if plan.m1:
            beta = initial_beta(in_channels(self.get_base_layer()), plan.m, plan.m1, seed).to(**new)
            if config.train_beta:
                self.atoms_beta[adapter_name] = nn.Parameter(beta)
            else:
                self.beta[adapter_name] = beta
        if plan.block:
            shape = shapes["atoms_block_initial"]
            rows = filters if config.inference_mode else block_rows(filters, plan.block).flatten(0, 1)
            self.atoms_block_initial[adapter_name] = self._atoms(rows, shape, config, seed)
            self.atoms_block_delta[adapter_name] = nn.Parameter(torch.zeros(shape, **new))
        if not config.init_weights:
            for change in (self.atoms_delta, self.atoms_block_delta):
                if adapter_name in change:
                    nn.init.normal_(change[adapter_name], std=RANDOM_START)
        self.form[adapter_name] = config.form
        self.delta_is_zero[adapter_name] = config.init_weights
        self._added(adapter_name, config, plan.scale)

    @staticmethod
    def _atoms(rows: torch.Tensor, shape: tuple[int, int], config: AtomsConfig, seed: int) -> nn.Parameter:
        """The initial atoms of rows (N, T), frozen; zeros of that shape where they are about to be loaded."""
        if config.inference_mode:
            atoms = torch.zeros(shape, dtype=mixing_dtype(rows.dtype), device=rows.device)
        elif config.solver == "sparse":
            atoms = sparse_atoms(rows, shape[0], config.l1, seed).atoms
        else:
            atoms = svd_atoms(rows, shape[0])
        return nn.Parameter(atoms, requires_grad=False)

    def get_base_layer(self) -> nn.Module:
        """The layer below all adapters; PEFT's own asks `hasattr` each time, which shows in small layers."""
        layer = self._modules["base_layer"]
        return layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer

    @property
    def base_weight(self) -> torch.Tensor:
        """The weight without any adapter, also while adapters are merged."""
        kept = self._originals.get("weight")
        return self.get_base_layer().weight if kept is None else kept

    @property
    def groups(self) -> int:
        """Groups of the layer; 1 for Linear."""
        return getattr(self.get_base_layer(), "groups", 1)

    @property
    def in_features(self) -> int:
        """Inputs of the layer, over all groups; the name is PEFT's, also for channels of a convolution."""
        return in_channels(self.get_base_layer())

    @property
    def out_features(self) -> int:
        """Outputs of the layer."""
        return self.get_base_layer().weight.shape[0]

    def change_terms(self, adapter: str) -> list[Term]:
        """What an adapter adds to the weight, scale included, as terms Q·M; in float32 at least.

        The change of an adapter is C·ΔD. With orthonormal atoms C = F·Dᵀ, so M = scale·Dᵀ·ΔD over the filters
        themselves; with sparse ones Q = C and M = scale·ΔD.
        """
        plan, scale = self.plan[adapter], self.scaling[adapter]
        dtype = mixing_dtype(self.base_weight.dtype)
        terms = []
        with torch.autocast(self.base_weight.device.type, enabled=False):  # it would round ΔD to half precision
            if plan.m:
                change = self.atoms_delta[adapter].to(dtype)
                if plan.m1:
                    beta = self.atoms_beta if adapter in self.atoms_beta else self.beta
                    change = channel_change(beta[adapter].to(dtype), change)  # (i, m, K)
                terms.append(self._term(adapter, change * scale, self.atoms_initial, self.codes, None))
            if plan.block:
                change = self.atoms_block_delta[adapter].to(dtype) * scale
                terms.append(self._term(adapter, change, self.atoms_block_initial, self.block_codes, plan.block))
        return terms

    def _term(self, adapter, change, initial, codes, block) -> Term:
        if self.l1[adapter] is None:
            # (K, m) @ (m, K) -> (K, K), or (i, m, K) -> (i, K, K)
            return Term(None, initial[adapter].to(change.dtype).T @ change, block)
        self._rebuild_codes(adapter)
        return Term(codes[adapter], change, block)

    @torch.no_grad()
    def _rebuild_codes(self, adapter: str) -> None:
        """Encodes the filters by the initial atoms, unless that has been done for these very atoms."""
        sources = [atoms[adapter] for atoms in (self.atoms_initial, self.atoms_block_initial) if adapter in atoms]
        if torch.compiler.is_compiling() and adapter in self.codes_made_from:
            return
        made_from = [(id(atoms), 0 if atoms.is_inference() else atoms._version) for atoms in sources]
        if self.codes_made_from.get(adapter) == made_from:
            return
        plan, filters = self.plan[adapter], filters_of(self.base_weight.detach())
        for atoms, codes, block in (
            (self.atoms_initial, self.codes, (1, 1)),
            (self.atoms_block_initial, self.block_codes, plan.block),
        ):
            if adapter in atoms:
                rows = block_rows(filters, block)
                made = sparse_coefficients(rows.flatten(0, 1), atoms[adapter], self.l1[adapter])
                codes[adapter] = made.view(*rows.shape[:2], -1)
        self.codes_made_from[adapter] = made_from

    def terms(self, adapters: list[str]) -> list[Term]:
        """The effective weight: F·(I + ΣM) over the adapters with orthonormal atoms, and what the others add."""
        mixing, others = None, []
        for term in (term for name in adapters for term in self.change_terms(name)):
            if term.codes is None and term.block is None:
                mixing = term.mixing if mixing is None else mixing + term.mixing
            else:
                others.append(term)
        if mixing is None:
            return [PLAIN, *others]
        identity = torch.eye(mixing.shape[-1], dtype=mixing.dtype, device=mixing.device)
        return [Term(None, identity + mixing), *others]

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """scale·C·ΔD in the shape and dtype of the base weight: what the adapter adds to it."""
        return mixed_weight(self.base_weight.detach(), self.change_terms(adapter), self.groups)

    def values(self, adapters):
        """As `TunedLayer`, but rounded to the weight's dtype already."""
        return {"weight": mixed_weight(self.base_weight.detach(), self.terms(adapters), self.groups)}

    def _all_zero(self, adapters: list[str]) -> bool:
        """Whether all changes are zero. Looked up on the device only until one is first seen not to be."""
        if torch.compiler.is_compiling():
            return False  # a look-up would break the graph
        for name in adapters:
            if self.delta_is_zero[name]:
                changes = (self.atoms_delta, self.atoms_block_delta)
                self.delta_is_zero[name] = not any(bool(c[name].detach().any()) for c in changes if name in c)
        return all(self.delta_is_zero[name] for name in adapters)

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """The layer with its active adapters; shapes as of the layer."""
        layer = self.get_base_layer()
        weight, bias = layer.weight, layer.bias
        if weight.is_meta and not x.is_meta:
            return self._onloaded(x, *args, **kwargs)
        refuse_leaf_offload(layer)
        # diffusers' layer-wise casting: the base layer's hook would cast, but only when the layer itself is called
        cast = weight.dtype != x.dtype and hasattr(layer, "_diffusers_hook")
        # first, since small layers are as quick as a few look-ups
        if (
            self._cached is not None
            and not cast
            and not torch.is_grad_enabled()
            and is_valid(self._cached, self, weight)
        ):
            return self._plain(x, self._cached.effective, bias)
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [name for name in self.active_adapters if name in self.plan]
        if self.disable_adapters or self.merged or not active:
            return self.base_layer(x, *args, **kwargs)
        delta_is_zero = self._all_zero(active)
        if delta_is_zero and not torch.is_grad_enabled():
            return self.base_layer(x, *args, **kwargs)
        if not torch.is_grad_enabled() and not cast and is_cached(weight) and self.form[active[0]] == "auto":
            self._cached = cache_weight(self, active, weight)
            return self._plain(x, self._cached.effective, bias)
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        elif cast:
            weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        return self._mixed(x, weight, bias, self.terms(active), self.form[active[0]], delta_is_zero)

    def _onloaded(self, *args, **kwargs) -> torch.Tensor:
        """`forward` with what accelerate offloaded brought in: its hooks fire only where a module itself is called."""
        hooked = [module for module in self.modules() if hasattr(module, "_hf_hook")]
        if not hooked:
            raise UserError("the network is on the meta device, without weights; load them first")
        for module in hooked:
            module._hf_hook.pre_forward(module)
        try:
            return self.forward(*args, **kwargs)
        finally:
            self._cached = None  # what is offloaded shall not stay in memory
            for module in hooked:
                module._hf_hook.post_forward(module, None)

    def _plain(self, x, weight, bias) -> torch.Tensor:
        raise NotImplementedError

    def _mixed(self, x, weight, bias, terms, form, delta_is_zero) -> torch.Tensor:
        raise NotImplementedError

    def __repr__(self) -> str:
        return "atoms." + super().__repr__()


class AtomsLinear(AtomsLayer):
    """Linear with atom adapters: (…, i) -> (…, o)."""

    def _plain(self, x, weight, bias):
        return F.linear(x, weight, bias)

    def _mixed(self, x, weight, bias, terms, form, delta_is_zero):
        return atoms_layer(x, weight, terms, bias, None, form, delta_is_zero)


class AtomsConv(AtomsLayer):
    """Conv1d, Conv2d or Conv3d with atom adapters: (N, i, *S) -> (N, o, *S'), or without N.

    Right under stride, dilation, groups, any kernel shape and any padding mode.
    """

    def _plain(self, x, weight, bias):
        return self.get_base_layer()._conv_forward(x, weight, bias)

    def _mixed(self, x, weight, bias, terms, form, delta_is_zero):
        conv = self.get_base_layer()
        single = x.dim() == weight.dim() - 1
        x, padding = _pad(x.unsqueeze(0) if single else x, conv)
        geometry = ConvGeometry(conv.stride, padding, conv.dilation, conv.groups)
        y = atoms_layer(x, weight, terms, bias, geometry, form, delta_is_zero)
        return y.squeeze(0) if single else y


def _pad(x: torch.Tensor, conv: nn.Module) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Pads x where a plain convolution cannot (other modes than zeros, uneven 'same'); returns x and what is left."""
    nothing = (0,) * (x.dim() - 2)
    if conv.padding == "valid":
        return x, nothing
    sides = conv._reversed_padding_repeated_twice  # before and after, last axis first
    if conv.padding_mode != "zeros":
        return F.pad(x, sides, mode=conv.padding_mode), nothing
    before, after = sides[::2], sides[1::2]
    if before != after:
        return F.pad(x, sides), nothing
    return x, tuple(before[::-1])
