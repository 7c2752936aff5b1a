"""Trains image classifiers with few parameters, and uses them.

sd-atoms classify train --model efficientnet-lite0 --data photos --output_dir runs/birds
sd-atoms classify evaluate --classifier runs/birds --data photos
sd-atoms classify predict --classifier runs/birds picture.jpg …
sd-atoms classify cam --classifiers runs/birds,runs/birds_lora --data photos
sd-atoms classify merge --classifier runs/birds --onnx birds.onnx
"""
