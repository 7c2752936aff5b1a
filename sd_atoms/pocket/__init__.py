"""The pocket base: a small Stable-Diffusion-shaped pipeline that comes with the package.

`pocket` loads by the same calls as any base model; only `sd_atoms.sources` knows where its files are.
`world` renders the pictures it was pretrained on, `pretrain` makes it again from nothing.
"""
