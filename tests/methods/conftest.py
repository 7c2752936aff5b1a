"""Networks on which every method is tried, small enough for milliseconds."""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from runs import METHODS, TEACHER, run
from tiny import one_core, write_photos, write_tiny_base
from torch import nn

from sd_atoms.methods.adapters import add_adapter


class ConvNet(nn.Module):
    """Every kind of convolution, norms, a Linear layer and an embedding: tokens (N, 3), x (N, 4, 9, 9) -> (N, 5)."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.plain = nn.Conv2d(4, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.strided = nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.dilated = nn.Conv2d(8, 12, 3, dilation=2, padding=2)
        self.circular = nn.Conv2d(12, 8, 3, padding=1, padding_mode="circular")
        self.depthwise = nn.Conv2d(8, 8, 3, padding="same", groups=8, padding_mode="reflect")
        self.pointwise = nn.Conv2d(8, 6, 1)
        self.row_norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 5)

    def forward(self, tokens, x):
        x = torch.tanh(self.plain(x + self.table(tokens).mean(1)[:, :, None, None]))
        x = torch.tanh(self.strided(self.norm(x)))
        x = x + torch.tanh(self.grouped(x))
        x = torch.tanh(self.circular(torch.tanh(self.dilated(x))))
        x = self.pointwise(torch.tanh(self.depthwise(x)))
        return self.head(self.row_norm(x.mean((2, 3))))


@pytest.fixture(scope="session")
def convnet():
    """-> the same ConvNet, anew each time."""
    torch.manual_seed(0)
    made = ConvNet().eval()
    return lambda: copy.deepcopy(made)


@pytest.fixture(scope="session")
def convnet_inputs():
    generator = torch.Generator().manual_seed(1)
    return torch.tensor([[0, 3, 6], [1, 1, 2]]), torch.randn(2, 4, 9, 9, generator=generator)


@pytest.fixture(scope="session")
def unet():
    """-> the same UNet of Stable Diffusion's kind, anew each time."""
    torch.manual_seed(0)
    made = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        mid_block_type=None,
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=2,
    ).eval()
    return lambda: copy.deepcopy(made)


@pytest.fixture(scope="session")
def small_unet_inputs():
    generator = torch.Generator().manual_seed(1)
    latents, states = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 16, generator=generator)
    return latents, torch.tensor([3, 700]), states


@pytest.fixture(scope="session")
def moved():
    """(model, config, name, seed) -> the model with a new adapter that has a change."""

    def make(model, config, name="default", seed=2):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in add_adapter(model, config, name):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter))
        return model

    return make


@pytest.fixture(scope="module")
def on_one_core():
    """For whole runs: threads cost such small ones more than they bring."""
    with one_core():
        yield


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder with a base, photos and templates."""
    folder = tmp_path_factory.mktemp("runs")
    write_tiny_base(folder / "tiny")
    write_photos(folder / "photos")
    (folder / "one.txt").write_text("a {} in snow\n")
    (folder / "unrelated.txt").write_text("a barn\n")
    return folder


@pytest.fixture(scope="session")
def trained(place):
    """method -> its run, made once."""
    made = {}

    def get(method):
        if method not in made:
            made[method] = run(place, method, place / method)
        return made[method]

    return get


@pytest.fixture(scope="session")
def taught(place):
    """method -> another run of it, made once: with a teacher and with a text encoder's adapter, of either kind."""
    made = {}

    def get(method):
        if method not in made:
            kind = ("atoms", "lora")[METHODS.index(method) % 2]
            text = dict(train_text_encoder=True, text_adapter=kind, text_learning_rate=0.3)
            made[method] = run(place, method, place / f"taught-{method}", seed=1, **TEACHER, **text)
        return made[method]

    return get
