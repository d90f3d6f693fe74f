"""How sparse each expert becomes: from statistics to a ratio per expert, and upstream's pruning at that ratio."""
