"""The parts of examples/train_and_serve.py."""
