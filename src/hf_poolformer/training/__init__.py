"""Training on streamed datasets: data, augmentation, optimisation, checkpoints, metrics and the loop."""
