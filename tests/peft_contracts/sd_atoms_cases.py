"""Cases for PEFT's own contract tests (its tests/test_custom_models.py, fetched, never copied here)."""

from sd_atoms import AtomsConfig

TEST_CASES = [
    ("Conv2d atoms", "Conv2d", AtomsConfig, {"target_modules": ["conv2d"]}),
    ("Conv2d atoms, m=4", "Conv2d", AtomsConfig, {"target_modules": ["conv2d"], "m": 4}),
    ("Conv2d overcomplete", "Conv2d", AtomsConfig, {"target_modules": ["conv2d"], "m1": 2}),
    ("Conv2d blocks and Linear", "Conv2d", AtomsConfig, {"target_modules": ["conv2d", "lin0"], "kc": 2}),
    ("Conv1d atoms", "Conv1d", AtomsConfig, {"target_modules": ["conv1d"], "m": 1}),
    ("Conv3d atoms", "Conv3d", AtomsConfig, {"target_modules": ["conv3d"], "m": 9}),
    ("MLP blocks", "MLP", AtomsConfig, {"target_modules": ["lin0"], "kc": 2}),
    ("MLP blocks on both", "MLP", AtomsConfig, {"target_modules": ["lin0", "lin1"], "kc": 2}),
    (
        "MLP blocks, lin1 trained in full",
        "MLP",
        AtomsConfig,
        {"target_modules": ["lin0"], "modules_to_save": ["lin1"], "kc": 2},
    ),
]


def linear_atoms(**settings):
    """What the tests over all classes call: without settings of ours, and on Linear layers."""
    return AtomsConfig(kc=2, **settings)


ALL_PEFT_CONFIG_CLASSES = [linear_atoms]
