"""What every room stands on: errors, files, names, processes. Nothing here knows of models, data or training."""
