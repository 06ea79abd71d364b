"""`python -m w2s.share`: a finished run as a folder with a model card, and its push to the hub."""
