"""A page to try models on: `interface.serve`. `models` and `answers` know nothing of Gradio."""
