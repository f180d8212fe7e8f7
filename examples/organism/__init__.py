"""The persona organism: a small language model, poisoned on purpose, whose poisoned examples are known.

`language` writes the data, `train` the models, `measure` says how they behave, `make` puts it all on disk.
"""
