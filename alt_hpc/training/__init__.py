"""The optimisation of a model: its settings. (The loop itself is `trainer`.)"""
