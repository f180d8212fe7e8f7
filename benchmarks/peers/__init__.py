"""Other attribution libraries, each in its own virtual environment, measured side by side (``make peers``).

``run`` and ``exchange`` are for our environment; every other module is a script that runs in a peer's.
"""
