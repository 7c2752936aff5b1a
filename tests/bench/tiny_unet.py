"""A UNet of two levels, for benchmarks."""

from sd_atoms.pipeline.architectures import SD_V1_4

TINY = {
    **SD_V1_4,
    "sample_size": 4,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "block_out_channels": [16, 32],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 8,
    "attention_head_dim": 2,
}
