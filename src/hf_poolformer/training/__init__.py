"""Training on streamed datasets: settings, augmentation, optimisation, checkpoints and the loop."""
