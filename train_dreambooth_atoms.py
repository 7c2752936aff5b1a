"""Teaches Stable Diffusion a concept from a few pictures by training only filter atoms.

    accelerate launch train_dreambooth_atoms.py --config configs/pocket/castle.yaml
    accelerate launch train_dreambooth_atoms.py --pretrained_model_name_or_path CompVis/stable-diffusion-v1-4 \
        --instance_data_dir my_photos --instance_prompt "photo of a <castle>" --placeholder_token "<castle>" \
        --initializer_token castle --train_token_embedding --output_dir runs/castle
"""

import sys

from sd_atoms.cli import train_main

if __name__ == "__main__":
    sys.exit(train_main())
