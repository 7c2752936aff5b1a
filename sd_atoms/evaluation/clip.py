"""CLIP features of pictures and texts."""

import torch
from PIL import Image
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from sd_atoms.errors import UserError
from sd_atoms.pipeline.base import quiet_unless_terminal
from sd_atoms.sources import packaged_path, resolve_source


class ClipFeatures:
    """A CLIP model as two functions to unit vectors, (N, d) float32 on the CPU."""

    def __init__(self, name: str, device: str | torch.device = "cpu") -> None:
        """Opens "pocket:clip", a folder or a hub id, from safetensors only.

        Raises:
            UserError: there is no such model.
        """
        quiet_unless_terminal()
        source = str(packaged_path(name) or resolve_source(name, "clip_model_name_or_path"))
        try:
            self.model = CLIPModel.from_pretrained(source, use_safetensors=True).eval().to(device)
            self.tokenizer = AutoTokenizer.from_pretrained(source)
            self.processor = AutoImageProcessor.from_pretrained(source, backend="pil")
        except (OSError, ValueError) as error:
            raise UserError(f"clip_model_name_or_path: {name!r} cannot be opened as a CLIP model") from error

    @torch.no_grad()
    def of_images(self, images: list[Image.Image], batch: int = 32) -> torch.Tensor:
        """RGB pictures of any size -> (N, d)."""
        features = []
        for start in range(0, len(images), batch):
            pixels = self.processor(images=images[start : start + batch], return_tensors="pt").pixel_values
            pooled = self.model.vision_model(pixel_values=pixels.to(self.model.device)).pooler_output
            features.append(self.model.visual_projection(pooled).float().cpu())
        return F.normalize(torch.cat(features), dim=-1)

    @torch.no_grad()
    def of_texts(self, texts: list[str]) -> torch.Tensor:
        """Texts, cut at the model's length -> (N, d)."""
        inputs = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(self.model.device)
        pooled = self.model.text_model(**inputs).pooler_output
        return F.normalize(self.model.text_projection(pooled).float().cpu(), dim=-1)

    def cuts(self, text: str) -> bool:
        """Whether a text is beyond the model's length; its end token stays, the words before it go."""
        return len(self.tokenizer(text).input_ids) > self.tokenizer.model_max_length
