"""A whole model as one file under LDM's names, which ComfyUI, A1111, InvokeAI and stable-diffusion.cpp open."""

import torch
from torch import nn

from sd_atoms.errors import UserError
from sd_atoms.formats.names import text_to_open_clip, unet_to_ldm, vae_to_ldm

UNET_PREFIX, VAE_PREFIX = "model.diffusion_model.", "first_stage_model."
CLIP_PREFIX, OPEN_CLIP_PREFIX = "cond_stage_model.transformer.text_model.", "cond_stage_model.model."
QKV = ("q_proj", "k_proj", "v_proj")  # in the order in which OpenCLIP joins them


@torch.no_grad()
def ldm_state(pipe, vocabulary: int) -> dict[str, torch.Tensor]:
    """Key -> tensor of the file, most of them the pipeline's own.

    Args:
        pipe: a plain pipeline, without adapters, of Stable Diffusion v1 or v2.
        vocabulary: so many rows of the token embedding are written; these programs know no further words.

    Raises:
        UserError: LDM has no name for a module of this UNet.
    """
    state = {f"{UNET_PREFIX}{key}": value for key, value in _unet(pipe.unet).items()}
    state |= {f"{VAE_PREFIX}{key}": value for key, value in _vae(pipe.vae).items()}
    return state | _text(pipe.text_encoder, vocabulary)


def _unet(unet: nn.Module) -> dict[str, torch.Tensor]:
    found = {}
    for key, value in unet.state_dict().items():
        module, _, part = key.rpartition(".")
        name = unet_to_ldm(module, unet.config.layers_per_block)
        if name is None:
            raise UserError(
                f"checkpoint: {module} of the UNet has no place in a single file of Stable Diffusion v1/v2"
            )
        found[f"{name}.{part}"] = value
    return found


def _vae(vae: nn.Module) -> dict[str, torch.Tensor]:
    found, blocks = {}, len(vae.config.up_block_types)
    for key, value in vae.state_dict().items():
        module, _, part = key.rpartition(".")
        attention = ".attentions." in module and value.dim() == 2
        found[f"{vae_to_ldm(module, blocks)}.{part}"] = value[:, :, None, None] if attention else value
    return found


def _text(encoder: nn.Module, vocabulary: int) -> dict[str, torch.Tensor]:
    state = {key.removeprefix("text_model."): value for key, value in encoder.state_dict().items()}
    words = "embeddings.token_embedding.weight"
    state[words] = state[words][:vocabulary]
    if encoder.config.hidden_act != "gelu":  # quick_gelu: CLIP ViT-L, of v1
        return {f"{CLIP_PREFIX}{key}": value for key, value in state.items()}
    found = {"positional_embedding": state.pop("embeddings.position_embedding.weight")}
    for key, value in state.items():
        module, _, part = key.rpartition(".")
        if module.endswith(QKV):
            place, number = module.rpartition(".")[0], module.split(".")[2]
            joined = torch.cat([state[f"{place}.{name}.{part}"] for name in QKV])
            found[f"transformer.resblocks.{number}.attn.in_proj_{part}"] = joined
        else:
            found[f"{text_to_open_clip(module)}.{part}"] = value
    return {f"{OPEN_CLIP_PREFIX}{key}": value for key, value in found.items()}
