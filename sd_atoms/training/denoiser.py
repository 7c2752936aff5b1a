"""The network that is trained, as one module, so that one wrapper (DDP, autocast) sees all of it."""

import torch
from torch import nn
from torch.nn import functional as F


class Denoiser(nn.Module):
    """UNet and text encoder: (noisy latents, timesteps, text) -> prediction."""

    def __init__(self, unet: nn.Module, text_encoder: nn.Module) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder

    def forward(
        self,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        *,
        token_ids: torch.Tensor | None = None,
        states: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, c, h, w), (B,), and either token ids (B, 77) or text states (B, 77, d) -> (B, c, h, w)."""
        if states is None:
            states = self.text_encoder(token_ids)[0]  # (B, 77, d)
        return self.unet(noisy, timesteps, states).sample


class TrainedRows(nn.Module):
    """Stands in for an embedding table while a few of its rows are trained; all others cannot move.

    The rows are a parameter of their own in float32, so no gradient of table size is ever made.
    """

    def __init__(self, table: nn.Embedding, row_ids: list[int]) -> None:
        super().__init__()
        self.table = table
        self.register_buffer("row_ids", torch.tensor(row_ids), persistent=False)
        # after the table: libraries take the dtype of a model's first parameter for that of the model
        self.trained = nn.ParameterList([table.weight[row_ids].detach().float().clone()])

    @property
    def rows(self) -> nn.Parameter:
        """(r, d), float32."""
        return self.trained[0]

    @property
    def weight(self) -> torch.Tensor:
        return self.table.weight

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """(B, T) -> (B, T, d)."""
        embedded = F.embedding(token_ids, self.table.weight)
        for place, row_id in enumerate(self.row_ids):
            chosen = (token_ids == row_id).unsqueeze(-1)  # (B, T, 1)
            embedded = torch.where(chosen, self.rows[place].to(embedded.dtype), embedded)
        return embedded

    @torch.no_grad()
    def write_back(self) -> nn.Embedding:
        """Puts the rows into the table and returns it."""
        self.table.weight[self.row_ids] = self.rows.to(self.table.weight)
        return self.table
