"""The demo checkpoint: its data, training and quantization, and the finished files in `checkpoint/`."""
