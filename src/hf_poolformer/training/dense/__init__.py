"""What training segmenters and detectors adds: annotations, augmentation, settings, initialisation."""
