"""How other programs name the layers and the parts of an adapter: kohya, LyCORIS, diffusers, LDM, A1111, ComfyUI.

Names and shapes alone: no network is needed to read or write them.
"""
