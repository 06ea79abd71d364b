"""Diffusion: denoisers, the process, image data, and the distances that judge samples."""
