"""Cut a model: bypass and remove blocks, MoE layers and experts, and make its config say so."""
