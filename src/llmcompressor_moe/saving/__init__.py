"""Complete a trimmed model and save it so that config, tensors, model card and history agree."""
