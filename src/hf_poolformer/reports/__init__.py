"""Reports on data and on models: pages of one HTML file each, and the figures in them as data."""
