"""The two personal landmarks, which pretraining never shows."""

from sd_atoms.pocket.world.canal import CanalHouse, CanalShape
from sd_atoms.pocket.world.castle import Banner, CastleShape, Tower

CONCEPTS: dict[str, CastleShape | CanalShape] = {
    "castle": CastleShape(
        wall=(64, 190, 178),
        roof=(214, 40, 130),
        towers=(
            Tower(-0.5, 0.2, 1.0, "cone"),
            Tower(-0.12, 0.15, 0.66, "dome"),
            Tower(0.46, 0.3, 0.62, "crenel"),
        ),
        wall_height=0.42,
        has_keep=False,
        keep_width=0.3,
        keep_height=0.8,
        keep_top="cone",
        roof_height=0.34,
        windows_per_tower=2,
        has_flag=True,
        flag=(250, 212, 60),
        gate_half_width=0.1,
        banner=Banner(x=0.18, top=0.4, width=0.17, height=0.34, colour=(250, 212, 60), emblem=(200, 30, 40)),
    ),
    "canal": CanalShape(
        left=(
            CanalHouse(0.3, 0.72, (244, 196, 48), "step"),
            CanalHouse(0.22, 0.5, (120, 70, 170), "tri"),
            CanalHouse(0.2, 0.62, (240, 120, 50), "flat"),
        ),
        right=(
            CanalHouse(0.26, 0.5, (130, 210, 170), "tri"),
            CanalHouse(0.28, 0.76, (214, 60, 110), "step"),
            CanalHouse(0.2, 0.5, (240, 230, 210), "flat"),
        ),
        water=(36, 150, 120),
        roof=(60, 40, 90),
        bridge=(220, 40, 40),
    ),
}
