"""Measurements with the peers side by side in one process: ``jaxmodels bench NAME``, files without an underscore."""
