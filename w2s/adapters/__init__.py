"""The method in other people's loops: transformers' Trainer, Lightning, timm's train.py. Import the module of yours."""
