"""Layers that the models share. A layer takes a ``Probe`` and names its tap points; it never sees a mesh."""
