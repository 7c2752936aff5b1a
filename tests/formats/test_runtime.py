"""stable-diffusion.cpp, as `cyllama` brings it, draws from exported files what it draws from the merged checkpoint.

pip install "sd-atoms[runtime]", then pytest -m slow tests/formats/test_runtime.py; 10 GB of memory and of disk.
"""

import subprocess
import sys

import numpy as np
import pytest
import torch
from adapters import write_adapter
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from sd_atoms.cli import main
from sd_atoms.pipeline.architectures import unet_config
from sd_atoms.pipeline.single_file import ldm_state

pytestmark = pytest.mark.slow
ROWS = 49408
# in a process of its own, since it ends one where it does not like a file
DRAW = """
import sys
import numpy as np
from cyllama.sd import SDContext, SDContextParams, SDImageGenParams
model, out, *lora = sys.argv[1:]
params = SDContextParams()
params.model_path, params.n_threads = model, 2
context = SDContext(params)
wanted = SDImageGenParams(prompt="photo of a castle", width=64, height=64, seed=1, sample_steps=2, cfg_scale=2.0)
if lora:
    wanted.set_loras([{"path": lora[0], "multiplier": 1.0}])
np.save(out, context.generate_with_params(wanted)[0].to_numpy())
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory, pocket):
    """A folder and a file of Stable Diffusion v1-4's shape, random weights in half precision."""
    pytest.importorskip("cyllama")
    torch.manual_seed(0)
    ids = {name: getattr(pocket.tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = CLIPTextConfig(
        vocab_size=ROWS, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, **ids
    )
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, sample_size=512,
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae, CLIPTextModel(text), pocket.tokenizer, UNet2DConditionModel.from_config(unet_config("sd-v1-4")),
        PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True),
        None, None, requires_safety_checker=False,
    ).to(torch.float16)  # fmt: skip
    folder = tmp_path_factory.mktemp("sd")
    pipe.save_pretrained(folder / "base")
    state = {key: value.contiguous().clone() for key, value in ldm_state(pipe, ROWS).items()}
    save_file(state, folder / "base.safetensors")
    return folder


def drawn(folder, model, *lora):
    out = folder / "picture.npy"
    subprocess.run([sys.executable, "-c", DRAW, str(model), str(out), *map(str, lora)], check=True)
    return np.load(out).astype(int)


def test_it_draws_the_same_from_the_base_and_the_file_as_from_the_merged_model(base, capsys):
    file = write_adapter(base / "castle.safetensors", str(base / "base"), "atoms", 0.2)
    to = ("--to", "lora,diff,checkpoint", "--out", base, "--name", "x")
    assert main(["export", *map(str, (file, *to))]) == 0
    print(capsys.readouterr().out)
    merged = drawn(base, base / "x-checkpoint.safetensors")
    plain = drawn(base, base / "base.safetensors")
    assert abs(merged - plain).max() > 20
    for kind in ("lora", "diff"):
        found = drawn(base, base / "base.safetensors", base / f"x-{kind}.safetensors")
        apart, whole = abs(found - merged).max(), abs(merged - plain).max()
        print(f"{kind}: {apart} levels from the merged model, which is {whole} from the base")
        assert apart <= 2
