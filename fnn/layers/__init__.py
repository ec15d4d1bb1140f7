"""Layers: pairs of pure functions, and what they are made of.

Activations and initialisers by name, then one file for each family of layers. `memory` is what layers keep of a sequence
that comes in pieces; `taps` report what passes through them. No layer knows of training or of theory.
"""
