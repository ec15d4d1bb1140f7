"""Depth studies: grids of networks, measured, kept through crashes, compared and drawn."""
