"""What every room stands on: errors, files, names, processes, settings, and how a saved model is opened."""
